"""Objectives that look at each record twice, clean and attacked: TRADES and MART.

Both views of a record count as that record: its loss is one number, and its gradient is clipped as one.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.frozen import frozen
from trilemma.attacks.evasion.geometry import project
from trilemma.attacks.evasion.losses import cross_entropy
from trilemma.attacks.evasion.pgd import climb
from trilemma.attacks.evasion.types import Evasion
from trilemma.models.classifier import Classifier
from trilemma.robustness.objective import Objective

#: Standard deviation of TRADES' first step away from the clean image, where the divergence has no gradient.
FIRST_NOISE = 1e-3


def clean_and_attacked(
    attack: Evasion, budget: Budget
) -> Callable[[Classifier, Tensor, Tensor, torch.Generator], Tensor]:
    """Returns the views of an objective that looks at the clean image, then at the attacked one.

    Args:
        attack: Crafts the second view against the current weights.
        budget: What it may change.
    """

    def views(classifier: Classifier, x_BCHW: Tensor, y_B: Tensor, generator: torch.Generator) -> Tensor:
        return torch.stack([x_BCHW, attack(classifier, x_BCHW, y_B, budget, generator)], dim=1)

    return views


def trades(attack: Evasion, budget: Budget, beta: float) -> Objective:
    """Returns the cross entropy of the clean image plus `beta` times the divergence that an attack achieves.

    References: Zhang et al. (2019), equation 5; `beta` is their 1 / lambda.

    Args:
        attack: Maximises the divergence: `divergent_images`.
        budget: What it may change.
        beta: Weight of the answer's constancy against its being right.
    """
    return Objective(clean_and_attacked(attack, budget), partial(trades_loss, beta=beta))


def mart(attack: Evasion, budget: Budget, beta: float) -> Objective:
    """Returns the boosted cross entropy of the attacked image plus a divergence that weighs more where the model errs.

    References: Wang et al. (2020), equation 11; `beta` is their lambda.

    Args:
        attack: Maximises the cross entropy.
        budget: What it may change.
        beta: Weight of the divergence.
    """
    return Objective(clean_and_attacked(attack, budget), partial(mart_loss, beta=beta))


def divergent_images(
    classifier: Classifier,
    x_BCHW: Tensor,
    y_B: Tensor,
    budget: Budget,
    generator: torch.Generator,
    *,
    steps: int,
    step_size: float | None = None,
) -> Tensor:
    """Returns images whose answers diverge from those to the clean images; the labels play no part.

    Guarantees: within the budget and [0, 1]; radius 0 returns the images unchanged; the classifier is left as found; no
    image's result depends on another's.
    Cost: `steps` forward and backward passes to the images, and a forward pass for the clean ones.
    References: Zhang et al. (2019), Algorithm 1.

    Args:
        classifier: The classifier in training.
        x_BCHW: Clean images in [0, 1].
        y_B: Not looked at.
        budget: What may be changed.
        generator: Source of the Gaussian noise to start from.
        steps: Steps.
        step_size: Length of a step over the radius; None for 2.5 / steps.
    """
    if budget.radius == 0 or len(x_BCHW) == 0:
        return x_BCHW.clone()
    noise_BCHW = torch.randn(x_BCHW.shape, generator=generator, device=generator.device).to(x_BCHW)
    start_BCHW = project(x_BCHW + FIRST_NOISE * noise_BCHW, x_BCHW, budget)
    with frozen(classifier):
        with torch.no_grad():
            clean_BK = classifier(x_BCHW)
        return climb(
            classifier, start_BCHW, x_BCHW, budget, lambda z: divergence(clean_BK, z), steps=steps, step_size=step_size
        )


def divergence(clean_BK: Tensor, attacked_BK: Tensor) -> Tensor:
    """Returns KL(p || q) of the answers p to the clean and q to the attacked images, from their logits, shape (B,)."""
    log_p_BK, log_q_BK = clean_BK.log_softmax(dim=-1), attacked_BK.log_softmax(dim=-1)
    return F.kl_div(log_q_BK, log_p_BK, reduction="none", log_target=True).sum(dim=-1)


def trades_loss(logits_BVK: Tensor, y_B: Tensor, *, beta: float) -> Tensor:
    """Returns the loss of each record over its two views, shape (B,); gradients flow through both.

    `y_B` may be shares of the classes p_BK too.
    """
    clean_BK, attacked_BK = logits_BVK.unbind(dim=1)
    return cross_entropy(clean_BK, y_B) + beta * divergence(clean_BK, attacked_BK)


def mart_loss(logits_BVK: Tensor, y_B: Tensor, *, beta: float) -> Tensor:
    """Returns the loss of each record over its two views, shape (B,); gradients flow through both.

    The boosted cross entropy is -log q_y - log(1 - max over k != y of q_k), for answers q to the attacked image.
    """
    clean_BK, attacked_BK = logits_BVK.unbind(dim=1)
    p_true_B = clean_BK.softmax(dim=-1).gather(-1, y_B[:, None]).squeeze(-1)
    return boosted_cross_entropy(attacked_BK, y_B) + beta * divergence(clean_BK, attacked_BK) * (1 - p_true_B)


def boosted_cross_entropy(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Returns the cross entropy plus the negative log of what the likeliest wrong class leaves to others, shape (B,).

    What it leaves is summed from the other classes' shares, which loses no digits where it is nearly 0. With two
    classes both terms are the same.
    """
    log_q_BK = logits_BK.log_softmax(dim=-1)
    classes_K = torch.arange(logits_BK.shape[-1], device=logits_BK.device)
    wrong_BK = log_q_BK.detach().masked_fill(classes_K == y_B[:, None], -torch.inf)
    likeliest_B1 = wrong_BK.argmax(dim=-1, keepdim=True)
    others_BK = log_q_BK.masked_fill(classes_K == likeliest_B1, -torch.inf)
    return cross_entropy(logits_BK, y_B) - others_BK.logsumexp(dim=-1)
