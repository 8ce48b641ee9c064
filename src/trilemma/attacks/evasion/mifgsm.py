"""Iterated FGSM with momentum (Dong et al., 2018): its images transfer to other models."""

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.frozen import frozen, logits_and_gradient
from trilemma.attacks.evasion.geometry import project, steepest_step
from trilemma.attacks.evasion.losses import cross_entropy
from trilemma.attacks.evasion.search import Standing, kept
from trilemma.attacks.evasion.types import Oracle
from trilemma.models.classifier import Classifier


def mifgsm(
    classifier: Classifier,
    x_BCHW: Tensor,
    y_B: Tensor,
    budget: Budget,
    generator: torch.Generator,
    *,
    steps: int,
    decay: float = 1.0,
    answers: Oracle | None = None,
    stop: bool = True,
) -> Tensor:
    """Returns the worst images on a way of equal steps from the clean ones, along a moving sum of gradients.

    Each gradient is divided by its mean absolute entry, so that all of them count alike in the sum. Worst, for each
    image by itself: misclassified before classified correctly, then the highest cross entropy.

    Guarantees: within the budget and [0, 1]; radius 0 returns the images unchanged; the classifier is left as found; no
    image's result depends on another's; nothing is drawn.
    Cost: `steps` forward and backward passes to the images that still stand and two forward passes.
    References: Dong et al. (2018), Algorithm 1; for "l2" their equation 9.

    Args:
        classifier: The classifier under attack.
        x_BCHW: Clean images in [0, 1].
        y_B: True labels.
        budget: What may be changed.
        generator: Not used.
        steps: Steps, each of radius / steps.
        decay: Of the moving sum; 0 is iterated FGSM.
        answers: The model that ships; None where that is the classifier.
        stop: Whether broken images leave the batch; without it each is driven to the highest loss.
    """
    if budget.radius == 0 or len(x_BCHW) == 0:
        return x_BCHW.clone()
    with frozen(classifier):
        standing = Standing(classifier, x_BCHW, y_B, cross_entropy, answers=answers, stop=stop)
        index_M = standing.active()
        x_MCHW = clean_MCHW = x_BCHW[index_M]
        sum_MCHW, y_M = torch.zeros_like(clean_MCHW), y_B[index_M]
        for _ in range(steps):
            if not len(index_M):
                break
            logits_MK, gradient_MCHW = logits_and_gradient(classifier, x_MCHW, lambda z, y=y_M: cross_entropy(z, y))
            stay_M = standing.offer(index_M, x_MCHW, logits_MK)
            index_M, x_MCHW, clean_MCHW, y_M, sum_MCHW, gradient_MCHW = kept(
                stay_M, index_M, x_MCHW, clean_MCHW, y_M, sum_MCHW, gradient_MCHW
            )
            sum_MCHW = sum_MCHW * decay + _of_mean_1(gradient_MCHW)
            step_MCHW = steepest_step(sum_MCHW, budget.radius / steps, budget.norm)
            x_MCHW = project(step_MCHW.add_(x_MCHW), clean_MCHW, budget)
        standing.ask(index_M, x_MCHW)
    return standing.worst_BCHW


def _of_mean_1(gradient_BCHW: Tensor) -> Tensor:
    """Returns gradients divided by their mean absolute entry; where there is none, 0."""
    gradient_BCHW = gradient_BCHW.nan_to_num(nan=0.0)
    # Scaled to a largest entry of 1 first: a vanishing gradient has a mean that underflows.
    largest_B111 = gradient_BCHW.abs().amax(dim=(1, 2, 3), keepdim=True)
    scaled_BCHW = torch.where(largest_B111 > 0, gradient_BCHW / largest_B111, 0.0)
    mean_B111 = scaled_BCHW.abs().mean(dim=(1, 2, 3), keepdim=True)
    return torch.where(largest_B111 > 0, scaled_BCHW / mean_B111, 0.0)
