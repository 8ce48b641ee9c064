import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from trilemma.evaluation.intervals import bootstrap_weights, percentile_interval, share_interval, wilson
from trilemma.randomness import numpy_generator


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 3000), data=st.data())
def test_wilson_agrees_with_scipy(n, data):
    successes = data.draw(st.integers(0, n))
    low, high = wilson(successes, n)
    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= low <= successes / n <= high <= 1


def test_wilson_has_the_published_values():
    # Newcombe (1998), Table I, method 3: 81/263, 15/148, 0/20 and 1/29.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ValueError, match="Wilson"):
        wilson(successes, n)


@settings(deadline=None, max_examples=30)
@given(success=st.lists(st.booleans(), min_size=1, max_size=60))
def test_records_that_are_their_own_units_get_the_ordinary_interval(success):
    success_N = np.array(success)
    assert share_interval(success_N, np.arange(len(success)) * 7) == wilson(int(success_N.sum()), len(success))


def test_identical_images_of_a_patient_count_once():
    rng = np.random.default_rng(0)
    success_U = rng.random(100) < 0.7
    repeated = share_interval(np.repeat(success_U, 10), np.repeat(np.arange(100), 10))
    once = share_interval(success_U, np.arange(100))
    assert repeated == pytest.approx(once, abs=0.002)
    naive = wilson(int(success_U.sum()) * 10, 1000)
    assert repeated[1] - repeated[0] > 2 * (naive[1] - naive[0])


def test_unanimous_records_count_their_units():
    assert share_interval(np.ones(40, dtype=bool), np.repeat(np.arange(10), 4)) == wilson(10, 10)
    assert share_interval(np.zeros(5, dtype=bool), np.zeros(5, dtype=int)) == wilson(0, 1)


@settings(deadline=None, max_examples=40)
@given(success=st.lists(st.booleans(), min_size=1, max_size=40), data=st.data())
def test_the_interval_always_holds_the_share(success, data):
    units = data.draw(st.lists(st.integers(0, 8), min_size=len(success), max_size=len(success)))
    low, high = share_interval(np.array(success), np.array(units))
    assert 0 <= low <= np.mean(success) + 1e-12 and np.mean(success) - 1e-12 <= high <= 1
    width = wilson(sum(success), len(success))
    assert high - low >= (width[1] - width[0]) - 1e-9  # correlated records never narrow it


def _coverage(interval, truth=0.8, units=60, trials=300):
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(trials):
        skill_U = rng.beta(4, 1, size=units)  # mean 0.8
        unit_N = np.repeat(np.arange(units), 5)
        success_N = rng.random(len(unit_N)) < skill_U[unit_N]
        low, high = interval(success_N, unit_N)
        hits += low <= truth <= high
    return hits / trials


def test_intervals_over_patients_cover_the_truth_and_intervals_over_images_do_not():
    assert 0.92 <= _coverage(share_interval) <= 0.985
    naive = _coverage(lambda success_N, _: wilson(int(success_N.sum()), len(success_N)))
    assert naive < 0.92  # the negative control: five images of a patient are not five patients


def test_the_bootstrap_covers_the_truth():
    def interval(success_N, unit_N):
        weights_RN = bootstrap_weights(unit_N, 200, np.random.default_rng(0))
        return percentile_interval(weights_RN @ success_N / weights_RN.sum(1))

    assert 0.89 <= _coverage(interval, trials=200) <= 0.985


def test_bootstrap_draws_whole_patients():
    units_N = np.array([5, 9, 5, 2, 9, 9])
    weights_RN = bootstrap_weights(units_N, 50, numpy_generator(0, "test"))
    assert weights_RN.shape == (50, 6)
    assert (weights_RN[:, 0] == weights_RN[:, 2]).all()
    assert (weights_RN[:, 1] == weights_RN[:, 4]).all() and (weights_RN[:, 4] == weights_RN[:, 5]).all()
    assert (weights_RN[:, [0, 1, 3]].sum(1) == 3).all()  # as many draws as patients
    assert len(np.unique(weights_RN, axis=0)) > 3


def test_without_patients_it_is_the_ordinary_bootstrap():
    weights_RN = bootstrap_weights(np.arange(300), 100, numpy_generator(0, "test"))
    assert (weights_RN.sum(1) == 300).all()
    rng = numpy_generator(0, "test")
    for row in weights_RN:
        np.testing.assert_array_equal(row, np.bincount(rng.integers(300, size=300), minlength=300))


def test_the_percentile_interval_ignores_a_few_undefined_values_but_not_most():
    values_R = np.arange(1001.0)
    assert percentile_interval(values_R) == (25.0, 975.0)
    some_R = np.r_[values_R, np.full(900, np.nan)]
    assert percentile_interval(some_R) == (25.0, 975.0)
    assert percentile_interval(np.r_[values_R, np.full(1002, np.nan)]) is None
    assert percentile_interval(np.array([])) is None
