"""From records to the units that a plan samples and clips: an image is one, or all images of a patient together."""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from trilemma.models.classifier import Classifier
from trilemma.privacy.clipping import ClippedSum, RecordLoss
from trilemma.privacy.plan import PrivacyPlan

#: The positions of each unit's records.
Units = tuple[np.ndarray, ...]

#: Images of one unit, with their views, that the gradient engine takes at once; a larger unit's gradient is added up.
IMAGES_TOGETHER = 64


def patients(patients_N: np.ndarray) -> Units:
    """Returns the records of each patient, ascending, patients in the order of their codes; all must be known."""
    order_N = np.argsort(patients_N, kind="stable")
    starts = np.flatnonzero(np.diff(patients_N[order_N])) + 1
    return tuple(np.split(order_N, starts)) if len(patients_N) else ()


def whole_units(sizes_U: Sequence[int], most: int) -> Iterator[slice]:
    """Yields neighbouring units of at most `most` images together, or one larger unit alone; of no unit, none of them.

    There is always a first slice: a step that samples nobody has a clipped sum too, which is zero.
    """
    start, images = 0, 0
    for unit, size in enumerate(sizes_U):
        if unit > start and images + size > most:
            yield slice(start, unit)
            start, images = unit, 0
        images += size
    yield slice(start, len(sizes_U))


def added(sums: Iterable[ClippedSum]) -> ClippedSum:
    """Returns the clipped sum of units that came in parts, at least one; each sum is as large as the model.

    The small numbers are joined at each part and not at the end: strewn between the images of all parts they would
    keep the allocator from using that memory again.
    """
    return reduce(_both, sums)


def _both(one: ClippedSum, other: ClippedSum) -> ClippedSum:
    numbers = zip(one[1:], other[1:], strict=True)
    return ClippedSum(one.sum_P + other.sum_P, *(torch.cat(pair) for pair in numbers))


def unit_gradient_sum(
    plan: PrivacyPlan,
    classifier: Classifier,
    loss: RecordLoss,
    views: tuple[Tensor, Tensor],
    sizes_U: Sequence[int],
    clip: float | None,
) -> ClippedSum:
    """Returns the sum of clipped gradients, one of each unit, whose loss is the mean of its images' losses.

    Units with equally many images go to the gradient engine together, and the sums are added. A unit with very many
    images goes alone, part by part, so that memory stays bounded whatever a patient brings along.

    Args:
        plan: Clips.
        classifier: Its trainable parameters are differentiated.
        loss: Of each image over its views.
        views: (x_IVCHW, y_I): all images with their views, unit by unit; in place of the labels the loss may take p_IK.
        sizes_U: Images of each unit; at least 1.
        clip: The current one; None for the plan's first.
    """
    x_IVCHW, y_I = views
    if all(size == 1 for size in sizes_U):
        return plan.gradient_sum(classifier, loss, x_IVCHW, y_I, clip)
    return added(_sums_by_size(plan, classifier, loss, views, sizes_U, clip))


def _sums_by_size(
    plan: PrivacyPlan,
    classifier: Classifier,
    loss: RecordLoss,
    views: tuple[Tensor, Tensor],
    sizes_U: Sequence[int],
    clip: float | None,
) -> Iterator[ClippedSum]:
    """Yields the clipped sums of the units with equally many images, and of each large unit."""
    x_IVCHW, y_I = views
    starts_U = np.cumsum([0, *sizes_U[:-1]])
    for size in sorted(set(sizes_U)):
        first_B = starts_U[np.asarray(sizes_U) == size]
        if size * x_IVCHW.shape[1] > IMAGES_TOGETHER:
            for first in first_B:
                unit = slice(first, first + size)
                yield _large_unit(plan, classifier, loss, (x_IVCHW[unit], y_I[unit]), clip)
        else:
            index_BS = torch.from_numpy(first_B[:, None] + np.arange(size)).to(y_I.device)
            x_BWCHW = x_IVCHW[index_BS].flatten(1, 2)
            yield plan.gradient_sum(classifier, mean_over_images(loss), x_BWCHW, y_I[index_BS], clip)


def _large_unit(
    plan: PrivacyPlan, classifier: Classifier, loss: RecordLoss, views: tuple[Tensor, Tensor], clip: float | None
) -> ClippedSum:
    """Returns the clipped gradient of one unit, added up over parts of its images and clipped as a whole."""
    x_SVCHW, y_S = views
    trainable = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    part = max(1, IMAGES_TOGETHER // x_SVCHW.shape[1])
    gradient_P, total = torch.zeros(sum(map(torch.numel, trainable)), device=y_S.device), x_SVCHW.new_zeros(())
    for x_IVCHW, y_I in zip(x_SVCHW.split(part), y_S.split(part), strict=True):
        logits_IVK = classifier(x_IVCHW.flatten(0, 1)).unflatten(0, x_IVCHW.shape[:2])
        losses = loss(logits_IVK, y_I).sum() / len(y_S)
        gradients = torch.autograd.grad(losses, trainable, allow_unused=True, materialize_grads=True)
        gradient_P += torch.cat([gradient.flatten() for gradient in gradients])
        total += losses.detach()
    return plan.clipped_alone(gradient_P, total, classifier, clip)


def mean_over_images(loss: RecordLoss) -> RecordLoss:
    """Returns the loss of units with S images each: (logits_BWK, y_BS) -> loss_B, where W is S times the views.

    In place of the labels there may be shares of the classes, p_BSK.
    """

    def mean_loss(logits_BWK: Tensor, y_BS: Tensor) -> Tensor:
        size = y_BS.shape[1]
        logits_IVK = logits_BWK.unflatten(1, (size, -1)).flatten(0, 1)
        return loss(logits_IVK, y_BS.flatten(0, 1)).unflatten(0, (-1, size)).mean(1)

    return mean_loss
