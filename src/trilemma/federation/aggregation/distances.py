"""Rules that look at how far whole updates lie from each other."""

import torch
from torch import Tensor

from trilemma.federation.aggregation.coordinates import mean_around_median
from trilemma.federation.aggregation.updates import Updates

#: Scores that differ by less than this share of themselves are equal: they are made of rounded distances.
SAME_SCORE = 1e-5

#: Steps towards the geometric median, at most, and by how much of the spread a step must still move it.
MEDIAN_STEPS, MEDIAN_TOLERANCE = 200, 1e-7
#: Distances below this share of the typical one count as this, so that a step is defined on a row itself; rows beyond
#: so many typical distances are left out.
MEDIAN_SMOOTHING, MEDIAN_REACH = 1e-6, 1e6


def krum(updates: Updates, num_byzantine: int) -> Tensor:
    """Returns the row whose n - f - 2 nearest other rows are nearest to it.

    Requirement: 2 f + 2 < n. Cost: one product of n x p by p x n. References: Blanchard et al. (2017), section 4.
    """
    distances_KK = updates.squared_distances()
    best = _best(krum_scores(distances_KK, num_byzantine), distances_KK)
    return updates.combined(_indicator(torch.tensor([best]), updates))


def multi_krum(updates: Updates, num_byzantine: int, num_kept: int | None = None) -> Tensor:
    """Returns the mean of the rows with the lowest scores of Krum.

    Requirement: 2 f + 2 < n. Cost: one product of n x p by p x n. References: Blanchard et al. (2017), section 5.

    Args:
        updates: The rows.
        num_byzantine: f.
        num_kept: Rows of the mean; None keeps n - f.
    """
    scores_K = krum_scores(updates.squared_distances(), num_byzantine)
    kept = len(updates) - num_byzantine if num_kept is None else num_kept
    return updates.combined(_indicator(scores_K.argsort(stable=True)[:kept], updates))


def bulyan(updates: Updates, num_byzantine: int) -> Tensor:
    """Returns the mean around the median of rows that Krum chooses one after another.

    n - 2 f rows are chosen, each the best of those that are left; of every coordinate the n - 4 f values nearest to
    their median enter the mean.

    Requirement: 4 f + 3 <= n. Cost: one product of n x p by p x n, and O(n log n p). References: El Mhamdi et al.
    (2018), Algorithm 1.
    """
    distances_KK, left = updates.squared_distances(), list(range(len(updates)))
    chosen: list[int] = []
    while len(chosen) < len(updates) - 2 * num_byzantine:
        index_L = torch.tensor(left, device=distances_KK.device)
        among_LL = distances_KK[index_L][:, index_L]
        chosen.append(left.pop(_best(krum_scores(among_LL, num_byzantine), among_LL)))
    of_chosen_LK = torch.eye(len(updates), device=distances_KK.device)[sorted(chosen)]
    return mean_around_median(updates.mixed(of_chosen_LK), len(updates) - 4 * num_byzantine)


def krum_scores(distances_KK: Tensor, num_byzantine: int) -> Tensor:
    """Returns the sum of each row's squared distances to its n - f - 2 nearest others, at least 1 of them."""
    num_rows = len(distances_KK)
    others_KK = distances_KK + torch.diag(torch.full((num_rows,), torch.inf, dtype=distances_KK.dtype).to(distances_KK))
    num_near = max(1, num_rows - num_byzantine - 2)
    return others_KK.sort(dim=1).values[:, : min(num_near, num_rows - 1)].sum(dim=1)


def geometric_median(updates: Updates, weights_N: Tensor) -> Tensor:
    """Returns the point with the least weighted sum of distances to the rows, to a smoothing of 1e-6 of the distances.

    Every step is a mixture of the rows, so that all of them are made of their distances alone.

    Requirement: 2 f < n. Cost: one product of n x p by p x n. References: Pillutla et al. (2022), Algorithm 2 (the
    smoothed Weiszfeld algorithm).
    """
    return updates.combined(geometric_median_weights(updates.squared_distances(), weights_N))


def geometric_median_weights(distances_KK: Tensor, weights_K: Tensor) -> Tensor:
    """Returns the mixture of the rows that is their geometric median, from squared distances."""
    middle = len(distances_KK) // 2  # of a row's distances, the first of which is 0, to itself: over half of the rows
    typical_K = distances_KK.sqrt().sort(dim=1).values[:, middle]
    spread = float(typical_K.sort().values[(len(typical_K) - 1) // 2])
    # Where most rows coincide they are the median. Beside rows that are still farther no digit of the others is left.
    near_K = typical_K <= MEDIAN_REACH * spread
    weights_K = torch.where(near_K, weights_K.to(distances_KK), 0.0)
    mixture_K = weights_K / weights_K.sum()
    if spread == 0:
        return mixture_K
    distances_KK = torch.where(near_K[:, None] & near_K[None, :], distances_KK, 0.0)
    for _ in range(MEDIAN_STEPS):
        # |x_i - sum_j m_j x_j|^2 = (D m)_i - m D m / 2 for shares m that sum to 1.
        to_rows_K = distances_KK @ mixture_K
        squares_K = (to_rows_K - mixture_K @ to_rows_K / 2).clamp(min=0.0)
        pulled_K = weights_K / squares_K.sqrt().clamp(min=MEDIAN_SMOOTHING * spread)
        following_K = pulled_K / pulled_K.sum()
        moved = float((following_K - mixture_K).abs().sum())
        mixture_K = following_K
        if moved < MEDIAN_TOLERANCE:
            break
    return mixture_K


def _best(scores_K: Tensor, distances_KK: Tensor) -> int:
    """Returns the row with the lowest score, of equal ones the one that is nearest to all others.

    Two rows that are nearest to each other have one score where a score has one term, and their order must not matter.
    """
    equal_K = scores_K <= scores_K.min() * (1 + SAME_SCORE)
    return int(torch.where(equal_K, distances_KK.sum(dim=1), torch.inf).argmin())


def _indicator(index_L: Tensor, updates: Updates) -> Tensor:
    """Returns equal shares of some rows and none of the others."""
    shares_K = torch.zeros(len(updates), dtype=torch.float64, device=updates.matrix_NP.device)
    shares_K[index_L] = 1 / len(index_L)
    return shares_K
