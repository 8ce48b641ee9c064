"""Images to train on that no attack on a finished model would make: last iterates, and starts beyond the radius."""

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.frozen import frozen, logits_and_gradient
from trilemma.attacks.evasion.geometry import random_start, steepest_step
from trilemma.attacks.evasion.losses import cross_entropy
from trilemma.attacks.evasion.pgd import climb
from trilemma.models.classifier import Classifier


def last_pgd_images(
    classifier: Classifier,
    x_BCHW: Tensor,
    y_B: Tensor,
    budget: Budget,
    generator: torch.Generator,
    *,
    steps: int,
    step_size: float | None = None,
) -> Tensor:
    """Returns the last images of projected gradient ascent on the cross entropy from a random start.

    Guarantees: within the budget and [0, 1]; radius 0 returns the images unchanged and draws nothing; the classifier
    is left as found; no image's result depends on another's.
    Cost: `steps` forward and backward passes to the images.
    References: Madry et al. (2018), section 2.1.

    Args:
        classifier: The classifier in training.
        x_BCHW: Clean images in [0, 1].
        y_B: True labels.
        budget: What may be changed.
        generator: Source of the random start.
        steps: Steps.
        step_size: Length of a step over the radius; None for 2.5 / steps.
    """
    if budget.radius == 0 or len(x_BCHW) == 0:
        return x_BCHW.clone()
    start_BCHW = random_start(x_BCHW, budget, generator)
    return climb(
        classifier, start_BCHW, x_BCHW, budget, lambda z: cross_entropy(z, y_B), steps=steps, step_size=step_size
    )


def nfgsm_images(
    classifier: Classifier,
    x_BCHW: Tensor,
    y_B: Tensor,
    budget: Budget,
    generator: torch.Generator,
    *,
    noise: float = 2.0,
    step_size: float = 1.0,
) -> Tensor:
    """Returns images after much noise and one step of steepest ascent, which are not moved back into the radius.

    Training on them does not break down suddenly, as training on one step from within the radius may.

    Guarantees: within [0, 1] and `noise + step_size` radii (not within the budget); radius 0 returns the images
    unchanged; the classifier is left as found; no image's result depends on another's.
    Cost: one forward and one backward pass to the images.
    References: de Jorge et al. (2022), Algorithm 1.

    Args:
        classifier: The classifier in training.
        x_BCHW: Clean images in [0, 1].
        y_B: True labels.
        budget: The norm, and the radius that noise and step are multiples of.
        generator: Source of the noise.
        noise: Radius over the budget's of the ball that the noise is uniform in; the paper's k.
        step_size: Length of the step over the radius; the paper's alpha.
    """
    if budget.radius == 0 or len(x_BCHW) == 0:
        return x_BCHW.clone()
    start_BCHW = random_start(x_BCHW, Budget(budget.norm, noise * budget.radius), generator)
    with frozen(classifier):
        _, gradient_BCHW = logits_and_gradient(classifier, start_BCHW, lambda z: cross_entropy(z, y_B))
    step_BCHW = steepest_step(gradient_BCHW, step_size * budget.radius, budget.norm)
    return start_BCHW.add_(step_BCHW).clamp_(0.0, 1.0)
