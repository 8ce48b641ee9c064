"""Gradients with respect to images, from a classifier that is left exactly as it was found."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trilemma.models.classifier import Classifier


@contextmanager
def frozen(classifier: Classifier) -> Iterator[Classifier]:
    """Puts a classifier into evaluation mode with parameters that need no gradient, and restores it exactly.

    Within the block batch-norm statistics stay as they are, dropout is off and a backward pass costs nothing for
    the parameters. Hooks on modules' backward passes are not called: they belong to whoever trains, and a per-record
    gradient engine would take an attack's pass for its own. Hooks on forward passes are called, for they may be part of
    what the network computes, as a pruning mask is; they find modules in evaluation mode. Every module's own training
    flag and hooks and every parameter's own `requires_grad` come back after it, also after an error; `.grad` is never
    touched. Blocks may be nested, and a graph that was made before one can be followed backwards after it.
    """
    hooked = [
        (module, module._backward_hooks, module._backward_pre_hooks)
        for module in classifier.modules()
        if module._backward_hooks or module._backward_pre_hooks
    ]
    training = [(module, module.training) for module in classifier.modules()]
    trainable = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    try:
        classifier.eval()
        for module, _, _ in hooked:
            module._backward_hooks, module._backward_pre_hooks = OrderedDict(), OrderedDict()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield classifier
    finally:
        for module, flag in training:
            module.training = flag
        for module, after, before in hooked:
            module._backward_hooks, module._backward_pre_hooks = after, before
        for parameter in trainable:
            parameter.requires_grad_(True)


def logits_and_gradient(
    classifier: Classifier, x_BCHW: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Returns the logits and the gradient of each record's loss with respect to its own image, both detached.

    One forward pass and one backward pass to the images; call it within `frozen`. No graph is kept.

    Args:
        classifier: The classifier under attack.
        x_BCHW: Images in [0, 1].
        loss: logits_BK -> loss_B.
    """
    with torch.enable_grad():
        x_BCHW = x_BCHW.detach().requires_grad_(True)
        logits_BK = classifier(x_BCHW)
        (gradient_BCHW,) = torch.autograd.grad(loss(logits_BK).sum(), x_BCHW)
    return logits_BK.detach(), gradient_BCHW


def logits_and_jacobian(
    classifier: Classifier, x_BCHW: Tensor, values: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Returns the logits and the gradients of several values of each record with respect to its own image, detached.

    One forward pass and T backward passes to the images; call it within `frozen`. No graph is kept.

    Args:
        classifier: The classifier under attack.
        x_BCHW: Images in [0, 1].
        values: logits_BK -> values_BT.

    Returns:
        logits_BK: The logits.
        jacobian_BTCHW: The gradient of each value.
    """
    with torch.enable_grad():
        x_BCHW = x_BCHW.detach().requires_grad_(True)
        logits_BK = classifier(x_BCHW)
        sums_T = values(logits_BK).sum(dim=0)
        rows = [torch.autograd.grad(sums_T[t], x_BCHW, retain_graph=t + 1 < len(sums_T))[0] for t in range(len(sums_T))]
    return logits_BK.detach(), torch.stack(rows, dim=1)
