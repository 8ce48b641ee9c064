"""Training objectives: plain training and training on adversarial images.

Each record's views depend on that record, the weights and data-independent draws only. This, and that the views
of a record count as one record when gradients are clipped, keeps DP-SGD's guarantee.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.types import Evasion
from trilemma.models.classifier import Classifier
from trilemma.robustness.objective import Objective


def standard() -> Objective:
    """Returns plain training: the cross entropy of the image itself."""
    return Objective(_clean_view, mean_cross_entropy)


def adversarial(attack: Evasion, budget: Budget, fraction: float = 1.0) -> Objective:
    """Returns training on adversarial images (Madry et al., 2018, equation 2.1).

    Args:
        attack: Crafts the images against the current weights.
        budget: What it may change.
        fraction: Probability with which a record is replaced by its adversarial image, drawn for each record
            alone; 0 is plain training.
    """

    def views(classifier: Classifier, x_BCHW: Tensor, y_B: Tensor, generator: torch.Generator) -> Tensor:
        draw_B = torch.rand(len(x_BCHW), generator=generator, device=generator.device)
        chosen_B = (draw_B < fraction).to(x_BCHW.device)
        if not chosen_B.any():
            return x_BCHW[:, None]
        if chosen_B.all():
            return attack(classifier, x_BCHW, y_B, budget, generator)[:, None]
        x_view_BCHW = x_BCHW.clone()
        x_view_BCHW[chosen_B] = attack(classifier, x_BCHW[chosen_B], y_B[chosen_B], budget, generator)
        return x_view_BCHW[:, None]

    return Objective(views, mean_cross_entropy)


def adjusted(objective: Objective, class_shares: Sequence[float]) -> Objective:
    """Returns an objective whose logits are raised by the logarithm of how frequent each class is.

    A model trained so answers as if all classes were equally frequent, whatever they are in its training images. Each
    record's loss still hangs on that record alone; the shares must be public where privacy is promised. Images are
    attacked as the model answers, without the shares: with two classes that makes no difference to a step's direction.

    References: Menon et al. (2021), equation 10, with their tau of 1.

    Args:
        objective: What is adjusted.
        class_shares: Share of each class in the training images, in label order; positive.
    """

    def loss(logits_BVK: Tensor, y_B: Tensor) -> Tensor:
        return objective.loss(logits_BVK + logits_BVK.new_tensor(class_shares).log(), y_B)

    return Objective(objective.views, loss)


def mean_cross_entropy(logits_BVK: Tensor, y_B: Tensor) -> Tensor:
    """Returns the cross entropy of each record averaged over its views, shape (B,)."""
    log_p_BVK = logits_BVK.log_softmax(dim=-1)
    index_BV1 = y_B[:, None, None].expand(-1, logits_BVK.shape[1], 1)
    return -log_p_BVK.gather(-1, index_BV1).squeeze(-1).mean(dim=1)


def _clean_view(classifier: Classifier, x_BCHW: Tensor, y_B: Tensor, generator: torch.Generator) -> Tensor:
    return x_BCHW[:, None]
