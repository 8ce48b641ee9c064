import math

import pytest
from builder import rate
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t, ttest_rel

from trilemma.evaluation.measurement import Measurement
from trilemma.report.estimates import Estimate, difference, estimate, exact


def test_one_seed_keeps_the_measurements_own_interval():
    m = rate("accuracy", 0.8)
    found = estimate([(3, m)])
    assert (found.value, found.low, found.high, found.sd) == (m.value, m.low, m.high, None)
    assert found.by_seed == ((3, 0.8),)


def test_several_seeds_get_the_t_interval():
    values = [0.70, 0.80, 0.93]
    found = estimate([(i, Measurement("accuracy", v, v - 1e-4, v + 1e-4, 10**8)) for i, v in enumerate(values)])
    mean, sd = sum(values) / 3, (sum((v - 0.81) ** 2 for v in values) / 2) ** 0.5
    half = t.ppf(0.975, 2) * sd / math.sqrt(3)
    assert found.value == pytest.approx(mean)
    assert found.low == pytest.approx(mean - half)
    assert found.high == 1.0, "an accuracy does not exceed 1"
    assert mean + half > 1


def test_seeds_that_agree_do_not_narrow_the_interval():
    one = rate("accuracy", 0.8)
    found = estimate([(0, one), (1, one)])
    assert (found.low, found.high) == (pytest.approx(one.low), pytest.approx(one.high))


def test_hospitals_of_one_seed_are_averaged_before_seeds():
    samples = [(0, rate("accuracy", 0.6)), (0, rate("accuracy", 0.8)), (1, rate("accuracy", 0.9))]
    assert estimate(samples).by_seed == ((0, pytest.approx(0.7)), (1, 0.9))
    assert estimate(samples).value == pytest.approx(0.8)


def test_missing_is_not_zero():
    undefined = Measurement("auroc", None, status="undefined", reason="one class only")
    assert estimate([(0, undefined)]) == Estimate(reason="one class only")
    partly = estimate([(0, undefined), (1, rate("auroc", 0.9))])
    assert partly.value == 0.9
    assert partly.reason == "1 of 2 trainings have no value: one class only"
    assert estimate([]).value is None
    assert estimate([(0, Measurement("auroc", math.nan))]).value is None
    assert exact([]).value is None


def test_a_paired_difference_is_the_paired_t_test():
    first = Estimate(0.5, 0.4, 0.6, n=10**9, by_seed=((0, 0.50), (1, 0.61), (2, 0.57)))
    second = Estimate(0.4, 0.3, 0.5, n=10**9, by_seed=((0, 0.41), (1, 0.55), (2, 0.50)))
    found = difference(first, second)
    oracle = ttest_rel([0.50, 0.61, 0.57], [0.41, 0.55, 0.50]).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(oracle.low), pytest.approx(oracle.high))


def test_equal_seeds_do_not_prove_a_difference_of_two_images():
    first = Estimate(0.802, 0.8, 0.81, n=624, by_seed=((0, 0.802), (1, 0.802)))
    second = Estimate(0.8, 0.79, 0.81, n=624, by_seed=((0, 0.8), (1, 0.8)))
    assert not difference(first, second).shown
    far = Estimate(0.7, 0.69, 0.71, n=624, by_seed=((0, 0.7), (1, 0.7)))
    assert difference(first, far).shown


def test_without_common_seeds_intervals_are_squared_and_added():
    # Newcombe (1998), table II, 56/70 against 48/80, method 10: 0.0524 to 0.3339.
    first, second = 56 / 70, 48 / 80
    a = Estimate(first, 0.6918, 0.8770, n=70, by_seed=((0, first),))
    b = Estimate(second, 0.4904, 0.7003, n=80, by_seed=((1, second),))
    found = difference(a, b)
    assert (found.low, found.high) == (pytest.approx(0.0524, abs=2e-4), pytest.approx(0.3339, abs=2e-4))


def test_no_difference_with_what_is_missing():
    assert difference(Estimate(), Estimate(0.5)) is None
    assert not difference(Estimate(0.9), Estimate(0.5)).shown


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5), st.integers(1, 1000))
def test_differences_are_antisymmetric_and_hold_their_value(pairs, n):
    a = estimate(
        [(i, Measurement("accuracy", x, max(0, x - 0.1), min(1, x + 0.1), n)) for i, (x, _) in enumerate(pairs)]
    )
    b = estimate(
        [(i, Measurement("accuracy", y, max(0, y - 0.1), min(1, y + 0.1), n)) for i, (_, y) in enumerate(pairs)]
    )
    there, back = difference(a, b), difference(b, a)
    assert there.value == pytest.approx(-back.value)
    assert there.low == pytest.approx(-back.high)
    assert there.low - 1e-12 <= there.value <= there.high + 1e-12
    assert not difference(a, a).shown
    assert 0 <= a.low <= a.value + 1e-12
    assert a.value - 1e-12 <= a.high <= 1
