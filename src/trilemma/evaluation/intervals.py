"""95 % intervals: Wilson's for shares, the bootstrap's for everything else, both over patients.

Images of one patient resemble each other, so they are no independent evidence; both kinds of interval treat the
patient as the unit. Where every record is its own unit they are the ordinary intervals over records.
"""

import math

import numpy as np
from numpy.typing import NDArray

from trilemma.evaluation.metrics import Floats, Integers

REPLICATES = 1000
#: Standard normal quantile of a two-sided 95 % interval.
Z = 1.959963984540054


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Returns Wilson's (1927) score interval for a share, within [0, 1].

    Args:
        successes: Between 0 and n; a fraction where n is an effective number of records.
        n: Number of records, positive.

    Raises:
        ValueError: Where the counts are impossible.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"Wilson's interval needs 0 <= successes <= n and n > 0, not {successes} of {n}.")
    share = successes / n
    centre = share + Z**2 / (2 * n)
    reach = Z * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    low, high = (centre - reach) / (1 + Z**2 / n), (centre + reach) / (1 + Z**2 / n)
    return (0.0 if successes == 0 else max(low, 0.0), 1.0 if successes == n else min(high, 1.0))


def share_interval(success_N: NDArray[np.bool_], units_N: Integers) -> tuple[float, float]:
    """Returns Wilson's interval for the share of successes, with the effective number of records.

    That number is what independent records with the same variance of the share would be (Kish, 1965): the number of
    records divided by the design effect, never more than the records. Where all records agree, the variance says
    nothing and every unit counts once.

    Args:
        success_N: At least one record.
        units_N: The patient of every record.
    """
    n = len(success_N)
    share = float(success_N.mean())
    _, unit_N = np.unique(units_N, return_inverse=True)
    num_units = int(unit_N.max()) + 1
    if num_units == n:
        return wilson(int(success_N.sum()), n)
    effective = float(num_units)
    if 0 < share < 1 and num_units > 1:
        residual_U = np.bincount(unit_N, weights=success_N - share)
        variance = num_units / (num_units - 1) * float((residual_U**2).sum()) / n**2
        effective = min(share * (1 - share) / variance, n) if variance > 0 else float(n)
    return wilson(share * effective, effective)


def bootstrap_weights(units_N: Integers, replicates: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """Returns how often each record was drawn when units are drawn with replacement: weights_RN.

    Args:
        units_N: The patient of every record, N at least 1; all records of a patient get the same weight.
        replicates: R, the number of draws.
        generator: Where the draws come from.
    """
    _, unit_N = np.unique(units_N, return_inverse=True)
    num_units = int(unit_N.max()) + 1
    weights_RU = np.empty((replicates, num_units), dtype=np.float32)
    for replicate in range(replicates):
        weights_RU[replicate] = np.bincount(generator.integers(num_units, size=num_units), minlength=num_units)
    return weights_RU[:, unit_N]


def percentile_interval(values_R: Floats) -> tuple[float, float] | None:
    """Returns the middle 95 % of bootstrap values, or None where more than half of them are undefined."""
    defined = values_R[np.isfinite(values_R)]
    if 2 * len(defined) < len(values_R) or not len(defined):
        return None
    low, high = np.quantile(defined, (0.025, 0.975))
    return float(low), float(high)
