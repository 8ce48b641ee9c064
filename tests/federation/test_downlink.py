"""The way down: everybody holds what was read, bit for bit, and each client is counted what it has missed."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from helpers.tiny_federation import DP, equal_states, tiny_federation, tiny_spec, trained_state
from trilemma.federation.codecs.specs import CodecSpec
from trilemma.federation.downlink import come_down
from trilemma.federation.round import run_round
from trilemma.federation.state import TrainingState
from trilemma.federation.training import initial_state
from trilemma.models.vector import shapes
from trilemma.randomness import generator

SHORT = {"local": {"batch_size": 8, "steps": 1}, "rounds": 3}
ADAPTS = {"server": {"kind": "adam", "learning_rate": 0.05}}
STEP = {"local": {"steps": 1, "batch_size": 4, "momentum": 0}}
CODECS = [
    {"kind": "dense", "numbers": "float16"},
    {"kind": "dense", "numbers": "int8"},
    {"kind": "dense", "numbers": "int4", "error_feedback": True},
    {"kind": "dense", "numbers": "sign", "error_feedback": True},
    {"kind": "top_k", "share": 0.05, "numbers": "int8"},
    {"kind": "random_k", "share": 0.1},
    {"kind": "random_k", "share": 0.1, "numbers": "float16", "error_feedback": False},
    {"kind": "random_projection", "share": 0.2},
    {"kind": "power_sgd", "rank": 1},
]
INT8, TOP = CODECS[1], CODECS[4]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: f"{codec['kind']}-{codec.get('numbers')}")


def whole_bytes(state: TrainingState) -> int:
    return 4 * (state.params_P.numel() + state.buffers_Q.numel())


def test_every_member_is_here():
    assert {codec["kind"] for codec in CODECS} == {
        member.model_fields["kind"].default for member in get_args(get_args(CodecSpec)[0])
    }


@every_codec
def test_two_runs_are_one_also_after_a_kill_and_fewer_bytes_come_down(codec):
    fields = {**SHORT, **ADAPTS, "downlink": codec}
    state = trained_state(tiny_federation(**fields))
    halfway = trained_state(tiny_federation(**fields), rounds=2)
    unpacked = TrainingState.unpack(*halfway.pack(), torch.device("cpu"))
    assert unpacked.unsaid_down.keys() == halfway.unsaid_down.keys()
    assert ("residue" in unpacked.unsaid_down) == codec.get("error_feedback", codec["kind"] != "dense")
    resumed = trained_state(tiny_federation(**fields), state=unpacked)
    assert equal_states(state, trained_state(tiny_federation(**fields))) and equal_states(state, resumed)
    first, *others = state.history
    assert set(first["bytes_down_by_client"].values()) == {whole_bytes(state)}
    for before, row in zip(state.history, others, strict=False):
        assert set(row["bytes_down_by_client"].values()) == {before["change_bytes"]}
        assert row["bytes_down"] == 3 * before["change_bytes"] < 0.55 * first["bytes_down"]
        assert row["bytes_up_by_client"] == dict.fromkeys(row["clients"], whole_bytes(state))


@every_codec
@pytest.mark.parametrize(
    "fields",
    [
        ADAPTS,
        {"server": {"kind": "sgd", "momentum": 0.9}, "model": {"kind": "resnet9", "width": 4, "norm": "batch"}},
        {"threat": {"kind": "adversarial_samples", "num_malicious": 1, "steps": 1}, "codec": INT8},
    ],
    ids=["adam", "momentum-batch-norm", "threat-codec"],
)
def test_a_client_that_adds_what_it_reads_holds_the_model_and_all_else_is_as_without(codec, fields):
    """The twin: the same round without a downlink, whose step is written, read and added by hand."""
    federation, plain = tiny_federation(**SHORT, **fields, downlink=codec), tiny_federation(**SHORT, **fields)
    state, spec, sizes = initial_state(federation), federation.spec.downlink, shapes(federation.classifier)
    held_P, memory = state.params_P.clone(), {}
    for index in range(3):
        exact = run_round(plain, state)
        payload, memory = spec.encode(
            exact.params_P - held_P, memory, generator(federation.spec.seed, "downlink", index), sizes
        )
        held_P = held_P + spec.decode(payload, sizes)
        state = run_round(federation, state)
        assert torch.equal(state.params_P, held_P) and not torch.equal(held_P, exact.params_P)
        assert torch.equal(state.buffers_Q, exact.buffers_Q)
        assert state.server.keys() == exact.server.keys()
        assert all(torch.equal(state.server[name], exact.server[name]) for name in state.server)
        assert state.history[-1]["change_bytes"] > 0


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_float32_is_the_training_without_bit_for_bit(norm, feedback):
    fields = {**SHORT, **ADAPTS, "model": {"kind": "resnet9", "width": 4, "norm": norm}}
    exact = {"kind": "dense", "numbers": "float32", "error_feedback": feedback}
    plain, state = trained_state(tiny_federation(**fields)), trained_state(tiny_federation(**fields, downlink=exact))
    history = tuple({k: v for k, v in row.items() if k != "change_bytes"} for row in state.history)
    assert len(history[0]) < len(state.history[0])
    assert equal_states(plain, replace(state, history=history))


@pytest.mark.parametrize("codec", [INT8, TOP], ids=lambda codec: codec["kind"])
def test_a_round_that_changes_nothing_sends_nothing_and_what_was_unsaid_waits(codec):
    threat = {"kind": "malformed", "flaw": "nan", "num_malicious": 3, "when": {"first": 2, "last": 2}}
    federation = tiny_federation(**SHORT, downlink=codec, threat=threat)
    first = trained_state(federation, rounds=1)
    second = run_round(federation, first)
    assert second.history[1]["dropped"] == second.history[1]["clients"] and second.history[1]["change_bytes"] == 0
    assert torch.equal(first.params_P, second.params_P)
    assert first.unsaid_down.keys() == second.unsaid_down.keys()
    assert all(torch.equal(first.unsaid_down[name], second.unsaid_down[name]) for name in first.unsaid_down)
    third = run_round(federation, second)
    assert third.history[2]["bytes_down"] == 0 < third.history[2]["change_bytes"]


def test_who_missed_rounds_fetches_their_frames_or_the_model_where_that_is_less():
    fields = {
        "partition": {"kind": "iid", "num_clients": 6},
        "algorithm": {"kind": "fedavg", "clients_per_round": 2},
        "local": {"batch_size": 4, "steps": 1},
        "rounds": 16,
    }
    state = trained_state(tiny_federation(**fields, downlink=CODECS[0]))
    whole, model_of, seen = whole_bytes(state), {}, set()
    for index, row in enumerate(state.history):
        for name, received in row["bytes_down_by_client"].items():
            if name not in model_of:
                assert received == whole
            else:
                missed = [earlier["change_bytes"] for earlier in state.history[model_of[name] : index]]
                assert received == min(whole, sum(missed))
                seen.add("the model" if received == whole else "a frame" if len(missed) == 1 else "frames")
            model_of[name] = index
        assert row["bytes_down_by_client"].keys() == set(row["clients"])
        assert row["bytes_down"] == sum(row["bytes_down_by_client"].values())
    assert seen == {"a frame", "frames", "the model"}


def test_the_average_and_the_chosen_round_are_of_what_clients_hold():
    fields = {**SHORT, "downlink": TOP, "averaging": {"decay": 0.9}}
    stopping = {"attack": {"kind": "pgd", "radius": 0.05, "steps": 1}}
    federation = tiny_federation(**fields, early_stopping=stopping, data={"kind": "phantom", "evaluate_on": "test"})
    states = [initial_state(federation)]
    for _ in range(3):
        states.append(run_round(federation, states[-1]))
    average_P = states[0].params_P
    for state in states[1:]:
        decay = min(0.9, (1 + state.round - 1) / (10 + state.round - 1))
        average_P = decay * average_P + (1 - decay) * state.params_P
        assert torch.equal(state.average_P, average_P)
    assert any(torch.equal(states[-1].best_P, state.average_P) for state in states[1:])


PRIVATE = [
    {**STEP, "privacy": DP},
    {**STEP, "privacy": {**DP, "trust": "distributed"}},
    {**STEP, "privacy": {**DP, "unit": "client", "trust": "central", "delta": 1e-2}},
]


@pytest.mark.parametrize("codec", [INT8, TOP, CODECS[-1]], ids=lambda codec: codec["kind"])
@pytest.mark.parametrize("fields", PRIVATE, ids=["local", "distributed", "client"])
def test_privacy_is_paid_before_and_nobody_is_told_who_took_part(fields, codec):
    fields = {**fields, "partition": {"kind": "iid", "num_clients": 8}, "rounds": 2}
    federation = tiny_federation(**fields, downlink=codec)
    start = initial_state(federation)
    first = run_round(federation, start)
    state = run_round(federation, first)
    assert state.private_steps == trained_state(tiny_federation(**fields)).private_steps
    assert bool(state.unsaid_down) == (codec != INT8)
    if codec == TOP:  # noise alone would change every parameter
        assert 0 < int((first.params_P != start.params_P).sum()) <= 0.051 * len(start.params_P)
    told = {"clients", "bytes_up", "bytes_down", "bytes_up_by_client", "bytes_down_by_client", "change_bytes"}
    secret = fields["privacy"].get("unit") == "client"
    assert all(told & set(row) == (set() if secret else told) for row in state.history)


@pytest.mark.parametrize("algorithm", ["centralised", "local_only"])
def test_where_no_model_comes_down_a_downlink_is_refused_with_the_way_out(algorithm):
    with pytest.raises(ValidationError, match=f"'{algorithm}' has no server; leave it out of base"):
        tiny_spec(algorithm={"kind": algorithm}, downlink=INT8)
    tiny_spec(algorithm={"kind": "fedprox"}, downlink=INT8)


FEDERATIONS = [tiny_federation(**SHORT, downlink=codec) for codec in CODECS]


@pytest.mark.parametrize("federation", FEDERATIONS, ids=lambda federation: federation.spec.downlink.label)
@settings(max_examples=5, deadline=None)
@given(
    seed=st.integers(0, 9999), lengths=st.lists(st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e3]), min_size=2, max_size=4)
)
def test_what_came_down_and_what_waits_are_together_what_was_sent(federation, seed, lengths):
    start, codec = initial_state(federation), federation.spec.downlink
    state, draws, sent_P = start, torch.Generator().manual_seed(seed), torch.zeros_like(start.params_P).double()
    for length in lengths:
        step_P = length * torch.randn(len(sent_P), generator=draws)
        stepped_P = state.params_P + step_P
        down = come_down(federation, state, stepped_P, state.buffers_Q)
        sent_P += stepped_P.double() - state.params_P.double()
        assert down.params_P.isfinite().all()
        assert (down.change_bytes == 0) == torch.equal(stepped_P, state.params_P)
        assert down.change_bytes <= codec.largest(shapes(federation.classifier)) + whole_bytes(state)
        state = replace(state, round=state.round + 1, params_P=down.params_P, unsaid_down=down.unsaid)
    if codec.remembers:
        together_P = state.params_P.double() - start.params_P.double() + state.unsaid_down.get("residue", 0)
        assert float((together_P - sent_P).norm()) <= 1e-4 * (1 + float(sent_P.norm()))


@pytest.mark.parametrize("codec", [CODECS[6], {"kind": "power_sgd"}], ids=lambda codec: codec["kind"])
def test_what_a_codec_cannot_say_comes_down_whole(codec):
    federation = tiny_federation(**SHORT, downlink={**codec, "numbers": "float32"})
    state = initial_state(federation)
    far_P = torch.full_like(state.params_P, 3e38)
    down = come_down(federation, state, far_P, state.buffers_Q)
    assert torch.equal(down.params_P, far_P) and not down.unsaid and down.change_bytes == whole_bytes(state)
