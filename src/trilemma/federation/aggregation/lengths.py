"""Rules that shorten updates, or trust them as far as they agree with one that the server made itself."""

import torch
from torch import Tensor

from trilemma.federation.aggregation.updates import Updates, length

#: An update below this share of the server's own length is trusted by nobody.
SHORTEST = 1e-9


def norm_clipping(updates: Updates, weights_N: Tensor, bound: float) -> Tensor:
    """Returns the weighted mean of the rows, each shortened to a length.

    No row moves the result by more than its weight times twice the bound.

    Cost: O(n p). References: Sun et al. (2019), section 4.

    Args:
        updates: The rows.
        weights_N: Of the mean.
        bound: Greatest length of a row, in the units of an update.
    """
    return updates.combined(weights_N.double() * _shortened(updates.norms(), bound))


def centred_clipping(updates: Updates, weights_N: Tensor, start_P: Tensor, radius: float, steps: int = 1) -> Tensor:
    """Returns a point that the rows pull from where it was, each by no more than a radius.

    Requirement: f < n / 10 for its proof; it degrades slowly beyond. Cost: O(n p) for each step. References:
    Karimireddy et al. (2021), Algorithm 2.

    Args:
        updates: The rows.
        weights_N: Of their pulls.
        start_P: The result of the round before, or zeros.
        radius: The paper's tau, in the units of an update.
        steps: Iterations.
    """
    weights_K, point_P = weights_N.double(), start_P
    for _ in range(steps):
        pulls_K = weights_K * _shortened(updates.norms(point_P), radius)
        point_P = updates.combined(pulls_K).add_(point_P, alpha=1 - float(pulls_K.sum()))
    return point_P


def fltrust(updates: Updates, root_P: Tensor) -> Tensor:
    """Returns the mean of the rows, as long as the server's own update and trusted as far as they point its way.

    A row is weighted by its cosine with the server's update, and not at all where that is negative. Where no row is
    trusted, or the server's update is zero, the result is zero.

    Requirement: public images whose update points where honest ones do; f < n. Cost: O(n p). References: Cao et al.
    (2021), Algorithm 2.

    Args:
        updates: The rows.
        root_P: The server's own update, made on images that it holds.
    """
    root = length(root_P)
    norms_K, dots_K = updates.norms_and_dots(root_P)
    scale_K = torch.where(norms_K > 0, root / norms_K, 0.0)
    told_K = norms_K > SHORTEST * root  # of a shorter one nothing but rounding would be left at that length
    scale_K = torch.where(told_K, scale_K, 0.0)
    trust_K = (
        torch.where(told_K & (norms_K * root > 0), dots_K / (norms_K * root), 0.0).nan_to_num(nan=0.0).clamp(0.0, 1.0)
    )
    total = float(trust_K.sum())
    return updates.combined(trust_K * scale_K / total if total > 0 else torch.zeros_like(trust_K))


def _shortened(norms_K: Tensor, bound: float) -> Tensor:
    """Returns by which factor each row is shortened to a length; 1 for shorter ones."""
    return torch.where(norms_K > bound, bound / norms_K, 1.0)
