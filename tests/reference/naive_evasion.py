"""Slow twins of the attacks: one record at a time, one number at a time where it matters."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def project_one(x_adv: Tensor, x: Tensor, norm: str, radius: float) -> Tensor:
    flat_adv, flat = x_adv.flatten().tolist(), x.flatten().tolist()
    deltas = [a - b for a, b in zip(flat_adv, flat, strict=True)]
    if norm == "linf":
        deltas = [max(-radius, min(radius, d)) for d in deltas]
    else:
        length = math.sqrt(sum(d * d for d in deltas))
        if length > radius:
            deltas = [d * radius / length for d in deltas]
    moved = [min(1.0, max(0.0, b + d)) for b, d in zip(flat, deltas, strict=True)]
    return torch.tensor(moved, dtype=x.dtype).view_as(x)


def loss_one(logits: Tensor, label: int, name: str) -> Tensor:
    if name == "cross_entropy":
        return F.cross_entropy(logits[None], torch.tensor([label]))
    others = torch.cat([logits[:label], logits[label + 1 :]])
    return others.max() - logits[label]


def pgd_one(classifier, x: Tensor, label: int, starts: list[Tensor], norm: str, radius: float, steps: int, loss: str):
    """Returns the worst of the clean image and of every iterate from every start, shape (C, H, W)."""
    candidates = [x]
    for start in starts:
        x_adv = start
        candidates.append(x_adv)
        for _ in range(steps):
            x_adv = x_adv.clone().requires_grad_(True)
            loss_one(classifier(x_adv[None])[0], label, loss).backward()
            gradient = x_adv.grad
            direction = gradient.sign() if norm == "linf" else gradient / gradient.norm()
            x_adv = project_one(x_adv.detach() + 2.5 / steps * radius * direction, x, norm, radius)
            candidates.append(x_adv)

    def badness(image: Tensor) -> tuple[bool, float]:
        logits = classifier(image[None])[0].detach()
        return int(logits.argmax()) != label, float(loss_one(logits, label, loss))

    return max(candidates, key=badness)
