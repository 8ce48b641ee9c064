"""The server's door: no malformed update crashes it, moves the model or goes unreported."""

import json
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from helpers.tiny_federation import DP, tiny_federation, trained_state
from trilemma.federation import round as federated_round
from trilemma.federation.admission import (
    PLAUSIBLE,
    digest,
    why_implausible,
    why_malformed,
    why_no_sum_of_counts,
    why_old,
)
from trilemma.federation.aggregation.specs import AggregationSpec
from trilemma.federation.local_training import LocalResult
from trilemma.federation.server import aggregate
from trilemma.federation.training import initial_state
from trilemma.models.vector import variances

FOUR = {"partition": {"kind": "iid", "num_clients": 4}, "local": {"batch_size": 8, "steps": 1}}
#: Every rule; some need more updates than the others.
RULES = [
    {"kind": "mean"},
    {"kind": "median"},
    {"kind": "trimmed_mean", "num_byzantine": 1},
    {"kind": "geometric_median"},
    {"kind": "krum", "num_byzantine": 1},
    {"kind": "multi_krum", "num_byzantine": 1},
    {"kind": "bulyan", "num_byzantine": 1},
    {"kind": "norm_clipping", "bound": 1.0},
    {"kind": "centred_clipping", "radius": 1.0},
    {"kind": "divide_and_conquer", "num_byzantine": 1},
    {"kind": "fltrust", "num_images": 5},
    {"kind": "foolsgold"},
    {"kind": "robust_learning_rate", "threshold": 2},
]
EVERY_RULE = get_args(get_args(AggregationSpec)[0])
GENERATED = 10_000

ONE_STEP = {"batch_size": 4, "steps": 1, "momentum": 0}


def result_of(update_P, buffers_Q=None) -> LocalResult:
    return LocalResult(update_P, torch.empty(0) if buffers_Q is None else buffers_Q, 0.0, {})


def test_what_is_sound_is_let_in():
    state = initial_state(tiny_federation())
    good = result_of(torch.full_like(state.params_P, 0.01))
    for why in (why_malformed, too_long, why_old):
        assert why(good, state) == ""
        assert why(result_of(torch.zeros_like(state.params_P)), replace(state, seen=(digest(state.params_P),))) == ""


def too_long(result, state):
    return why_implausible(result, state, torch.zeros(len(result.buffers_Q), dtype=torch.bool))


def test_each_flaw_is_named():
    state = initial_state(tiny_federation())
    update_P, length = torch.full_like(state.params_P, 0.01), float(state.params_P.norm())
    assert "not finite" in why_malformed(result_of(update_P + math.nan), state)
    assert f"not ({len(update_P)},)" in why_malformed(result_of(update_P[1:]), state)
    assert "shape (3,)" in why_malformed(result_of(update_P, torch.ones(3)), state)
    just_inside, just_outside = (update_P / update_P.norm() * PLAUSIBLE * length * f for f in (0.999, 1.001))
    assert too_long(result_of(just_inside), state) == ""
    assert "long, and the model's parameters are" in too_long(result_of(just_outside), state)
    assert "statistics" in too_long(result_of(update_P, torch.full((3,), 1e30)), state)
    for dtype in (torch.float64, torch.complex64, torch.int64, torch.bool):
        assert f"of the type {str(dtype)[6:]}" in why_malformed(result_of(update_P.to(dtype)), state)
    for odd in (None, update_P.to_sparse(), update_P.to("meta"), [0.01]):
        assert why_malformed(result_of(odd), state) == "is no dense array of numbers"
    assert "graph" in why_malformed(result_of(update_P.clone().requires_grad_()), state)
    mask = torch.tensor([False, True])
    assert why_implausible(result_of(update_P, torch.tensor([-1.0, 1.0])), state, mask) == ""
    assert "negative variance" in why_implausible(result_of(update_P, torch.tensor([1.0, -1.0])), state, mask)
    assert "earlier" in why_old(result_of(update_P), replace(state, seen=(digest(update_P),)))


def flawed(draws: np.random.Generator, good_P: torch.Tensor, earlier: list[torch.Tensor], room: float) -> torch.Tensor:
    """One of the ways in which an update can be no update, with drawn places, sizes and signs."""
    size, kind = len(good_P), draws.integers(7)
    update_P = good_P.clone()
    if kind == 0:  # some numbers that are none
        where = draws.choice(size, draws.integers(1, min(size, 50)), replace=False)
        update_P[torch.as_tensor(where)] = float(draws.choice([math.nan, math.inf, -math.inf]))
    elif kind == 1:  # another length
        other = int(draws.choice([0, 1, size - 1, size + 1, int(draws.integers(2, 2 * size))]))
        update_P = torch.full((other if other != size else size + 1,), 0.01)
    elif kind == 2:  # another number of axes
        update_P = good_P.reshape(1, -1) if draws.random() < 0.5 else torch.tensor(0.5)
    elif kind == 3:  # finite, and longer than any training goes
        update_P = good_P / good_P.norm() * room * float(10 ** draws.uniform(0.01, 30))
    elif kind == 4:  # one huge number
        update_P[int(draws.integers(size))] = float(draws.choice([-1, 1])) * room * float(10 ** draws.uniform(0.5, 35))
    elif kind == 5:  # numbers of another type
        update_P = good_P.to([torch.float64, torch.complex64, torch.int32, torch.bool][draws.integers(4)])
    else:  # what somebody has sent before
        update_P = earlier[int(draws.integers(len(earlier)))]
    return update_P


def flawed_statistics(draws: np.random.Generator, good_Q: torch.Tensor, variances_Q: torch.Tensor) -> torch.Tensor:
    """Batch norm's statistics that are none: not finite, of another length, huge, or a variance below zero."""
    buffers_Q, kind = good_Q.clone(), draws.integers(4)
    if kind == 0:
        buffers_Q[int(draws.integers(len(good_Q)))] = float(draws.choice([math.nan, math.inf, -math.inf]))
    elif kind == 1:
        buffers_Q = good_Q[: int(draws.integers(len(good_Q)))]
    elif kind == 2:
        buffers_Q[int(draws.integers(len(good_Q)))] = float(10 ** draws.uniform(10, 35))
    else:
        places = variances_Q.nonzero().flatten()
        buffers_Q[places[int(draws.integers(len(places)))]] = -float(10 ** draws.uniform(-6, 6))
    return buffers_Q


@pytest.mark.parametrize("count", [math.nan, math.inf])
def test_a_count_for_the_common_clip_that_is_no_number_is_named(count):
    federation = tiny_federation()
    state = initial_state(federation)
    sound = LocalResult(torch.ones_like(state.params_P), state.buffers_Q, 0.0, {}, noised_count=3.0)
    assert why_malformed(sound, state) == ""
    assert "no finite number" in why_malformed(sound._replace(noised_count=count), state)


@pytest.mark.parametrize("count", [1e6, -1e30])
def test_counts_for_the_common_clip_that_honest_clients_do_not_come_to_move_nothing_and_are_told(count):
    adaptive = {"kind": "adaptive", "count_noise": 1.1}
    privacy = {**DP, "noise_multiplier": 1.4, "clipping": adaptive, "trust": "distributed"}
    federation = tiny_federation(privacy=privacy, local=ONE_STEP)
    state = initial_state(federation)
    honest = LocalResult(torch.full_like(state.params_P, 1e-3), state.buffers_Q, 0.0, {}, noised_count=2.0)
    results = {client.name: honest for client in federation.clients}
    sound = aggregate(federation, list(federation.clients), results, state)
    assert sound.clips and not sound.refused and sound.update_P is not None
    results[federation.clients[1].name] = honest._replace(noised_count=count)
    found = aggregate(federation, list(federation.clients), results, state)
    assert found.update_P is None and found.clips == dict(state.clips) and not found.used
    assert "the secure sum holds a count for the common clip of" in found.refused and not found.left_out


def test_honest_counts_are_let_in_however_the_noise_falls():
    draws = np.random.default_rng(0)
    sizes, noise = draws.poisson(30, 10_000), draws.normal(0, 2.0, 10_000)
    for sign in (-0.5, 0.5):
        assert not any(why_no_sum_of_counts(sign * n + z, 30.0, 2.0) for n, z in zip(sizes, noise, strict=True))
    assert why_no_sum_of_counts(70.0, 30.0, 2.0) and why_no_sum_of_counts(-70.0, 30.0, 2.0)


@pytest.mark.parametrize("factor", [1e8, 1e12])
def test_a_hospital_that_says_it_holds_more_images_than_there_are_is_left_out_by_name(factor):
    lies = {"kind": "inflated_count", "num_malicious": 1, "factor": factor}
    fields = {**FOUR, "algorithm": {"kind": "fedavg", "weights": "records"}, "rounds": 1}
    federation = tiny_federation(**fields, threat=lies)
    state = trained_state(federation)
    liar = federation.clients[-1].name
    assert list(state.history[0]["left_out"]) == [liar] and "holds" in state.history[0]["left_out"][liar]
    plain = tiny_federation(**fields)
    without = trained_state(replace(plain, clients=plain.clients[:3]))
    assert torch.equal(state.params_P, without.params_P)


def test_a_rule_that_leaves_no_update_standing_says_so():
    fields = {"partition": {"kind": "iid", "num_clients": 4}, "aggregation": {"kind": "fltrust", "num_images": 5}}
    federation = tiny_federation(**fields)
    state = initial_state(federation)
    row_P = torch.ones_like(state.params_P) / 100
    results = {client.name: LocalResult(row_P, state.buffers_Q, 0.0, {}) for client in federation.clients}
    agreed = aggregate(federation, list(federation.clients), results, state, row_P)
    assert agreed.update_P is not None and not agreed.refused and len(agreed.used) == 4
    against = aggregate(federation, list(federation.clients), results, state, -row_P)
    assert against.update_P is None and against.refused == "aggregation 'fltrust' left none of these updates standing"


@pytest.mark.parametrize(
    ("fields", "remembered"),
    [
        ({}, 6),
        ({"privacy": DP, "local": ONE_STEP}, 6),
        ({"privacy": {**DP, "trust": "distributed"}, "local": ONE_STEP}, 0),
        ({"privacy": {**DP, "unit": "client", "trust": "central"}, "local": ONE_STEP}, 0),
        ({"algorithm": {"kind": "centralised"}}, 0),
    ],
    ids=["plain", "local", "distributed", "client", "centralised"],
)
def test_only_a_server_that_sees_single_updates_remembers_them(fields, remembered):
    assert len(trained_state(tiny_federation(**fields)).seen) == remembered


def test_ten_thousand_malformed_updates_crash_nothing_move_nothing_and_are_all_reported():
    """What the server makes of a round with them is what it makes of the same round without those clients."""
    draws, seen, turn, expected = np.random.default_rng(0), 0, 0, {}
    eight = {**FOUR, "partition": {"kind": "iid", "num_clients": 8}}
    eight["model"] = {"kind": "resnet9", "width": 4, "norm": "batch"}
    assert {rule["kind"] for rule in RULES} == {get_args(s.model_fields["kind"].annotation)[0] for s in EVERY_RULE}
    federations = [tiny_federation(**eight, aggregation=rule) for rule in RULES]
    state = initial_state(federations[0])
    room = PLAUSIBLE * float(state.params_P.norm()) * 1.01
    variances_Q, good_Q = variances(federations[0].classifier), state.buffers_Q
    earlier = [torch.randn_like(state.params_P) * 0.01 for _ in range(20)]
    state = replace(state, seen=tuple(digest(old_P) for old_P in earlier))
    while seen < GENERATED:
        federation = federations[turn % len(RULES)]
        clients, case = list(federation.clients), (turn % len(RULES), turn % 5)
        updates = torch.randn(8, len(state.params_P), generator=torch.Generator().manual_seed(case[1])) * 0.01
        root_P = updates[:2].sum(0) if federation.spec.aggregation.kind == "fltrust" else None
        results = {client.name: result_of(updates[i], good_Q) for i, client in enumerate(clients)}
        num_sound = max(4, federation.spec.aggregation.least_rows)
        sound, bad = clients[:num_sound], clients[num_sound:]
        for client in bad:
            broken = draws.random() < 0.2
            update_P = updates[0] if broken else flawed(draws, updates[0], earlier, room)
            buffers_Q = flawed_statistics(draws, good_Q, variances_Q) if broken else good_Q
            results[client.name] = result_of(update_P, buffers_Q)
        found = aggregate(federation, clients, results, state, root_P)
        if case not in expected:
            expected[case] = aggregate(federation, sound, {c.name: results[c.name] for c in sound}, state, root_P)
        assert torch.equal(found.update_P, expected[case].update_P)
        assert torch.equal(found.buffers_Q, expected[case].buffers_Q)
        assert set(found.left_out) == {client.name for client in bad} and all(found.left_out.values())
        assert found.used == sound
        seen, turn = seen + len(bad), turn + 1


def test_updates_that_are_left_out_stand_in_the_history(monkeypatch):
    federation = tiny_federation(**FOUR, rounds=3, threat={"kind": "malformed", "flaw": "replay", "clients": [2]})
    history = trained_state(federation).history
    assert "left_out" not in history[0]
    for row in history[1:]:
        assert row["left_out"] == {"client 3": "is an earlier update again"} and row["dropped"] == ["client 3"]
    json.dumps(history, allow_nan=False)


@pytest.mark.parametrize("flaw", ["nan", "infinity", "shape", "huge"])
def test_a_training_with_malformed_updates_is_the_one_without_that_client(flaw):
    fields = {**FOUR, "rounds": 2, "algorithm": {"kind": "fedavg"}}
    attacked = trained_state(tiny_federation(**fields, threat={"kind": "malformed", "flaw": flaw, "clients": [3]}))
    plain = tiny_federation(**fields)
    without = trained_state(replace(plain, clients=plain.clients[:3]))
    assert torch.equal(attacked.params_P, without.params_P)


def test_a_secure_sum_with_nonsense_in_it_changes_nothing_and_does_not_tell_whose_it_was():
    privacy = {"kind": "dp_sgd", "noise_multiplier": 1.0, "delta": 1e-3, "clip": 1.0, "trust": "distributed"}
    fields = {"partition": FOUR["partition"], "privacy": {**privacy, "num_colluding": 1}}
    fields["local"] = {"batch_size": 4, "steps": 1, "momentum": 0, "optimizer": "sgd"}
    for flaw, said in (("nan", "not finite; who sent that, it does not show"), ("huge", "too long")):
        federation = tiny_federation(**fields, threat={"kind": "malformed", "flaw": flaw, "num_malicious": 1})
        state = trained_state(federation, 1)
        assert torch.equal(state.params_P, initial_state(tiny_federation(**fields)).params_P)
        assert said in state.history[0]["refused"] and "left_out" not in state.history[0]


def test_batch_norms_statistics_are_medians_beside_a_rule_that_is_not_the_mean(monkeypatch):
    """So that one hospital's statistics, which no rule looks at, cannot break the model."""
    fields = {**FOUR, "model": {"kind": "resnet9", "width": 4, "norm": "batch"}}
    honest = federated_round.local_train

    def train(spec, client, *rest):
        result = honest(spec, client, *rest)
        return result._replace(buffers_Q=result.buffers_Q + 50) if client.number == 3 else result

    monkeypatch.setattr(federated_round, "local_train", train)
    moved = {
        kind: float(trained_state(tiny_federation(**fields, aggregation={"kind": kind}), 1).buffers_Q.abs().max())
        for kind in ("mean", "median")
    }
    assert moved["mean"] > 12 and moved["median"] < 5
