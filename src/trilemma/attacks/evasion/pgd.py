"""Projected gradient descent (Madry et al., 2018): the standard white-box attack."""

from typing import Literal

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.frozen import RecordLoss, cross_entropy, frozen, logits_and_gradient, margin
from trilemma.attacks.evasion.geometry import project, random_start, steepest_step
from trilemma.models.classifier import Classifier

LossName = Literal["cross_entropy", "margin"]


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
    keep_best: bool = True,
) -> Tensor:
    """Returns the worst images found by projected steepest ascent from random starts.

    Worst, for each image by itself: misclassified before classified correctly, then the highest loss. The clean
    image competes too, so the loss never falls. No image's result depends on another's: there is no early stop
    and no shared schedule.

    Guarantees: within the budget and [0, 1]; radius 0 returns the images unchanged; the classifier is left as found.
    Cost: per restart `steps` forward and backward passes to the images and one forward pass; one more forward pass
    for the clean images. With `keep_best=False` just the steps.
    References: Madry et al. (2018), section 2.1.

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
        keep_best: False returns the last iterate of one start and ignores `restarts`, which is enough for training.
    """
    if budget.radius == 0 or len(x_BCHW) == 0:
        return x_BCHW.clone()
    record_loss = margin if loss == "margin" else cross_entropy
    length = (2.5 / steps if step_size is None else step_size) * budget.radius
    x_adv_BCHW = x_BCHW
    with frozen(classifier):
        best = _Worst(classifier, x_BCHW, y_B, record_loss) if keep_best else None
        for _ in range(restarts if keep_best else 1):
            x_adv_BCHW = random_start(x_BCHW, budget, generator)
            for _ in range(steps):
                logits_BK, gradient_BCHW = logits_and_gradient(classifier, x_adv_BCHW, y_B, record_loss)
                if best is not None:
                    best.offer(x_adv_BCHW, logits_BK)
                x_adv_BCHW = project(x_adv_BCHW + steepest_step(gradient_BCHW, length, budget.norm), x_BCHW, budget)
            if best is not None:
                with torch.no_grad():
                    best.offer(x_adv_BCHW, classifier(x_adv_BCHW))
    return x_adv_BCHW if best is None else best.x_BCHW


class _Worst:
    """The worst image found so far, one per record; it starts with the clean images."""

    def __init__(self, classifier: Classifier, x_BCHW: Tensor, y_B: Tensor, record_loss: RecordLoss):
        self.y_B = y_B
        self.record_loss = record_loss
        self.x_BCHW = x_BCHW.clone()
        with torch.no_grad():
            self.wrong_B, self.loss_B = self._judge(classifier(x_BCHW))

    def offer(self, x_BCHW: Tensor, logits_BK: Tensor) -> None:
        wrong_B, loss_B = self._judge(logits_BK)
        better_B = (wrong_B & ~self.wrong_B) | ((wrong_B == self.wrong_B) & (loss_B > self.loss_B))
        self.x_BCHW = torch.where(better_B[:, None, None, None], x_BCHW, self.x_BCHW)
        self.wrong_B = torch.where(better_B, wrong_B, self.wrong_B)
        self.loss_B = torch.where(better_B, loss_B, self.loss_B)

    def _judge(self, logits_BK: Tensor) -> tuple[Tensor, Tensor]:
        # A loss that is not a number must neither win nor, on the clean image, be unbeatable.
        loss_B = self.record_loss(logits_BK, self.y_B).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        return logits_BK.argmax(dim=1) != self.y_B, loss_B
