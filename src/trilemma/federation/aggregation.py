"""From the clients' updates to one: rules over an N x P matrix of changes of the trainable parameters."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Aggregation(NamedTuple):
    """A rule closed over its numbers.

    Attributes:
        apply: (updates_NP, weights_N) -> update_P. Weights are the server's own, positive, and sum to 1.
        sensitivity: (clip, n) -> largest move of the result when one row of norm <= clip is replaced, or None
            where no bound is known and central noise can promise nothing.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    sensitivity: Callable[[float, int], float | None]


def mean() -> Aggregation:
    """Returns the weighted mean: the row order is irrelevant; one row moves it without bound.

    Sensitivity: 2 clip / n for equal weights. Cost: O(n p). References: McMahan et al. (2017), Algorithm 1.
    """
    return Aggregation(
        apply=lambda updates_NP, weights_N: weights_N.to(updates_NP) @ updates_NP,
        sensitivity=lambda clip, n: 2 * clip / n,
    )
