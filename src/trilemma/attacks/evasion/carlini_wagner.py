"""The attack of Carlini and Wagner (2017) in L2: a short perturbation and a penalised margin, weighed by search."""

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.frozen import frozen, logits_and_gradient
from trilemma.attacks.evasion.search import kept
from trilemma.attacks.evasion.smallest import Smallest
from trilemma.attacks.evasion.types import Oracle
from trilemma.models.classifier import Classifier

#: Adam's decay rates and the number that keeps its division defined (Kingma and Ba, 2015).
FIRST_DECAY, SECOND_DECAY, ADAM_EPSILON = 0.9, 0.999, 1e-8
#: A weight grows or shrinks by so much while the search has it bounded on one side only.
WEIGHT_FACTOR = 10.0
LARGEST_WEIGHT = 1e10


def carlini_wagner(
    classifier: Classifier,
    x_BCHW: Tensor,
    y_B: Tensor,
    budget: Budget,
    generator: torch.Generator,
    *,
    steps: int,
    searches: int,
    learning_rate: float,
    answers: Oracle | None = None,
) -> Tensor:
    """Returns the nearest adversarial images that Adam finds for distance plus weighted margin.

    For each image |delta|^2 + c * max(0, z_y - max_{k != y} z_k) is minimised from the clean image, for several
    weights c: smaller ones after a success, larger ones after a failure. Three choices differ from the paper's default.
    The image is kept within [0, 1] by projection (the first of the paper's three ways, section V-B), for a change of
    variables by tanh holds pixels that are exactly 0 or 1 fast, and medical images are full of them. The learning rate
    falls linearly to 0 within each search. The first weight is the one that would be right if the model were linear, so
    that scaling the logits changes nothing.

    Guarantees: within the budget and [0, 1], where what was found lies farther away after projection; radius 0 returns
    the images unchanged; nothing is random; the classifier is left as found.
    Cost: two forward and one backward pass; for each search and image that still stands `steps` forward and backward
    passes and one forward pass.
    References: Carlini and Wagner (2017), sections V and VI-A, objective f6.

    Args:
        classifier: The classifier under attack.
        x_BCHW: Clean images in [0, 1].
        y_B: True labels.
        budget: What may be changed; "l2".
        generator: Not used.
        steps: Adam steps for each weight.
        searches: How many weights are tried.
        learning_rate: Adam's, in pixel units, at the start of each search.
        answers: The model that ships; None where that is the classifier.
    """
    if budget.norm != "l2":
        raise ValueError('carlini_wagner minimises the L2 length; use norm = "l2"')
    if budget.radius == 0 or len(x_BCHW) == 0:
        return x_BCHW.clone()
    with frozen(classifier):
        smallest = Smallest(classifier, x_BCHW, y_B, budget, answers=answers)
        search_weights(smallest, steps=steps, searches=searches, learning_rate=learning_rate)
    return smallest.images()


def search_weights(smallest: Smallest, *, steps: int, searches: int, learning_rate: float) -> None:
    """Runs all searches and leaves in `smallest` what they find; call it within `frozen`."""
    if not len(smallest.active()):
        return
    weight_B = _linear_weights(smallest)
    low_B, high_B = torch.zeros_like(weight_B), torch.full_like(weight_B, torch.inf)
    for _ in range(searches):
        found_B = descend(smallest, weight_B, steps=steps, learning_rate=learning_rate)
        low_B, high_B = torch.where(found_B, low_B, weight_B), torch.where(found_B, weight_B, high_B)
        middle_B = torch.where(low_B > 0, (low_B * high_B).sqrt(), high_B / WEIGHT_FACTOR)
        weight_B = torch.where(high_B.isinf(), low_B * WEIGHT_FACTOR, middle_B).clamp(max=LARGEST_WEIGHT)


def descend(smallest: Smallest, weight_B: Tensor, *, steps: int, learning_rate: float) -> Tensor:
    """Minimises the objective for one weight per record.

    Returns:
        found_B: For which records an adversarial image was met in the second half. Adam's first steps are longer than
            most distances: an image that they overshoot to says nothing of the weight.
    """
    found_B, index_M = torch.zeros_like(smallest.broken_B), smallest.active()
    clean_MCHW, weight_M = smallest.x_BCHW[index_M], weight_B[index_M]
    x_MCHW, first_MCHW, second_MCHW = clean_MCHW, torch.zeros_like(clean_MCHW), torch.zeros_like(clean_MCHW)
    for step in range(steps):
        if not len(index_M):
            return found_B
        logits_MK, gradient_MCHW = logits_and_gradient(
            smallest.classifier, x_MCHW, lambda z, i=index_M, c=weight_M: c * smallest.gaps(i, z).clamp(max=0.0)
        )
        stay_M, wrong_M = smallest.offer(index_M, x_MCHW, logits_MK)
        if 2 * step >= steps:
            found_B[index_M] |= wrong_M
        index_M, x_MCHW, clean_MCHW, weight_M, gradient_MCHW, first_MCHW, second_MCHW = kept(
            stay_M, index_M, x_MCHW, clean_MCHW, weight_M, gradient_MCHW, first_MCHW, second_MCHW
        )
        downhill_MCHW = gradient_MCHW.nan_to_num(nan=0.0) - 2.0 * (x_MCHW - clean_MCHW)
        first_MCHW = torch.lerp(downhill_MCHW, first_MCHW, FIRST_DECAY)
        second_MCHW = torch.lerp(downhill_MCHW.square(), second_MCHW, SECOND_DECAY)
        scale_MCHW = (second_MCHW / (1.0 - SECOND_DECAY ** (step + 1))).sqrt_().add_(ADAM_EPSILON)
        rate = learning_rate * (1.0 - step / steps) / (1.0 - FIRST_DECAY ** (step + 1))
        x_MCHW = (x_MCHW + rate * first_MCHW / scale_MCHW).clamp_(0.0, 1.0)
    if len(index_M):
        found_B[index_M] |= smallest.ask(index_M, x_MCHW)[1]
    return found_B


def _linear_weights(smallest: Smallest) -> Tensor:
    """Returns the weights at which a linear model's minimum lies on its boundary, shape (B,).

    With a gap of -m and a gradient g the nearest boundary is at m / |g|; there 2 * delta = c * g holds for
    c = 2 * m / |g|^2.
    """
    logits_BK, gradient_BCHW = logits_and_gradient(
        smallest.classifier, smallest.x_BCHW, lambda z: smallest.gaps(torch.arange(len(z), device=z.device), z)
    )
    gap_B = smallest.gaps(torch.arange(len(logits_BK), device=logits_BK.device), logits_BK)
    slope_B = gradient_BCHW.nan_to_num(nan=0.0).flatten(1).norm(dim=1).clamp(min=LARGEST_WEIGHT**-0.5)
    return (2.0 * gap_B.abs() / slope_B / slope_B).nan_to_num(nan=1.0).clamp(1.0 / LARGEST_WEIGHT, LARGEST_WEIGHT)
