"""Clipped gradient sums, one gradient for each record: the clear reference, by `torch.func`.

Every faster engine must agree with it. A record is whatever is protected as one: an image with its views, or all
images of a patient with all theirs. Sensitivity: adding or removing one record changes the sum by a vector of norm at
most the clipper's `clip`, because each record's gradient, over all its views and all layers, is bounded as one. A
gradient that is no finite number has no norm to clip and counts as zero: it must not show in the sum either.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from trilemma.models.classifier import Classifier
from trilemma.privacy.clipping_rules import Clipper, total_norms

#: (logits_BVK over the views of each record, labels y_B or, where views have labels of their own, y_BV) -> loss_B.
RecordLoss = Callable[[Tensor, Tensor], Tensor]

#: Per-record gradients held at once, in numbers (4 bytes each): bounds memory at any batch size.
MAX_GRADIENT_NUMBERS = 50_000_000

#: Images that are differentiated together at most: bounds the activations, which small networks on large images need.
MAX_CHUNK = 64


class ClippedSum(NamedTuple):
    """A sum of clipped per-record gradients.

    Attributes:
        sum_P: Over the batch, flat over trainable parameters in `named_parameters` order.
        norms_B: Norm of each record's gradient before clipping, over all groups.
        losses_B: Each record's loss.
        norms_BG: Norm of each group of each record's gradient before clipping, in the clipper's order.
    """

    sum_P: Tensor
    norms_B: Tensor
    losses_B: Tensor
    norms_BG: Tensor


def clipped_gradient_sum(
    classifier: Classifier, loss: RecordLoss, x_BVCHW: Tensor, y_B: Tensor, clipper: Clipper
) -> ClippedSum:
    """Returns the sum over records of their gradients, scaled as the clipper says; an empty batch gives zeros.

    Args:
        classifier: Its trainable parameters are differentiated; it must hold no batch-statistics layer.
        loss: Loss of each record over its views.
        x_BVCHW: The views of each record, crafted before: no attack runs in here.
        y_B: Labels; further dimensions, such as one label for each image of a record, reach the loss untouched.
        clipper: Bounds each record's gradient.
    """
    params = {name: p.detach() for name, p in classifier.named_parameters() if p.requires_grad}
    frozen = {name: p.detach() for name, p in classifier.named_parameters() if not p.requires_grad}
    frozen |= dict(classifier.named_buffers())
    num_params = sum(p.numel() for p in params.values())

    def record_loss(trainable: dict[str, Tensor], x_VCHW: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits_VK = functional_call(classifier, {**trainable, **frozen}, (x_VCHW,))
        record = loss(logits_VK[None], y[None])[0]
        return record, record.detach()

    per_record = vmap(grad(record_loss, has_aux=True), in_dims=(None, 0, 0), randomness="different")
    group_sizes = clipper.group_sizes(classifier)
    members = _members([p.numel() for p in params.values()], group_sizes)
    total_P = torch.zeros(num_params, device=y_B.device, dtype=x_BVCHW.dtype)
    norms, losses = [total_P.new_zeros(0, len(group_sizes))], [total_P.new_zeros(0)]
    chunk = max(1, min(MAX_CHUNK // max(1, x_BVCHW.shape[1]), MAX_GRADIENT_NUMBERS // max(1, num_params)))
    for x, y in zip(x_BVCHW.split(chunk), y_B.split(chunk), strict=True):
        if len(y) == 0:
            continue
        gradients, loss_B = per_record(params, x, y)
        flat = [gradients[name].flatten(1) for name in params]
        norm_BG = torch.stack([_norms([flat[i] for i in group]) for group in members], dim=1)
        sound_B = norm_BG.isfinite().all(1)
        if not sound_B.all():
            flat = [part.masked_fill(~sound_B[:, None], 0.0) for part in flat]
        weight_BG = clipper.weights(norm_BG)
        total_P += torch.cat([weight_BG[:, g] @ flat[i] for g, group in enumerate(members) for i in group])
        norms.append(norm_BG)
        losses.append(loss_B)
    norms_BG = torch.cat(norms)
    return ClippedSum(total_P, total_norms(norms_BG), torch.cat(losses), norms_BG)


def _norms(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.square().sum(1) for part in parts]).sum(0).sqrt()


def _members(sizes: list[int], group_sizes: tuple[int, ...]) -> list[list[int]]:
    """Returns the positions of each group's parameters; groups lie side by side along the flat vector."""
    members, parameter = [], 0
    for group_size in group_sizes:
        group = []
        while sum(sizes[i] for i in group) < group_size:
            group.append(parameter)
            parameter += 1
        members.append(group)
    return members
