"""The fast gradient sign method (Goodfellow et al., 2015) and its random start (Wong et al., 2020)."""

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.frozen import frozen, logits_and_gradient
from trilemma.attacks.evasion.geometry import project, steepest_step
from trilemma.attacks.evasion.geometry import random_start as draw_start
from trilemma.attacks.evasion.losses import cross_entropy
from trilemma.models.classifier import Classifier

#: Step over radius after a random start, as in Wong et al. (2020), section 5.
RANDOM_START_STEP = 1.25


def fgsm(
    classifier: Classifier,
    x_BCHW: Tensor,
    y_B: Tensor,
    budget: Budget,
    generator: torch.Generator,
    *,
    random_start: bool = False,
) -> Tensor:
    """Returns images after one step of steepest ascent of the cross entropy.

    From the clean image the step is as long as the radius; from a random start it is 1.25 times as long and the
    result is projected back.

    Guarantees: within the budget and [0, 1]; radius 0 returns the images unchanged; the classifier is left as found.
    Cost: one forward and one backward pass to the images.
    References: Goodfellow et al. (2015), equation 1; Wong et al. (2020), Algorithm 3.

    Args:
        classifier: The classifier under attack.
        x_BCHW: Clean images in [0, 1].
        y_B: True labels.
        budget: What may be changed; for "l2" the step follows the gradient's direction instead of its sign.
        generator: Source of the random start.
        random_start: Start at a random point of the ball.
    """
    if budget.radius == 0 or len(x_BCHW) == 0:
        return x_BCHW.clone()
    with frozen(classifier):
        start_BCHW = draw_start(x_BCHW, budget, generator) if random_start else x_BCHW
        _, gradient_BCHW = logits_and_gradient(classifier, start_BCHW, lambda z: cross_entropy(z, y_B))
        step_size = budget.radius * (RANDOM_START_STEP if random_start else 1.0)
        return project(start_BCHW + steepest_step(gradient_BCHW, step_size, budget.norm), x_BCHW, budget)
