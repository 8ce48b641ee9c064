from dataclasses import replace

from builder import BOTH, CONSTANT, DP, MADE, PGD, PLAIN, build
from hypothesis import given, settings
from hypothesis import strategies as st

from trilemma.report.claims import Claim
from trilemma.report.configurations import configuration_rows, headline
from trilemma.report.pareto import Point, dominates, pareto_optimal, pareto_rows, robust_score

LEVELS = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
CLAIMS = st.sampled_from([Claim("example", 1e-5, "local", 0, False), Claim("client", 0.1, "central", 0, True)])
SIZES = st.sampled_from([1.0, 2.0, 4.0])
POINTS = st.builds(Point, LEVELS, st.sampled_from([1.0, 8.0]), LEVELS, SIZES, CLAIMS) | st.builds(
    Point, LEVELS, st.just(float("inf")), LEVELS, SIZES, st.none()
)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.none() | POINTS, max_size=12))
def test_a_point_is_marked_if_and_only_if_nothing_dominates_it(points):
    marked = pareto_optimal(points)
    known = [p for p in points if p is not None]
    for point, is_marked in zip(points, marked, strict=True):
        if point is None:
            assert not is_marked
            continue
        better = [
            q
            for q in known
            if q.utility >= point.utility
            and q.epsilon <= point.epsilon
            and (point.claim is None or q.claim == point.claim)
            and q.robust >= point.robust
            and q.file_bytes <= point.file_bytes
            and q != point
        ]
        assert is_marked == (not better)
    assert not known or any(marked), "something is always optimal"


@settings(deadline=None, max_examples=100)
@given(st.lists(POINTS, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_ties_are_all_marked_and_order_is_irrelevant(points, random):
    doubled = [*points, *points]
    marked = pareto_optimal(doubled)
    assert marked[: len(points)] == marked[len(points) :] == pareto_optimal(points)
    order = list(range(len(points)))
    random.shuffle(order)
    assert pareto_optimal([points[i] for i in order]) == tuple(marked[i] for i in order)


@settings(deadline=None, max_examples=100)
@given(POINTS, POINTS, POINTS)
def test_dominance_is_a_strict_order(a, b, c):
    assert not dominates(a, a)
    assert not (dominates(a, b) and dominates(b, a))
    assert dominates(a, c) or not (dominates(a, b) and dominates(b, c))


def marked_titles(results):
    rows = configuration_rows(results)
    return {row.title for row, best in zip(rows, pareto_rows(rows, headline(rows)), strict=True) if best}


def test_a_configuration_that_is_worse_in_everything_is_not_marked():
    assert f"{PGD}, int8" in marked_titles(build())
    worse = build({**MADE, PGD: replace(MADE[PGD], auroc=0.6, accuracy=0.63, robust=(0.2, 0.1, 0.0))})
    assert f"{PGD}, int8" not in marked_titles(worse)


def test_yardsticks_constants_and_lone_threats_are_not_marked():
    marked = marked_titles(build())
    assert not any(title.startswith(("centralised", "label flip", CONSTANT)) for title in marked)
    assert f"{DP}, int8" in marked


def test_epsilons_compete_only_where_they_claim_the_same():
    # Worse in everything than the private model, which promises less to images than this one to hospitals.
    worse = replace(MADE[BOTH], auroc=0.8, accuracy=0.7, robust=(0.2, 0.0, 0.0), epsilon=9.0)
    assert f"{BOTH}, int8" not in marked_titles(build({DP: MADE[DP], BOTH: worse}))
    for other in ({"unit": "client", "trust": "central"}, {"unit": "patient"}, {"trust": "distributed"}):
        assert f"{BOTH}, int8" in marked_titles(build({DP: MADE[DP], BOTH: replace(worse, **other)}))
    assert f"{PLAIN}, int8" not in marked_titles(
        build({DP: replace(MADE[PLAIN], epsilon=7.96), PLAIN: replace(MADE[PLAIN], auroc=0.9)})
    ), "any guarantee is better than none"


def test_threatened_configurations_compete_with_each_other():
    made = {label: replace(MADE[label], threat="label_flip") for label in (PLAIN, PGD)}
    assert f"{PLAIN}, int8" in marked_titles(build(made))


def test_at_or_below_the_majority_class_is_not_robust():
    rows = configuration_rows(build())
    by = headline(rows)
    scores = {row.title: robust_score(row, by) for row in rows}
    assert scores[f"{CONSTANT}, fp32"] == 0
    assert scores[f"{PLAIN}, fp32"] == 0
    assert scores[f"{PGD}, fp32"] > 0.625
