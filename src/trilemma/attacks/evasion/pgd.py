"""Projected gradient descent (Madry et al., 2018): the standard white-box attack."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.frozen import frozen, logits_and_gradient
from trilemma.attacks.evasion.geometry import of_mean_1, project, random_start, steepest_step
from trilemma.attacks.evasion.losses import LossName, record_loss
from trilemma.attacks.evasion.search import Standing, kept
from trilemma.attacks.evasion.types import Oracle
from trilemma.models.classifier import Classifier


class Strides(NamedTuple):
    """How an ascent goes on from where it began.

    Attributes:
        length: Of a step, in pixel units.
        steps: Steps.
        momentum: Of the moving sum of gradients of mean absolute entry 1; 0 keeps no sum.
        leaps: Whether the point of the ball that lies farthest along the first gradient is tried before it goes on.
    """

    length: float
    steps: int
    momentum: float = 0.0
    leaps: bool = False


def pgd(
    classifier: Classifier,
    x_BCHW: Tensor,
    y_B: Tensor,
    budget: Budget,
    generator: torch.Generator,
    *,
    steps: int,
    step_size: float | None = None,
    restarts: int = 1,
    loss: LossName = "cross_entropy",
    momentum: float = 0.0,
    answers: Oracle | None = None,
    stop: bool = True,
) -> Tensor:
    """Returns the worst images found by projected steepest ascent from random starts.

    Worst, for each image by itself: misclassified before classified correctly, then the highest loss. The clean
    image competes too, so the loss never falls. No image's result depends on another's. Where broken images leave, the
    point of the ball that lies farthest along the first gradient competes as well: one forward pass more for what
    stands to the end, and several steps less for the most of an undefended model.

    Guarantees: within the budget and [0, 1]; radius 0 returns the images unchanged; the classifier is left as found.
    Cost: per restart `steps` forward and backward passes to the images that still stand and two forward passes; one
    more forward pass for the clean images.
    References: Madry et al. (2018), section 2.1; with momentum the steps of Dong et al. (2018).

    Args:
        classifier: The classifier under attack.
        x_BCHW: Clean images in [0, 1].
        y_B: True labels.
        budget: What may be changed.
        generator: Source of the random starts.
        steps: Steps per restart.
        step_size: Length of a step over the radius; None for 2.5 / steps, which can cross the ball.
        restarts: Random starts.
        loss: What is climbed: "cross_entropy" or "margin".
        momentum: How much of the gradients before a step counts in it, each step's a share of this of the next; 0
            follows the last gradient alone.
        answers: The model that ships; None where that is the classifier.
        stop: Whether broken images leave the batch; without it each is driven to the highest loss.
    """
    if budget.radius == 0 or len(x_BCHW) == 0:
        return x_BCHW.clone()
    strides = Strides(step_length(budget, steps, step_size), steps, momentum, leaps=stop and steps > 1)
    with frozen(classifier):
        standing = Standing(classifier, x_BCHW, y_B, record_loss(loss), answers=answers, stop=stop)
        for _ in range(restarts):
            start_BCHW = random_start(x_BCHW, budget, generator)
            ascend(classifier, standing, start_BCHW, x_BCHW, budget, strides)
    return standing.worst_BCHW


def ascend(
    classifier: Classifier,
    standing: Standing,
    start_BCHW: Tensor,
    x_BCHW: Tensor,
    budget: Budget,
    strides: Strides,
) -> None:
    """Climbs the loss of `standing` from one start and leaves there what it finds; call it within `frozen`.

    Args:
        classifier: The classifier under attack.
        standing: What was found before; its broken records are left alone.
        start_BCHW: Where to begin, within the budget.
        x_BCHW: Clean images in [0, 1].
        budget: What may be changed.
        strides: How to go on from there.
    """
    index_M = standing.active()
    x_MCHW, clean_MCHW, y_M = start_BCHW[index_M], x_BCHW[index_M], standing.y_B[index_M]
    sum_MCHW = torch.zeros_like(x_MCHW)
    for step in range(strides.steps):
        if not len(index_M):
            break
        logits_MK, way_MCHW = logits_and_gradient(classifier, x_MCHW, lambda z, y=y_M: standing.loss(z, y))
        stay_M = standing.offer(index_M, x_MCHW, logits_MK)
        index_M, x_MCHW, clean_MCHW, y_M, sum_MCHW, way_MCHW = kept(
            stay_M, index_M, x_MCHW, clean_MCHW, y_M, sum_MCHW, way_MCHW
        )
        if strides.leaps and step == 0 and len(index_M):
            far_MCHW = project(x_MCHW + steepest_step(way_MCHW, 2 * budget.radius, budget.norm), clean_MCHW, budget)
            stay_M = standing.ask(index_M, far_MCHW)
            index_M, x_MCHW, clean_MCHW, y_M, sum_MCHW, way_MCHW = kept(
                stay_M, index_M, x_MCHW, clean_MCHW, y_M, sum_MCHW, way_MCHW
            )
        if strides.momentum:
            way_MCHW = sum_MCHW = strides.momentum * sum_MCHW + of_mean_1(way_MCHW)
        x_MCHW = project(x_MCHW + steepest_step(way_MCHW, strides.length, budget.norm), clean_MCHW, budget)
    standing.ask(index_M, x_MCHW)


def climb(
    classifier: Classifier,
    start_BCHW: Tensor,
    x_BCHW: Tensor,
    budget: Budget,
    loss: Callable[[Tensor], Tensor],
    *,
    steps: int,
    step_size: float | None = None,
) -> Tensor:
    """Returns the last images of projected steepest ascent: all that training needs.

    Args:
        classifier: The classifier.
        start_BCHW: Where to begin, within the budget.
        x_BCHW: Clean images in [0, 1].
        budget: What may be changed.
        loss: logits_BK -> loss_B, what is climbed.
        steps: Steps.
        step_size: Length of a step over the radius; None for 2.5 / steps.
    """
    if budget.radius == 0 or len(x_BCHW) == 0:
        return x_BCHW.clone()
    length, x_adv_BCHW = step_length(budget, steps, step_size), start_BCHW
    with frozen(classifier):
        for _ in range(steps):
            _, gradient_BCHW = logits_and_gradient(classifier, x_adv_BCHW, loss)
            x_adv_BCHW = project(x_adv_BCHW + steepest_step(gradient_BCHW, length, budget.norm), x_BCHW, budget)
    return x_adv_BCHW


def step_length(budget: Budget, steps: int, step_size: float | None) -> float:
    """Returns the length of a step in pixel units; by default 2.5 / steps of the radius."""
    return (2.5 / steps if step_size is None else step_size) * budget.radius
