"""A training objective in two halves, so that any of them can be clipped per record."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trilemma.models.classifier import Classifier


def hard(x_BCHW: Tensor, y_B: Tensor) -> Tensor:
    """Returns the labels as they are: what the loss of a training without a teacher looks at."""
    return y_B


class Objective(NamedTuple):
    """What a training step minimises, one loss per record.

    The crafting of adversarial images stands apart from the loss, so that a per-record gradient engine sees one
    forward pass over plain images: no attack runs inside its hooks. Each record's views depend on that record and
    the current weights only, which is what lets DP-SGD keep its guarantee (docs/guarantees.md).

    Attributes:
        views: (classifier, x_BCHW, y_B, generator) -> x_BVCHW: the V images that the loss of a record looks at.
        loss: (logits_BVK, what `targets` returned) -> loss_B.
        targets: (x_BCHW, y_B) -> what the loss takes the images for, before they are attacked: the labels y_B, or
            shares of the classes p_BK, which a record's own image and label decide and no other record.
    """

    views: Callable[[Classifier, Tensor, Tensor, torch.Generator], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    targets: Callable[[Tensor, Tensor], Tensor] = hard
