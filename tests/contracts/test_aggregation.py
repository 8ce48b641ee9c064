"""What every rule of aggregation promises, whatever the clients send."""

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from reference import naive_aggregation as naive
from trilemma.federation.aggregation import outliers
from trilemma.federation.aggregation import updates as updates_module
from trilemma.federation.aggregation.lengths import fltrust
from trilemma.federation.aggregation.mixing import nearest_neighbour_mixing
from trilemma.federation.aggregation.outliers import folded, foolsgold_weights
from trilemma.federation.aggregation.rule import Received
from trilemma.federation.aggregation.rule_spec import Bucketing, NearestNeighbourMixing
from trilemma.federation.aggregation.specs import (
    AggregationSpec,
    Bulyan,
    CentredClipping,
    DivideAndConquer,
    FlTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    NormClipping,
    RobustLearningRate,
    TrimmedMean,
)
from trilemma.federation.aggregation.updates import Updates
from trilemma.federation.specs import TrainSpec

N, F, P = 11, 2, 40
RULES = [
    Mean(),
    Median(),
    TrimmedMean(num_byzantine=F),
    GeometricMedian(),
    Krum(num_byzantine=F),
    MultiKrum(num_byzantine=F),
    Bulyan(num_byzantine=F),
    NormClipping(bound=2.0),
    CentredClipping(radius=1.0, steps=3),
    DivideAndConquer(num_byzantine=F),
    FlTrust(),
    FoolsGold(),
    RobustLearningRate(threshold=5),
]
#: N updates make 6 buckets, too few for some.
BUCKETED = ("mean", "median", "trimmed_mean", "geometric_median", "norm_clipping", "centred_clipping")
MIXED = [
    rule.model_copy(update={"before": NearestNeighbourMixing(num_byzantine=F)})
    for rule in RULES
    if rule.kind not in ("foolsgold", "bulyan")
]
MIXED += [rule.model_copy(update={"before": Bucketing()}) for rule in RULES if rule.kind in BUCKETED]
#: Whose result stays near the honest rows whatever F others send.
ROBUST = ("median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "bulyan", "divide_and_conquer", "fltrust")

every_rule = pytest.mark.parametrize("rule", [*RULES, *MIXED], ids=lambda rule: rule.label)


def rows(seed: int = 0, n: int = N, p: int = P):
    """Honest updates: a common direction and noise of the same length."""
    draws = np.random.default_rng(seed)
    return draws.normal(size=p) / np.sqrt(p) + draws.normal(size=(n, p)) / np.sqrt(p)


def applied(rule, matrix, weights=None, memory=None, senders=None, seed=0):
    """The server's own update, for the rule that has one, is near what most rows say."""
    n, matrix = len(matrix), np.asarray(matrix)
    weights = np.full(n, 1 / n) if weights is None else weights
    received = Received(
        Updates(torch.as_tensor(np.asarray(matrix), dtype=torch.float32)),
        torch.as_tensor(weights, dtype=torch.float32),
        tuple(range(n)) if senders is None else senders,
        torch.Generator().manual_seed(seed),
        torch.as_tensor(np.median(matrix, axis=0), dtype=torch.float32) if rule.kind == "fltrust" else None,
    )
    update, memory = rule.make().apply(received, memory or {})
    return update.double().numpy(), memory


def test_every_rule_is_here():
    assert {type(rule) for rule in RULES} == set(get_args(get_args(AggregationSpec)[0]))


@every_rule
def test_takes_the_order_of_the_rows_for_nothing(rule):
    if rule.before == Bucketing():
        pytest.skip("buckets are drawn by position")
    matrix, order = rows(), np.random.default_rng(1).permutation(N)
    one, _ = applied(rule, matrix)
    other, _ = applied(rule, matrix[order], senders=tuple(order.tolist()))
    np.testing.assert_allclose(one, other, atol=1e-5)


@every_rule
def test_equal_rows_come_out_as_they_are(rule):
    """But for rules that shorten, and for FoolsGold, which takes equals for one sender."""
    matrix = np.repeat(rows(n=1) * 0.5, N, axis=0)
    update, _ = applied(rule, matrix)
    expected = np.zeros(P) if rule.kind == "foolsgold" else matrix[0]
    np.testing.assert_allclose(update, expected, atol=1e-6)


@every_rule
def test_a_scale_and_a_shift_of_all_rows_do_what_they_do_to_a_mean(rule):
    matrix, shift = rows(), np.linspace(-1, 1, P)
    base, _ = applied(rule, matrix)
    if rule.kind not in ("norm_clipping", "centred_clipping"):
        np.testing.assert_allclose(applied(rule, 3 * matrix)[0], 3 * base, rtol=1e-4, atol=1e-5)
    if rule.kind not in ("norm_clipping", "centred_clipping", "foolsgold", "robust_learning_rate", "fltrust"):
        np.testing.assert_allclose(applied(rule, matrix + shift)[0], base + shift, atol=1e-5)


@pytest.mark.parametrize("rule", [r for r in [*RULES, *MIXED] if r.kind in ROBUST], ids=lambda rule: rule.label)
@pytest.mark.parametrize("sent", [1e3, -1e15, 3e38, "opposite", "one coordinate", "collusion"], ids=str)
def test_stays_near_the_honest_rows_whatever_f_others_send(rule, sent):
    if rule.before == Bucketing() and rule.kind != "trimmed_mean":
        pytest.skip("an attacker in two of six buckets is more than these say they withstand exactly")
    matrix = rows()
    honest = matrix[: N - F]
    if sent == "opposite":
        matrix[N - F :] = -10 * honest.mean(0)
    elif sent == "one coordinate":
        matrix[N - F :] = honest.mean(0)
        matrix[N - F :, 0] = 1e6
    elif sent == "collusion":
        matrix[N - F :] = honest.mean(0) + 1.5 * honest.std(0)  # a little is enough
    else:
        matrix[N - F :] = sent
    update, _ = applied(rule, matrix)
    assert np.isfinite(update).all()
    spread = np.linalg.norm(honest - honest.mean(0), axis=1).max()
    assert np.linalg.norm(update - honest.mean(0)) <= 1.6 * spread


@pytest.mark.parametrize("n", [3, 4, 5, 11, 12])
@pytest.mark.parametrize("sent", [1e3, 1e15, 3e38])
def test_just_under_half_may_be_an_attackers(n, sent):
    most = (n - 1) // 2
    matrix = rows(n=n)
    matrix[n - most :] = sent
    honest = matrix[: n - most]
    spread = np.linalg.norm(honest - honest.mean(0), axis=1).max()
    for rule in (Median(), GeometricMedian(), TrimmedMean(num_byzantine=most)):
        update, _ = applied(rule, matrix)
        assert np.linalg.norm(update - honest.mean(0)) <= 4 * spread, rule.label


@pytest.mark.parametrize("rule", [Mean(), Median(), GeometricMedian(), FoolsGold(), CentredClipping(radius=9)], ids=str)
def test_one_row_is_a_round_too(rule):
    matrix = rows(n=1)
    np.testing.assert_allclose(applied(rule, matrix)[0], matrix[0], atol=1e-5)


def test_a_row_that_overflows_counts_for_nothing_in_foolsgold_and_for_no_longer():
    rule, memory = FoolsGold(), None
    for seed in range(3):
        matrix = np.random.default_rng(seed).normal(size=(N, P)) + np.eye(N, P) * 9
        if seed == 1:
            matrix[-1] = 3e38
        update, memory = applied(rule, matrix, memory=memory)
        assert np.isfinite(update).all() and np.linalg.norm(update) > 0.1
    trusted = fltrust(Updates(torch.tensor([[3e38] * P, [1.0] * P])), torch.ones(P))
    assert trusted.isfinite().all() and trusted.norm() > 1
    for tiny in (1e-20, 1e-38, 1e-41):
        trusted = fltrust(Updates(torch.stack([torch.ones(P) * tiny, torch.ones(P)])), torch.ones(P))
        torch.testing.assert_close(trusted, torch.ones(P))


def test_the_mean_does_not_and_neither_does_a_rule_with_more_attackers_than_it_is_made_for():
    """The control."""
    matrix = rows()
    spread = np.linalg.norm(matrix - matrix.mean(0), axis=1).max()
    centre = matrix[: N - 6].mean(0)
    matrix[N - 6 :] = 1e3
    for rule in (Mean(), Median(), Krum(num_byzantine=F), TrimmedMean(num_byzantine=F)):
        assert np.linalg.norm(applied(rule, matrix)[0] - centre) > 10 * spread


weights_of = st.lists(st.floats(0.1, 5), min_size=N, max_size=N).map(lambda w: np.array(w) / sum(w))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), weights_of)
def test_agrees_with_a_naive_twin(seed, weights):
    matrix = rows(seed).astype(np.float32).astype(np.float64)
    start = np.zeros(P)
    twins = {
        "mean": weights @ matrix,
        "median": naive.median(matrix),
        "trimmed_mean": naive.trimmed_mean(matrix, F),
        "geometric_median": naive.geometric_median(matrix, weights, 2000),
        "krum": naive.krum(matrix, F),
        "multi_krum": naive.multi_krum(matrix, F),
        "bulyan": naive.bulyan(matrix, F),
        "norm_clipping": naive.norm_clipping(matrix, weights, 2.0),
        "centred_clipping": naive.centred_clipping(matrix, weights, start, 1.0, 3),
        "robust_learning_rate": naive.robust_learning_rate(matrix, weights, 5),
    }
    for rule in RULES:
        if rule.kind in twins:
            np.testing.assert_allclose(
                applied(rule, matrix, weights)[0], twins[rule.kind], atol=2e-5, err_msg=rule.kind
            )


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000))
def test_mixtures_roots_and_histories_agree_with_naive_twins(seed):
    matrix = rows(seed).astype(np.float32).astype(np.float64)
    handed = Updates(torch.as_tensor(matrix, dtype=torch.float32))
    mixed = naive.nearest_neighbour_mixing(matrix, F)
    found = nearest_neighbour_mixing(handed, F)
    np.testing.assert_allclose(found.by_columns(lambda block: block[3]).numpy(), mixed[3], atol=1e-5)
    for rule in (Median(), Krum(num_byzantine=F)):
        after = rule.model_copy(update={"before": NearestNeighbourMixing(num_byzantine=F)})
        np.testing.assert_allclose(applied(after, matrix)[0], applied(rule, mixed)[0], atol=1e-5)
    root = matrix[:3].mean(0)
    np.testing.assert_allclose(
        fltrust(handed, torch.as_tensor(root).float()).numpy(), naive.fltrust(matrix, root), atol=1e-5
    )
    np.testing.assert_allclose(
        foolsgold_weights(torch.as_tensor(matrix)).numpy(), naive.foolsgold_weights(matrix), atol=1e-9
    )


def test_distances_are_right_beside_rows_that_are_huge_and_far_from_zero():
    matrix = torch.as_tensor(rows(), dtype=torch.float32) + 1000
    matrix[-1], matrix[-2] = 1e15, 3e38
    found = Updates(matrix).squared_distances()
    expected = torch.cdist(matrix[:-2].double(), matrix[:-2].double()) ** 2
    torch.testing.assert_close(found[:-2, :-2], expected, rtol=1e-3, atol=1e-4)
    assert (found[-2:, :-2] > 1e25).all() and not found.isnan().any()


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e20, 1e37])
@pytest.mark.parametrize("away", [0.0, 1e-6, 1.0])
def test_lengths_are_right_at_any_scale_and_near_the_point_that_they_are_measured_from(scale, away):
    matrix = torch.as_tensor(rows(), dtype=torch.float32) * scale
    torch.testing.assert_close(Updates(matrix).norms(), matrix.double().norm(dim=1), rtol=1e-6, atol=0)
    point = matrix[0] + away * matrix[1]
    expected = (matrix.double() - point.double()).norm(dim=1)
    torch.testing.assert_close(Updates(matrix).norms(point), expected, rtol=2e-4, atol=0 if away else 1e-12 * scale)


def test_drawn_coordinates_are_spread_over_all_of_many():
    index = outliers._drawn(1_000_000, 10_000, torch.Generator().manual_seed(0))
    assert 9_900 < len(index) <= 10_000 and len(index.unique()) == len(index)
    assert torch.histc(index.float(), 10, 0, 1_000_000).min() > 900
    assert sorted(outliers._drawn(50, 10_000, torch.Generator()).tolist()) == list(range(50))


@pytest.mark.parametrize("num_coordinates", [3, 10, P])
def test_divide_and_conquer_looks_at_a_few_coordinates_at_a_time(num_coordinates):
    """Rows that lie far out in most coordinates are found whichever are drawn; so says a naive twin of the same."""
    rule = DivideAndConquer(num_byzantine=F, num_coordinates=num_coordinates, rounds=3)
    for seed in range(10):
        matrix, same = rows(seed), torch.Generator().manual_seed(seed)
        drawn = [outliers._drawn(P, num_coordinates, same).numpy() for _ in range(rule.rounds)]
        expected = naive.divide_and_conquer(matrix, F, drawn)
        np.testing.assert_allclose(applied(rule, matrix, seed=seed)[0], expected, atol=1e-5)
        matrix[N - F :] = 1e3
        np.testing.assert_allclose(applied(rule, matrix, seed=seed)[0], matrix[: N - F].mean(0), atol=1e-5)


@every_rule
def test_columns_at_a_time_change_nothing(rule, monkeypatch):
    whole, _ = applied(rule, rows())
    monkeypatch.setattr(updates_module, "AT_A_TIME", 7 * N)
    parts, _ = applied(rule, rows())
    np.testing.assert_allclose(whole, parts, atol=1e-5)


def test_a_folded_history_keeps_cosines():
    matrix = torch.as_tensor(rows(p=200_000), dtype=torch.float32)
    unit = torch.nn.functional.normalize(matrix.double(), dim=1)
    sketch = torch.nn.functional.normalize(folded(Updates(matrix)).double(), dim=1)
    assert ((unit @ unit.T) - (sketch @ sketch.T)).abs().max() < 0.02


def test_foolsgold_remembers_who_has_pushed_alike():
    rule, memory = FoolsGold(), None
    for seed in range(3):
        matrix = np.random.default_rng(seed).normal(size=(N, P)) + np.eye(N, P) * 9  # every hospital has its own
        matrix[-3:] = matrix[-1] + 0.01 * matrix[-3:]
        update, memory = applied(rule, matrix, memory=memory)
    assert set(memory) == {str(i) for i in range(N)}
    honest, sybils = matrix[:-3].mean(0), matrix[-1]
    assert abs(update @ sybils) / (sybils @ sybils) < 0.1 < (update @ honest) / (honest @ honest)


def test_centred_clipping_goes_on_from_where_it_was():
    rule, memory, matrix = CentredClipping(radius=0.1), None, rows()
    far = [np.linalg.norm(matrix.mean(0))]
    for _ in range(60):
        update, memory = applied(rule, matrix, memory=memory)
        far.append(np.linalg.norm(update - matrix.mean(0)))
    assert far[-1] < 0.5 * far[0] and all(b <= a + 1e-6 for a, b in zip(far[:8], far[1:9], strict=True))


def test_noise_of_norm_clipping():
    matrix = np.zeros((N, 20_000))
    update, _ = applied(NormClipping(bound=2.0, noise=0.5), matrix)
    assert update.std() == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize(
    ("fields", "clients", "said"),
    [
        ({"kind": "krum", "num_byzantine": 2}, 6, "needs 7 updates against 2 attackers, and a round has 6"),
        ({"kind": "multi_krum", "num_byzantine": 1, "num_kept": 8}, 8, "needs 9 updates"),
        ({"kind": "bulyan", "num_byzantine": 2}, 10, "needs 11 updates against 2 attackers"),
        ({"kind": "trimmed_mean", "num_byzantine": 2}, 4, "needs 5 updates"),
        ({"kind": "divide_and_conquer", "num_byzantine": 2}, 4, "needs 5 updates"),
        ({"kind": "robust_learning_rate", "threshold": 4}, 3, "needs 4 updates"),
        (
            {"kind": "krum", "num_byzantine": 1, "before": {"kind": "bucketing"}},
            8,
            "needs 5 updates against 1 attackers",
        ),
        (
            {"kind": "mean", "before": {"kind": "nearest_neighbours", "num_byzantine": 3}},
            6,
            "'nearest_neighbours' needs 7",
        ),
    ],
)
def test_too_many_attackers_are_refused_with_both_numbers(fields, clients, said):
    spec = {"partition": {"kind": "iid", "num_clients": clients}, "aggregation": fields}
    with pytest.raises(ValidationError, match=said):
        TrainSpec.model_validate(spec)
    spec["partition"]["num_clients"] = 2 * clients
    TrainSpec.model_validate(spec)


def test_labels_tell_rules_apart():
    labels = [rule.label for rule in [*RULES, *MIXED]]
    assert len(set(labels)) == len(labels)
    assert Krum(num_byzantine=2, before=Bucketing()).label == "Krum 2 after buckets of 2"


FLOWER = json.loads((Path(__file__).parents[1] / "golden" / "flower_aggregation.json").read_text())


@pytest.mark.parametrize("case", FLOWER["cases"], ids=range(len(FLOWER["cases"])))
@pytest.mark.parametrize("kind", ["mean", "median", "trimmed_mean", "krum", "multi_krum", "bulyan"])
def test_agrees_with_flower_where_it_has_the_rule(kind, case):
    rule = next(rule for rule in RULES if rule.kind == kind)
    assert FLOWER["num_byzantine"] == F
    weights = np.array(case["counts"]) / sum(case["counts"])
    update, _ = applied(rule, case["updates"], weights)
    theirs = [case["aggregated"][name] for name in (kind, f"{kind}_reversed") if name in case["aggregated"]]
    assert any(np.allclose(update, each, rtol=1e-5, atol=2e-5) for each in theirs)
    assert kind == "bulyan" or len(theirs) == 1  # whose choice among equals is the first there, and the nearest here


def test_sensitivity_is_known_of_means_alone():
    matrix, n, clip = rows(), N, 1.0
    for rule in RULES:
        bound = rule.make().sensitivity(clip, n)
        assert (bound is not None) == (rule.kind in ("mean", "norm_clipping"))
        if bound is None:
            continue
        short = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        other = short.copy()
        other[0] = -short[0]
        assert np.linalg.norm(applied(rule, short)[0] - applied(rule, other)[0]) <= bound + 1e-6
    assert NormClipping(bound=0.5).make().sensitivity(1.0, 10) == 0.1
