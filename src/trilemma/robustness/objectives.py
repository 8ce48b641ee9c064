"""Training objectives: plain training and training on adversarial images.

Each record's views depend on that record, the weights and data-independent draws only. This, and that the views
of a record count as one record when gradients are clipped, keeps DP-SGD's guarantee.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

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

    return objective._replace(loss=loss)


def taught(objective: Objective, answers: Callable[[Tensor], Tensor], share: float) -> Objective:
    """Returns an objective that is given the answers of a teacher beside the labels (Hinton et al. 2015, section 2).

    Their temperature is 1 here. Images are attacked as ever, away from their labels. The teacher is fixed, so that each
    record's target depends on that record alone.

    Args:
        objective: Whose loss takes shares of the classes in place of labels: any but MART's.
        answers: x_BCHW -> the teacher's logits_BK.
        share: Of the target that is the teacher's answer, in [0, 1].
    """

    def targets(x_BCHW: Tensor, y_B: Tensor) -> Tensor:
        p_BK = answers(x_BCHW).softmax(dim=-1)
        return share * p_BK + (1 - share) * F.one_hot(y_B, p_BK.shape[-1])

    return objective._replace(targets=targets)


def mean_cross_entropy(logits_BVK: Tensor, y_B: Tensor) -> Tensor:
    """Returns the cross entropy of each record averaged over its views, shape (B,); `y_B` may be shares p_BK too."""
    log_p_BVK = logits_BVK.log_softmax(dim=-1)
    if y_B.is_floating_point():
        return -(y_B[:, None] * log_p_BVK).sum(dim=-1).mean(dim=1)
    index_BV1 = y_B[:, None, None].expand(-1, logits_BVK.shape[1], 1)
    return -log_p_BVK.gather(-1, index_BV1).squeeze(-1).mean(dim=1)


def _clean_view(classifier: Classifier, x_BCHW: Tensor, y_B: Tensor, generator: torch.Generator) -> Tensor:
    return x_BCHW[:, None]
