"""Codecs in real rounds: what arrives, what it costs, what survives a kill, and what comes damaged."""

import pytest
import torch
from pydantic import ValidationError

from helpers.tiny_federation import DP, equal_states, tiny_federation, tiny_spec, trained_state
from trilemma.federation.state import TrainingState
from trilemma.models.vector import num_params

FIVE = {"partition": {"kind": "iid", "num_clients": 5}, "local": {"batch_size": 8, "steps": 1}, "rounds": 3}
CODECS = [
    {"kind": "dense", "numbers": "float16"},
    {"kind": "dense", "numbers": "int8"},
    {"kind": "dense", "numbers": "int4"},
    {"kind": "dense", "numbers": "sign", "error_feedback": True},
    {"kind": "top_k", "share": 0.05, "numbers": "int8"},
    {"kind": "random_k", "share": 0.1},
    {"kind": "random_projection", "share": 0.2},
    {"kind": "power_sgd", "rank": 1},
]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: f"{codec['kind']}-{codec.get('numbers')}")


@every_codec
def test_fewer_bytes_are_sent_the_model_moves_and_two_runs_are_one(codec):
    plain = tiny_federation(**FIVE)
    unchanged = trained_state(plain)
    state = trained_state(tiny_federation(**FIVE, codec=codec))
    assert equal_states(state, trained_state(tiny_federation(**FIVE, codec=codec)))
    before, after = unchanged.history[0], state.history[0]
    assert after["bytes_up"] < 0.55 * before["bytes_up"] and after["bytes_down"] == before["bytes_down"]
    assert before["bytes_up"] == 5 * 4 * num_params(plain.classifier)
    assert not after["dropped"] and not torch.equal(state.params_P, unchanged.params_P)


@every_codec
def test_what_is_remembered_survives_a_kill(codec):
    halfway = trained_state(tiny_federation(**FIVE, codec=codec), rounds=2)
    tensors, texts = halfway.pack()
    unpacked = TrainingState.unpack(tensors, texts, torch.device("cpu"))
    assert {name: set(kept) for name, kept in unpacked.unsaid.items()} == {
        name: set(kept) for name, kept in halfway.unsaid.items()
    }
    through = trained_state(tiny_federation(**FIVE, codec=codec))
    assert equal_states(through, trained_state(tiny_federation(**FIVE, codec=codec), state=unpacked))


def test_float32_changes_nothing_but_the_bytes():
    plain = trained_state(tiny_federation(**FIVE))
    framed = trained_state(tiny_federation(**FIVE, codec={"kind": "dense", "numbers": "float32"}))
    assert torch.equal(plain.params_P, framed.params_P)


def test_statistics_of_batch_norm_travel_in_the_frame():
    fields = {**FIVE, "model": {"kind": "resnet9", "width": 4, "norm": "batch"}}
    plain = trained_state(tiny_federation(**fields))
    framed = trained_state(tiny_federation(**fields, codec={"kind": "dense", "numbers": "float32"}))
    assert len(plain.buffers_Q) and torch.equal(plain.buffers_Q, framed.buffers_Q)


@pytest.mark.parametrize("flaw", ["frame", "nan", "infinity", "shape", "replay"])
@pytest.mark.parametrize("codec", [CODECS[1], CODECS[4], CODECS[7]], ids=lambda codec: codec["kind"])
def test_what_comes_damaged_is_left_out_by_name_and_the_round_goes_on(codec, flaw):
    threat = {"kind": "malformed", "flaw": flaw, "num_malicious": 1}
    federation = tiny_federation(**FIVE, codec=codec, threat=threat)
    state = trained_state(federation)
    bad = federation.clients[-1].name
    rows = state.history[1:] if flaw == "replay" else state.history  # the first is its own
    assert all(set(row["left_out"]) == {bad} and row["dropped"] == [bad] for row in rows)
    said = {"frame": "came in a frame that was changed or cut off", "shape": "came in a frame that"}
    assert all(said.get(flaw, "") in row["left_out"][bad] for row in rows)
    assert state.params_P.isfinite().all() and all(row["loss"] is not None for row in rows)


def test_a_client_that_takes_no_part_keeps_what_it_could_not_say():
    sampled = {**FIVE, "algorithm": {"kind": "fedavg", "clients_per_round": 2}, "rounds": 4}
    first = trained_state(tiny_federation(**sampled, codec=CODECS[4]), rounds=1)
    absent = set(first.history[0]["clients"])
    second = trained_state(tiny_federation(**sampled, codec=CODECS[4]), rounds=2)
    for name in absent - set(second.history[1]["clients"]):
        assert torch.equal(first.unsaid[name]["residue"], second.unsaid[name]["residue"])
    assert set(first.unsaid) == absent


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"privacy": {**DP, "trust": "distributed"}}, "a secure sum adds whole numbers of one lattice"),
        ({"privacy": {**DP, "unit": "client", "trust": "central"}}, "lets a client remember what it could not say"),
        ({"codec": None, "threat": {"kind": "malformed", "flaw": "frame", "num_malicious": 1}}, "there are none"),
    ],
)
def test_codecs_that_no_guarantee_covers_are_refused_with_the_way_out(fields, said):
    eight = {"partition": {"kind": "iid", "num_clients": 8}, "local": {"steps": 1, "batch_size": 4, "momentum": 0}}
    with pytest.raises(ValidationError, match=said):
        tiny_spec(**{"codec": CODECS[4], **eight, **fields})


def test_what_follows_the_noise_is_free():
    private = {"privacy": DP, "local": {"steps": 1, "batch_size": 4, "momentum": 0}, "rounds": 2}
    for codec in (CODECS[1], CODECS[4], CODECS[7]):
        federation = tiny_federation(**private, codec=codec)
        state = trained_state(federation)
        assert all(not row["dropped"] for row in state.history)
        assert state.private_steps == trained_state(tiny_federation(**private)).private_steps


def test_a_codec_says_nothing_of_the_baselines():
    centralised = tiny_federation(algorithm={"kind": "centralised"}, codec=CODECS[1])
    assert torch.equal(
        trained_state(centralised).params_P, trained_state(tiny_federation(algorithm={"kind": "centralised"})).params_P
    )
