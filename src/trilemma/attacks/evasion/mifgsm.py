"""Iterated FGSM with momentum (Dong et al., 2018): its images transfer to other models."""

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.frozen import frozen
from trilemma.attacks.evasion.losses import cross_entropy
from trilemma.attacks.evasion.pgd import Strides, ascend
from trilemma.attacks.evasion.search import Standing
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
        ascend(classifier, standing, x_BCHW, x_BCHW, budget, Strides(budget.radius / steps, steps, decay))
    return standing.worst_BCHW
