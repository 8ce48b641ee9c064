"""Slow twins of the attacks: one record at a time, one number at a time where it matters."""

import math

import numpy as np
import torch
from scipy.optimize import brentq, linprog
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


def length_one(delta: Tensor, norm: str) -> float:
    values = delta.flatten().tolist()
    return max(map(abs, values)) if norm == "linf" else math.sqrt(sum(value * value for value in values))


def plane_step_one(x: Tensor, normal: Tensor, gap: float, norm: str) -> Tensor:
    """Returns the shortest delta with gap + <normal, delta> = 0 and x + delta in [0, 1], by general solvers.

    Where no such delta exists, the corner that comes nearest.
    """
    flat, w = x.flatten().double().numpy(), normal.flatten().double().numpy()
    up = -math.copysign(1.0, gap) * w
    corner = np.where(up > 0, 1.0 - flat, np.where(up < 0, -flat, 0.0))
    if abs(w @ corner) <= abs(gap):
        return torch.from_numpy(corner).view_as(x)
    if norm == "linf":  # the unknowns are delta and its largest entry
        size = len(flat)
        rows = np.block([[np.eye(size), -np.ones((size, 1))], [-np.eye(size), -np.ones((size, 1))]])
        solved = linprog(
            np.append(np.zeros(size), 1.0),
            A_ub=rows,
            b_ub=np.zeros(2 * size),
            A_eq=np.append(w, 0.0)[None],
            b_eq=[-gap],
            bounds=[(-p, 1.0 - p) for p in flat] + [(0.0, None)],
        )
        assert solved.success, solved.message
        largest = solved.x[-1]
        # Only the largest entry is unique: of all solutions take the one that moves every pixel as far as it may.
        delta = np.sign(up) * np.minimum(largest, np.abs(corner))
    else:
        # Of all deltas on the plane the shortest is that of a multiplier, cut off at the range (the KKT conditions).
        def shortest(multiplier: float) -> np.ndarray:
            return np.clip(multiplier * up, -flat, 1.0 - flat)

        beyond = 1.0 + (np.abs(corner) / np.abs(up)).max()
        delta = shortest(brentq(lambda m: abs(w @ shortest(m)) - abs(gap), 0.0, beyond, xtol=1e-15, rtol=1e-14))
    return torch.from_numpy(delta).view_as(x)


def nearest_plane_one(classifier, x: Tensor, label: int, classes: list[int], norm: str, beyond: float):
    """Returns the gap and the normal of the nearest linearised boundary, one class after the other."""
    best = None
    for k in classes:
        x_one = x.clone().requires_grad_(True)
        logits = classifier(x_one[None])[0]
        gap = logits[k] - logits[label]
        (normal,) = torch.autograd.grad(gap, x_one)
        slope = float(normal.abs().sum()) if norm == "linf" else float(normal.pow(2).sum().sqrt())
        far = abs(gap.item()) / slope
        if best is None or far < best[0]:
            best = far, gap.item() - beyond * slope, normal
    return best[1], best[2]


def fab_one(classifier, x: Tensor, start: Tensor, label: int, classes: list[int], norm: str, steps: int, beyond: float):
    """Algorithm 1 of Croce and Hein (2020b) from one start, without the final search.

    Returns the least distance at which the classifier errs, and infinity where it never did.
    """
    alpha_max, eta, beta = 0.1, 1.05, 0.9
    x_adv, least = start, math.inf
    for _ in range(steps):
        gap, normal = nearest_plane_one(classifier, x_adv, label, classes, norm, beyond)
        here = plane_step_one(x_adv, normal, gap, norm)
        origin = plane_step_one(x, normal, gap + float((normal * (x - x_adv)).sum()), norm)
        alpha = min(length_one(here, norm) / (length_one(here, norm) + length_one(origin, norm)), alpha_max)
        x_adv = ((1 - alpha) * (x_adv + eta * here) + alpha * (x + eta * origin)).clamp(0, 1)
        if int(classifier(x_adv[None])[0].argmax()) != label:
            least = min(least, length_one(x_adv - x, norm))
            x_adv = (1 - beta) * x + beta * x_adv
    return least


def deepfool_one(classifier, x: Tensor, label: int, classes: list[int], norm: str, steps: int, beyond: float):
    """Algorithm 2 of Moosavi-Dezfooli et al. (2016), tested with its overshoot; returns the image it ends at."""
    total, x_adv = torch.zeros_like(x), x
    for _ in range(steps):
        gap, normal = nearest_plane_one(classifier, x_adv, label, classes, norm, beyond)
        if norm == "linf":
            step = abs(gap) / normal.abs().sum() * (-math.copysign(1.0, gap) * normal).sign()
        else:
            step = -gap / normal.pow(2).sum() * normal
        total = total + (x_adv + step).clamp(0, 1) - x_adv
        x_adv = (x + 1.02 * total).clamp(0, 1)
        if int(classifier(x_adv[None])[0].argmax()) != label:
            break
    return x_adv
