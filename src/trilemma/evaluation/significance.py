"""The tests by which attacks, and answers, are told apart: exact, and all at one level."""

import math

from scipy.special import bdtrc as binomial_sf

#: Probability with which a test finds a difference although its null hypothesis holds, at most.
LEVEL = 0.01
#: Share of images on which two attacks, or a model and its twin, may differ for no reason that matters.
TOLERANCE = 0.01


def beyond_a_point(count: int, n: int) -> bool:
    """Returns whether `count` of n images are more than 1 % of all images can explain."""
    return bool(binomial_sf(count - 1, n, TOLERANCE) < LEVEL)


def all_from_one(m: int, k: int) -> float:
    """Returns the probability that the k largest of two exchangeable groups of m are all of the first."""
    return math.comb(2 * m - k, m) / math.comb(2 * m, m)


def p_value(probability: float) -> str:
    """Returns "p = .003", or "p < .001"."""
    return "p < .001" if probability < 0.001 else f"p = {probability:.3f}".replace("0.", ".")
