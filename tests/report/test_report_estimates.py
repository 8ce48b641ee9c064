import math

import numpy as np
import pytest
from builder import rate
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, t, ttest_rel

from trilemma.evaluation.intervals import share_interval
from trilemma.evaluation.measurement import Measurement
from trilemma.report.estimates import Estimate, averaged, difference, estimate, exact


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


def seeded(*values, single):
    """An estimate of several seeds; its own interval is irrelevant to a difference of common seeds."""
    mean = sum(values) / len(values)
    return Estimate(mean, 0.0, 1.0, n=624, by_seed=tuple(enumerate(values)), single=single)


def test_without_uncertainty_of_the_test_set_a_difference_is_the_paired_t_test():
    ours, theirs = [0.50, 0.61, 0.57], [0.41, 0.55, 0.50]
    first, second = (seeded(*v, single=(sum(v) / 3, sum(v) / 3)) for v in (ours, theirs))
    found, oracle = difference(first, second), ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(oracle.low), pytest.approx(oracle.high))
    assert found.num_pairs == 3


def test_where_seeds_agree_a_difference_has_newcombes_interval():
    # Newcombe (1998), table II, 56/70 against 48/80, method 10: 0.0524 to 0.3339.
    first = seeded(0.8, 0.8, single=(0.6918, 0.8770))
    second = seeded(0.6, 0.6, single=(0.4904, 0.7003))
    found = difference(first, second)
    assert (found.low, found.high) == (pytest.approx(0.0524, abs=2e-4), pytest.approx(0.3339, abs=2e-4))


def test_trainings_and_test_patients_add_by_squares():
    first = seeded(0.80, 0.84, single=(0.79, 0.86))
    second = seeded(0.70, 0.70, single=(0.68, 0.72))
    spread = t.ppf(0.975, 1) * 0.02 * math.sqrt(2) / math.sqrt(2)
    found = difference(first, second)
    assert found.value == pytest.approx(0.12)
    assert found.low == pytest.approx(0.12 - math.hypot(spread, 0.03, 0.02))
    assert found.high == pytest.approx(0.12 + math.hypot(spread, 0.04, 0.02))


def test_seeds_without_their_own_intervals_prove_nothing():
    found = difference(seeded(0.9, 0.9, single=None), seeded(0.5, 0.5, single=(0.4, 0.6)))
    assert (found.low, found.high, found.shown) == (None, None, False)


STUDIES = 400


def share_shown(rng, num_seeds, gap, patients_per_image=1.0):
    """The share of studies that show a difference between two methods whose true accuracies are `gap` apart.

    Some images are easy and some hard, for both methods alike or for one of them; all seeds see the same test set.
    """
    n, unit_size = 624, round(1 / patients_per_image)
    num_units = n // unit_size
    shown = 0
    for _ in range(STUDIES):
        common_N, *own_2N = np.repeat(rng.standard_normal((3, num_units)), unit_size, axis=1)
        estimates = []
        for own_N, shift in zip(own_2N, (gap / 2, -gap / 2), strict=True):
            strength_N = norm.cdf(3 * (0.5 * common_N + 0.75**0.5 * own_N) + math.sqrt(10) * norm.ppf(0.82 + shift))
            samples = []
            for seed in range(num_seeds):
                right_N = rng.random(len(strength_N)) < strength_N
                low, high = share_interval(right_N, np.arange(len(right_N)) // unit_size)
                samples.append((seed, Measurement("accuracy", float(right_N.mean()), low, high, len(right_N))))
            estimates.append(estimate(samples))
        shown += difference(*estimates).shown
    return shown / STUDIES


@pytest.mark.parametrize("num_seeds", [3, 8])
@pytest.mark.parametrize("patients_per_image", [1.0, 0.25])
def test_equal_methods_are_rarely_shown_to_differ(num_seeds, patients_per_image):
    # The test patients suit one of two equal methods by chance, the same one for every seed.
    rng = np.random.default_rng(num_seeds)
    assert share_shown(rng, num_seeds, gap=0.0, patients_per_image=patients_per_image) <= 0.06


def test_a_true_gap_of_eight_points_is_mostly_shown():
    assert share_shown(np.random.default_rng(0), num_seeds=3, gap=0.08) >= 0.6


def test_the_t_interval_alone_would_show_what_is_not_there():
    # Negative control of the simulation: were the test set's share left out, equal methods would often "differ".
    rng, false = np.random.default_rng(1), 0
    for _ in range(STUDIES):
        share_2N = norm.cdf(3 * rng.standard_normal((2, 624)) + math.sqrt(10) * norm.ppf(0.82))
        rates_2S = (rng.random((8, 2, 624)) < share_2N).mean(axis=2).T
        false += ttest_rel(*rates_2S).pvalue < 0.05
    assert false / STUDIES > 0.2


def test_the_mean_over_hospitals_keeps_seeds_and_intervals():
    first, second = seeded(0.8, 0.9, single=(0.7, 0.9)), seeded(0.6, 0.5, single=(0.5, 0.7))
    found = averaged([first, second])
    assert found.value == pytest.approx(0.7)
    assert found.by_seed == ((0, pytest.approx(0.7)), (1, pytest.approx(0.7)))
    assert found.single == (pytest.approx(0.6), pytest.approx(0.8))
    assert averaged([first, Estimate()]).value is None
    assert averaged([]).value is None


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
