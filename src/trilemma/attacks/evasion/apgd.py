"""Projected gradient descent that halves its own steps (Croce and Hein, 2020): no step size to choose."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.frozen import frozen, logits_and_gradient
from trilemma.attacks.evasion.geometry import project, random_start, steepest_step
from trilemma.attacks.evasion.losses import (
    cross_entropy,
    dlr,
    likeliest_wrong,
    margin,
    targeted_dlr,
    targeted_margin,
)
from trilemma.attacks.evasion.search import Standing, kept
from trilemma.attacks.evasion.types import Oracle
from trilemma.errors import UserError
from trilemma.models.classifier import Classifier

ApgdLoss = Literal["cross_entropy", "margin", "dlr"]

#: The first step over the radius, the share of a step that is new (the rest is the last step once more), and the share
#: of steps that must raise the loss between two checkpoints (section 3 of the paper).
FIRST_STEP, NEW_SHARE, RISING_SHARE = 2.0, 0.75, 0.75

_UNTARGETED = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}


def apgd(
    classifier: Classifier,
    x_BCHW: Tensor,
    y_B: Tensor,
    budget: Budget,
    generator: torch.Generator,
    *,
    steps: int,
    restarts: int = 1,
    loss: ApgdLoss = "cross_entropy",
    num_targets: int | None = None,
    answers: Oracle | None = None,
    stop: bool = True,
) -> Tensor:
    """Returns the worst images found by ascent with momentum, whose steps every image halves for itself.

    The first step is twice the radius. At checkpoints that come ever closer together, an image that has not gained
    enough halves its step and returns to its best point. Worst, for each image by itself: misclassified before
    classified correctly, then the highest loss (with targets: margin). The clean image competes too.

    Guarantees: within the budget and [0, 1]; radius 0 returns the images unchanged; the classifier is left as found; no
    image's result depends on another's.
    Cost: per restart (and target) `steps` forward and backward passes to the images that still stand and one forward
    pass; one more forward pass for the clean images, and with targets another.
    References: Croce and Hein (2020), Algorithm 1; the losses are their equations 6 and 7.

    Args:
        classifier: The classifier under attack.
        x_BCHW: Clean images in [0, 1].
        y_B: True labels.
        budget: What may be changed.
        generator: Source of the random starts.
        steps: Steps per start.
        restarts: Random starts, for each target.
        loss: What is climbed: "cross_entropy", "margin" or "dlr".
        num_targets: Wrong classes that are aimed at, the likeliest on the clean image first, at most all of them; None
            aims at none.
        answers: The model that ships; None where that is the classifier.
        stop: Whether broken images leave the batch; without it each is driven to the highest loss.

    Raises:
        UserError: The loss needs more classes than there are, or aims at no class.
    """
    check_classes(loss, num_targets, classifier.num_classes)
    if budget.radius == 0 or len(x_BCHW) == 0:
        return x_BCHW.clone()
    order = _UNTARGETED[loss] if num_targets is None else margin
    with frozen(classifier):
        standing = Standing(classifier, x_BCHW, y_B, order, answers=answers, stop=stop)
        for climbed in _climbed_losses(classifier, x_BCHW, y_B, loss, num_targets):
            for _ in range(restarts):
                start_BCHW = random_start(x_BCHW, budget, generator)
                _ascend(classifier, standing, start_BCHW, x_BCHW, budget, climbed, steps)
    return standing.worst_BCHW


def checkpoints(steps: int) -> list[int]:
    """Returns after how many steps an image looks back: of 100 at 22, 41, 57, 70, 80, 87, 93 and 99.

    The first stretch is 22 % of all steps, each further one 3 points shorter but at least 6 points long.
    """
    marks, percent, stretch = [], 22, 22
    while percent < 100:
        marks.append(-(-percent * steps // 100))  # rounded up, in whole numbers: 0.41 * 100 is more than 41 in floats
        stretch = max(stretch - 3, 6)
        percent += stretch
    return sorted({mark for mark in marks if mark < steps})


#: (logits_MK, index_M) -> loss_M: the loss of the records at some positions of the batch.
_Climbed = Callable[[Tensor, Tensor], Tensor]


class _Climb(NamedTuple):
    """Where every image that is still worked on stands; all fields have one row for each."""

    index_M: Tensor
    clean_MCHW: Tensor
    x_MCHW: Tensor
    previous_MCHW: Tensor
    gradient_MCHW: Tensor
    loss_M: Tensor
    best_MCHW: Tensor
    best_gradient_MCHW: Tensor
    best_loss_M: Tensor
    step_M111: Tensor
    rises_M: Tensor  # steps since the last checkpoint that raised the loss
    checked_loss_M: Tensor  # the best loss at the last checkpoint
    halved_M: Tensor  # whether the step was halved there


def _ascend(
    classifier: Classifier,
    standing: Standing,
    start_BCHW: Tensor,
    x_BCHW: Tensor,
    budget: Budget,
    climbed: _Climbed,
    steps: int,
) -> None:
    at = _begin(standing.active(), start_BCHW, x_BCHW, budget)
    marks, last_mark = checkpoints(steps), 0
    for step in range(steps):
        if not len(at.index_M):
            return
        logits_MK, gradient_MCHW = logits_and_gradient(classifier, at.x_MCHW, lambda z, i=at.index_M: climbed(z, i))
        # A loss that is not a number is no gain.
        loss_M = climbed(logits_MK, at.index_M).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        rises_M = at.rises_M + ((loss_M > at.loss_M) if step else 0)
        at = at._replace(gradient_MCHW=gradient_MCHW, loss_M=loss_M, rises_M=rises_M)
        at = _Climb(*kept(standing.offer(at.index_M, at.x_MCHW, logits_MK), *at))
        _remember_best(at)
        if step == 0:
            at = at._replace(checked_loss_M=at.best_loss_M.clone())
        if step in marks:
            at, last_mark = _looked_back(at, step - last_mark), step
        at = _stepped(at, budget, first=step == 0)
    standing.ask(at.index_M, at.x_MCHW)


def _begin(index_M: Tensor, start_BCHW: Tensor, x_BCHW: Tensor, budget: Budget) -> _Climb:
    x_MCHW = start_BCHW[index_M]
    lowest_M = x_MCHW.new_full((len(index_M),), -torch.inf)
    return _Climb(
        index_M=index_M,
        clean_MCHW=x_BCHW[index_M],
        x_MCHW=x_MCHW,
        previous_MCHW=x_MCHW,
        gradient_MCHW=torch.zeros_like(x_MCHW),
        loss_M=lowest_M,
        best_MCHW=x_MCHW.clone(),
        best_gradient_MCHW=torch.zeros_like(x_MCHW),
        best_loss_M=lowest_M.clone(),
        step_M111=x_MCHW.new_full((len(index_M), 1, 1, 1), FIRST_STEP * budget.radius),
        rises_M=torch.zeros_like(index_M),
        checked_loss_M=lowest_M,
        halved_M=torch.zeros_like(index_M, dtype=torch.bool),
    )


def _remember_best(at: _Climb) -> None:
    better_L = (at.loss_M > at.best_loss_M).nonzero().squeeze(1)
    if len(better_L):
        at.best_MCHW[better_L] = at.x_MCHW[better_L]
        at.best_gradient_MCHW[better_L] = at.gradient_MCHW[better_L]
        at.best_loss_M[better_L] = at.loss_M[better_L]


def _looked_back(at: _Climb, since: int) -> _Climb:
    """Halves the steps of images that gained too little in `since` steps, and takes these to their best point."""
    wavers_M = at.rises_M < RISING_SHARE * since
    stuck_M = ~at.halved_M & (at.best_loss_M <= at.checked_loss_M)
    halve_M = wavers_M | stuck_M
    halve_M111 = halve_M[:, None, None, None]
    return at._replace(
        x_MCHW=torch.where(halve_M111, at.best_MCHW, at.x_MCHW),
        gradient_MCHW=torch.where(halve_M111, at.best_gradient_MCHW, at.gradient_MCHW),
        loss_M=torch.where(halve_M, at.best_loss_M, at.loss_M),
        step_M111=torch.where(halve_M111, at.step_M111 / 2, at.step_M111),
        rises_M=torch.zeros_like(at.rises_M),
        checked_loss_M=at.best_loss_M.clone(),
        halved_M=halve_M,
    )


def _stepped(at: _Climb, budget: Budget, *, first: bool) -> _Climb:
    direction_MCHW = steepest_step(at.gradient_MCHW, 1.0, budget.norm)
    ahead_MCHW = project(direction_MCHW.mul_(at.step_M111).add_(at.x_MCHW), at.clean_MCHW, budget)
    if not first:
        # x + a (ahead - x) + (1 - a) (x - previous), gathered by image.
        ahead_MCHW.mul_(NEW_SHARE).add_(at.x_MCHW, alpha=2 - 2 * NEW_SHARE)
        ahead_MCHW = project(ahead_MCHW.sub_(at.previous_MCHW, alpha=1 - NEW_SHARE), at.clean_MCHW, budget)
    return at._replace(x_MCHW=ahead_MCHW, previous_MCHW=at.x_MCHW)


def _climbed_losses(
    classifier: Classifier, x_BCHW: Tensor, y_B: Tensor, loss: ApgdLoss, num_targets: int | None
) -> list[_Climbed]:
    if num_targets is None:
        untargeted = _UNTARGETED[loss]
        return [lambda logits_MK, index_M: untargeted(logits_MK, y_B[index_M])]
    aimed = targeted_margin if loss == "margin" else targeted_dlr
    with torch.no_grad():
        targets_BT = likeliest_wrong(classifier(x_BCHW), y_B, num_targets)

    def towards(target_B: Tensor) -> _Climbed:
        return lambda logits_MK, index_M: aimed(logits_MK, y_B[index_M], target_B[index_M])

    return [towards(target_B) for target_B in targets_BT.unbind(1)]


def check_classes(loss: ApgdLoss, num_targets: int | None, num_classes: int) -> None:
    """Refuses a loss that needs more classes than there are, or that aims at no class.

    Raises:
        UserError: Naming the loss that would do.
    """
    if loss == "dlr":
        needed, form = (3, "") if num_targets is None else (4, "targeted ")
        if num_classes < needed:
            raise UserError(
                'the attack apgd with loss = "dlr"',
                f"the {form}difference of logits ratio needs at least {needed} classes, not {num_classes}",
                'Use loss = "margin"',
            )
    if loss == "cross_entropy" and num_targets is not None:
        raise UserError(
            f"the attack apgd with num_targets = {num_targets}",
            "the cross entropy aims at no class",
            'Use loss = "margin" or "dlr", or leave num_targets out',
        )
