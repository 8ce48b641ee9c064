"""Per-record clipped gradient sums: the clear reference, by `torch.func`.

Every faster engine must agree with it. Sensitivity: adding or removing one record changes the sum by a vector of
norm at most `clip`, because each record's whole gradient, over all its views and all layers, is clipped as one. A
gradient that is no finite number has no norm to clip and counts as zero: it must not show in the sum either.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from trilemma.models.classifier import Classifier

#: (logits_BVK over the views of each record, labels y_B) -> loss_B.
RecordLoss = Callable[[Tensor, Tensor], Tensor]

#: Per-record gradients held at once, in numbers (4 bytes each): bounds memory at any batch size.
MAX_GRADIENT_NUMBERS = 50_000_000

#: Records that are differentiated together at most: bounds the activations, which small networks on large images need.
MAX_CHUNK = 64


class ClippedSum(NamedTuple):
    """A sum of clipped per-record gradients.

    Attributes:
        sum_P: Over the batch, flat over trainable parameters in `named_parameters` order.
        norms_B: Norm of each record's gradient before clipping.
        losses_B: Each record's loss.
    """

    sum_P: Tensor
    norms_B: Tensor
    losses_B: Tensor


def clipped_gradient_sum(
    classifier: Classifier, loss: RecordLoss, x_BVCHW: Tensor, y_B: Tensor, clip: float
) -> ClippedSum:
    """Returns the sum over records of `gradient * min(1, clip / norm)`; an empty batch gives zeros.

    Args:
        classifier: Its trainable parameters are differentiated; it must hold no batch-statistics layer.
        loss: Loss of each record over its views.
        x_BVCHW: The views of each record, crafted before: no attack runs in here.
        y_B: Labels.
        clip: Largest norm that a record may contribute; infinity does not clip.
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
    total_P = torch.zeros(num_params, device=y_B.device)
    norms, losses = [total_P.new_zeros(0)], [total_P.new_zeros(0)]
    chunk = max(1, min(MAX_CHUNK, MAX_GRADIENT_NUMBERS // max(1, num_params)))
    for x, y in zip(x_BVCHW.split(chunk), y_B.split(chunk), strict=True):
        if len(y) == 0:
            continue
        gradients, loss_B = per_record(params, x, y)
        flat = [gradients[name].flatten(1) for name in params]
        norm_B = torch.stack([part.square().sum(1) for part in flat]).sum(0).sqrt()
        sound_B = norm_B.isfinite()
        if not sound_B.all():
            flat = [part.masked_fill(~sound_B[:, None], 0.0) for part in flat]
        # A zero gradient stays zero: the tiny floor only avoids 0 / 0.
        weight_B = torch.where(sound_B, (clip / norm_B.clamp_min(1e-12)).clamp(max=1.0), 0.0)
        total_P += torch.cat([weight_B @ part for part in flat])
        norms.append(norm_B)
        losses.append(loss_B)
    return ClippedSum(total_P, torch.cat(norms), torch.cat(losses))
