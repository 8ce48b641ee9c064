"""Gradients with respect to images, from a classifier that is left exactly as it was found."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trilemma.models.classifier import Classifier

#: (logits_BK, y_B) -> loss_B
RecordLoss = Callable[[Tensor, Tensor], Tensor]


class InputGradient(NamedTuple):
    """How each image's loss grows, and the loss itself.

    Attributes:
        gradient_BCHW: Gradient of each record's loss with respect to its own image.
        loss_B: The loss at the image.
    """

    gradient_BCHW: Tensor
    loss_B: Tensor


@contextmanager
def frozen(classifier: Classifier) -> Iterator[Classifier]:
    """Puts a classifier into evaluation mode with parameters that need no gradient, and restores it exactly.

    Within the block batch-norm statistics stay as they are, dropout is off and a backward pass costs nothing for
    the parameters. Every module's own training flag and every parameter's own `requires_grad` come back after it,
    also after an error; `.grad` is never touched. Blocks may be nested.
    """
    training = [(module, module.training) for module in classifier.modules()]
    trainable = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    try:
        classifier.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield classifier
    finally:
        for module, flag in training:
            module.training = flag
        for parameter in trainable:
            parameter.requires_grad_(True)


def input_gradient(classifier: Classifier, x_BCHW: Tensor, y_B: Tensor, loss: RecordLoss) -> InputGradient:
    """Returns the gradient of each record's loss with respect to its image, and the loss.

    One forward pass and one backward pass to the images; call it within `frozen`. No graph is kept.

    Args:
        classifier: The classifier under attack.
        x_BCHW: Images in [0, 1].
        y_B: Labels.
        loss: (logits_BK, y_B) -> loss_B.
    """
    logits_BK, gradient_BCHW = logits_and_gradient(classifier, x_BCHW, y_B, loss)
    return InputGradient(gradient_BCHW, loss(logits_BK, y_B))


def logits_and_gradient(classifier: Classifier, x_BCHW: Tensor, y_B: Tensor, loss: RecordLoss) -> tuple[Tensor, Tensor]:
    """Returns (logits_BK, gradient_BCHW), both detached; see `input_gradient`."""
    with torch.enable_grad():
        x_BCHW = x_BCHW.detach().requires_grad_(True)
        logits_BK = classifier(x_BCHW)
        (gradient_BCHW,) = torch.autograd.grad(loss(logits_BK, y_B).sum(), x_BCHW)
    return logits_BK.detach(), gradient_BCHW


def cross_entropy(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Returns the cross entropy of each record, shape (B,)."""
    return F.cross_entropy(logits_BK, y_B, reduction="none")


def margin(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Returns the largest wrong logit minus the true one, shape (B,); above 0 means misclassified.

    Unlike the cross entropy it does not saturate where the model is very sure (Carlini and Wagner, 2017, their
    objective f6 without the floor).
    """
    true_B1 = logits_BK.gather(1, y_B[:, None])
    others_BK = logits_BK.scatter(1, y_B[:, None], -torch.inf)
    return (others_BK.amax(dim=1, keepdim=True) - true_B1).squeeze(1)
