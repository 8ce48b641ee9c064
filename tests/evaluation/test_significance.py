import numpy as np
import pytest
from scipy.stats import binom

from trilemma.evaluation.significance import all_from_one, beyond_a_point, p_value


@pytest.mark.parametrize(("n", "fewest"), [(32, 3), (64, 4), (256, 8)])
def test_more_than_a_point_is_an_exact_binomial_test(n, fewest):
    """The numbers of the docstring; from the sum of the probabilities themselves."""
    below = sum(binom.pmf(k, n, 0.01) for k in range(fewest))
    assert 1 - below < 0.01 <= 1 - below + binom.pmf(fewest - 1, n, 0.01)
    assert beyond_a_point(fewest, n)
    assert not beyond_a_point(fewest - 1, n)
    assert not beyond_a_point(0, n)


def test_the_probability_that_the_farthest_are_all_of_one_group():
    g = np.random.default_rng(0)
    order = g.random((20000, 16)).argsort(1)
    share = (order[:, -3:] < 8).all(1).mean()  # the three largest of 8 + 8
    assert all_from_one(8, 3) == pytest.approx(share, abs=0.01)
    assert all_from_one(64, 7) < 0.01


def test_how_a_probability_is_written():
    assert (p_value(0.0004), p_value(0.0123), p_value(1.0)) == ("p < .001", "p = .012", "p = 1.000")
