"""DeepFool (Moosavi-Dezfooli et al., 2016): step by step to the nearest boundary of a linearised model."""

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.boundary import linear_step, nearest_boundary
from trilemma.attacks.evasion.frozen import frozen
from trilemma.attacks.evasion.search import kept
from trilemma.attacks.evasion.smallest import Smallest
from trilemma.attacks.evasion.types import Oracle
from trilemma.models.classifier import Classifier

#: So many wrong classes, the likeliest on the clean image, are looked at in every step.
MOST_CLASSES = 9


def deepfool(
    classifier: Classifier,
    x_BCHW: Tensor,
    y_B: Tensor,
    budget: Budget,
    generator: torch.Generator,
    *,
    steps: int,
    overshoot: float = 0.02,
    answers: Oracle | None = None,
) -> Tensor:
    """Returns the images just beyond the boundary that is reached by steps to the nearest linearised one.

    Each step is the shortest, in the budget's norm, to the nearest of the boundaries to the nine likeliest wrong
    classes, cut off at [0, 1], of which the paper does not speak. Beyond the boundary an image's search ends, within
    the budget or not.

    Guarantees: within the budget and [0, 1], where what was found lies farther away after projection; radius 0 returns
    the images unchanged; nothing is random; the classifier is left as found.
    Cost: one forward pass; per step and image that still stands two more and min(K - 1, 9) backward passes.
    References: Moosavi-Dezfooli et al. (2016), Algorithm 2 and, for L-infinity, section 3.3.

    Args:
        classifier: The classifier under attack.
        x_BCHW: Clean images in [0, 1].
        y_B: True labels.
        budget: What may be changed.
        generator: Not used.
        steps: At most so many linearisations.
        overshoot: By which share the sum of all steps is lengthened.
        answers: The model that ships; None where that is the classifier.
    """
    if budget.radius == 0 or len(x_BCHW) == 0:
        return x_BCHW.clone()
    with frozen(classifier):
        smallest = Smallest(classifier, x_BCHW, y_B, budget, answers=answers)
        follow_boundary(smallest, steps=steps, overshoot=overshoot)
    return smallest.images()


def follow_boundary(smallest: Smallest, *, steps: int, overshoot: float) -> None:
    """Takes the steps and leaves in `smallest` what they find; call it within `frozen`."""
    norm, index_M = smallest.budget.norm, smallest.active()
    clean_MCHW, y_M = smallest.x_BCHW[index_M], smallest.y_B[index_M]
    classes_MT = smallest.likeliest_wrong(MOST_CLASSES)[index_M]
    sum_MCHW, x_MCHW = torch.zeros_like(clean_MCHW), clean_MCHW
    for _ in range(steps):
        if not len(index_M):
            break
        boundary = nearest_boundary(smallest.classifier, x_MCHW, y_M, classes_MT, smallest.lead_B[index_M], norm)
        sum_MCHW += (x_MCHW + linear_step(boundary, norm)).clamp_(0.0, 1.0) - x_MCHW
        # The overshoot lengthens the sum for the test only, so that it does not grow with the number of steps.
        x_MCHW = (clean_MCHW + (1.0 + overshoot) * sum_MCHW).clamp_(0.0, 1.0)
        stay_M, wrong_M = smallest.ask(index_M, x_MCHW)
        index_M, clean_MCHW, y_M, classes_MT, sum_MCHW, x_MCHW = kept(
            stay_M & ~wrong_M, index_M, clean_MCHW, y_M, classes_MT, sum_MCHW, x_MCHW
        )
