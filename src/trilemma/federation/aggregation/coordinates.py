"""Rules that look at every coordinate by itself: no attacker's value can be farther out than an honest one's."""

import numpy as np
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
    return updates.by_columns(lambda block_Kc: ordered(block_Kc)[:, low:high].mean(dim=1))


def mean_around_median(updates: Updates, num_kept: int) -> Tensor:
    """Returns the mean of the `num_kept` values of every coordinate that are nearest to its median: Bulyan's last step.

    Cost: O(n log n p). References: El Mhamdi et al. (2018), Algorithm 1.
    """

    def around(block_Kc: Tensor) -> Tensor:
        # The nearest to the median stand side by side in order: the first place from which the next value to the right
        # is farther from the median than the leftmost one is theirs.
        ordered_cK = ordered(block_Kc)
        median_c1 = _middle(ordered_cK)[:, None]
        num_places = ordered_cK.shape[1] - num_kept + 1
        left_cS = median_c1 - ordered_cK[:, : num_places - 1]
        right_cS = ordered_cK[:, num_kept:] - median_c1
        first_c = (left_cS > right_cS).sum(dim=1)
        index_ck = first_c[:, None] + torch.arange(num_kept, device=first_c.device)
        return ordered_cK.gather(1, index_ck).mean(dim=1)

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
    ones_K = torch.ones_like(weights_K)

    def turned(block_Kc: Tensor) -> Tensor:
        agreed_c = (ones_K @ block_Kc.sign()).abs() >= threshold
        mean_c = weights_K @ block_Kc
        return torch.where(agreed_c, mean_c, -mean_c)

    return updates.by_columns(turned)


def ordered(block_Kc: Tensor) -> Tensor:
    """Returns the values of every coordinate in ascending order, (c, K).

    NumPy sorts short rows with vector instructions, twelve times as fast as PyTorch does on a CPU.
    """
    if block_Kc.device.type != "cpu":
        return block_Kc.T.sort(dim=1).values
    values_cK = np.array(block_Kc.numpy().T, order="C")
    values_cK.sort(axis=1)
    return torch.from_numpy(values_cK)


def _median(block_Kc: Tensor) -> Tensor:
    return _middle(ordered(block_Kc))


def _middle(ordered_cK: Tensor) -> Tensor:
    num_rows = ordered_cK.shape[1]
    return (ordered_cK[:, (num_rows - 1) // 2] + ordered_cK[:, num_rows // 2]) / 2
