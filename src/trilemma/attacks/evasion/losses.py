"""What an attack climbs: one loss per record, higher where the model is closer to erring.

The cross entropy saturates where a model is very sure; the margin does not, but grows with the logits; the difference
of logits ratio does neither, and needs three classes. A targeted loss is higher where the model is closer to one
wrong class.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, inf
from torch.nn import functional as F

#: (logits_BK, y_B) -> loss_B
RecordLoss = Callable[[Tensor, Tensor], Tensor]
LossName = Literal["cross_entropy", "margin"]


def record_loss(name: LossName) -> RecordLoss:
    """Returns the loss of a name."""
    return margin if name == "margin" else cross_entropy


def cross_entropy(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Returns the cross entropy of each record, shape (B,)."""
    return F.cross_entropy(logits_BK, y_B, reduction="none")


def margin(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Returns the largest wrong logit minus the true one, shape (B,); above 0 means misclassified.

    Unlike the cross entropy it does not saturate where the model is very sure (Carlini and Wagner, 2017, their
    objective f6 without the floor).
    """
    true_B1 = logits_BK.gather(1, y_B[:, None])
    others_BK = logits_BK.scatter(1, y_B[:, None], -inf)
    return (others_BK.amax(dim=1, keepdim=True) - true_B1).squeeze(1)


def targeted_margin(logits_BK: Tensor, y_B: Tensor, target_B: Tensor) -> Tensor:
    """Returns the target's logit minus the true one, shape (B,); above 0 means misclassified."""
    return (logits_BK.gather(1, target_B[:, None]) - logits_BK.gather(1, y_B[:, None])).squeeze(1)


def dlr(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Returns the difference of logits ratio, shape (B,); above 0 means misclassified.

    The margin over the distance between the largest and the third largest logit, which shifting or scaling all logits
    leaves as it is (Croce and Hein, 2020, equation 6). Needs at least three classes.
    """
    ordered_BK = logits_BK.sort(dim=1, descending=True).values
    return margin(logits_BK, y_B) / (ordered_BK[:, 0] - ordered_BK[:, 2] + 1e-12)


def targeted_dlr(logits_BK: Tensor, y_B: Tensor, target_B: Tensor) -> Tensor:
    """Returns the targeted difference of logits ratio, shape (B,); above 0 means misclassified.

    The targeted margin over the distance between the largest logit and the mean of the third and fourth largest
    (Croce and Hein, 2020, equation 7). Needs at least four classes.
    """
    ordered_BK = logits_BK.sort(dim=1, descending=True).values
    span_B = ordered_BK[:, 0] - (ordered_BK[:, 2] + ordered_BK[:, 3]) / 2 + 1e-12
    return targeted_margin(logits_BK, y_B, target_B) / span_B


def likeliest_wrong(logits_BK: Tensor, y_B: Tensor, count: int) -> Tensor:
    """Returns the wrong classes with the largest logits, the largest first, shape (B, min(count, K - 1)).

    A logit that is not a number counts as the smallest; the true class is never among them.
    """
    smallest = torch.finfo(logits_BK.dtype).min
    finite_BK = logits_BK.nan_to_num(nan=smallest, posinf=-smallest, neginf=smallest)
    others_BK = finite_BK.scatter(1, y_B[:, None], -inf)
    ranked_BK = others_BK.sort(dim=1, descending=True, stable=True).indices
    return ranked_BK[:, : min(count, logits_BK.shape[1] - 1)]
