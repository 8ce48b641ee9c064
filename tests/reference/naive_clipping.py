"""A slow twin of the clipped gradient sum: one record, one backward pass at a time, in double precision."""

import torch
from torch import Tensor


def clipped_sum(classifier, loss, x_BVCHW: Tensor, y_B: Tensor, clip: float) -> tuple[Tensor, list[float]]:
    parameters = [p for p in classifier.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    norms = []
    for x_VCHW, y in zip(x_BVCHW, y_B, strict=True):
        record_loss = loss(classifier(x_VCHW)[None], y[None]).sum()
        gradients = torch.autograd.grad(record_loss, parameters)
        flat = torch.cat([gradient.double().flatten() for gradient in gradients])
        norm = float(flat.norm())
        norms.append(norm)
        total += flat if norm <= clip else flat * (clip / norm)
    return total, norms
