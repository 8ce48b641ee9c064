"""A training objective in two halves, so that any of them can be clipped per record."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trilemma.models.classifier import Classifier


class Objective(NamedTuple):
    """What a training step minimises, one loss per record.

    The crafting of adversarial images stands apart from the loss, so that a per-record gradient engine sees one
    forward pass over plain images: no attack runs inside its hooks. Each record's views depend on that record and
    the current weights only, which is what lets DP-SGD keep its guarantee (docs/guarantees.md).

    Attributes:
        views: (classifier, x_BCHW, y_B, generator) -> x_BVCHW: the V images that the loss of a record looks at.
        loss: (logits_BVK, y_B) -> loss_B.
    """

    views: Callable[[Classifier, Tensor, Tensor, torch.Generator], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
