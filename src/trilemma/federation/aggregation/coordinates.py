"""Rules that look at every coordinate by itself: no attacker's value can be farther out than an honest one's."""

import torch
from torch import Tensor

from trilemma.federation.aggregation.updates import Updates


def coordinate_median(updates: Updates) -> Tensor:
    """Returns the median of every coordinate, of an even number of rows the mean of the two in the middle.

    Requirement: 2 f < n. Cost: O(n log n p). References: Yin et al. (2018), Definition 1.
    """
    return updates.by_columns(_median)


def trimmed_mean(updates: Updates, num_byzantine: int) -> Tensor:
    """Returns the mean of every coordinate without its `num_byzantine` largest and smallest values.

    Requirement: 2 f < n. Cost: O(n log n p). References: Yin et al. (2018), Definition 2.
    """
    low, high = num_byzantine, len(updates) - num_byzantine
    return updates.by_columns(lambda block_Kc: block_Kc.sort(dim=0).values[low:high].mean(dim=0))


def mean_around_median(updates: Updates, num_kept: int) -> Tensor:
    """Returns the mean of the `num_kept` values of every coordinate that are nearest to its median: Bulyan's last step.

    Cost: O(n log n p). References: El Mhamdi et al. (2018), Algorithm 1.
    """

    def around(block_Kc: Tensor) -> Tensor:
        away_Kc = (block_Kc - _median(block_Kc)).abs()
        nearest_kc = away_Kc.argsort(dim=0, stable=True)[:num_kept]
        return block_Kc.gather(0, nearest_kc).mean(dim=0)

    return updates.by_columns(around)


def robust_learning_rate(updates: Updates, weights_N: Tensor, threshold: int) -> Tensor:
    """Returns the weighted mean, turned round in every coordinate on whose sign fewer rows agree than a threshold.

    A backdoor moves coordinates that the honest do not care about, and there their signs are at odds.

    Requirement: f < threshold <= n. Cost: O(n p). References: Ozdayi et al. (2021), section 4, equation 2: agreement is
    the absolute sum of signs.

    Args:
        updates: The rows.
        weights_N: Of the mean.
        threshold: Rows, at least 1.
    """
    weights_K = weights_N.to(updates.matrix_NP)

    def turned(block_Kc: Tensor) -> Tensor:
        agreed_c = block_Kc.sign().sum(dim=0).abs() >= threshold
        mean_c = weights_K @ block_Kc
        return torch.where(agreed_c, mean_c, -mean_c)

    return updates.by_columns(turned)


def _median(block_Kc: Tensor) -> Tensor:
    ordered_Kc = block_Kc.sort(dim=0).values
    num_rows = len(ordered_Kc)
    return (ordered_Kc[(num_rows - 1) // 2] + ordered_Kc[num_rows // 2]) / 2
