"""The train-time attack of Usynin et al. (2022): adversarial images with the labels that the model gave them."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.frozen import frozen
from trilemma.attacks.evasion.pgd import pgd
from trilemma.attacks.poisoning.selection import choose_records
from trilemma.data.records import Records
from trilemma.models.classifier import Classifier

_BATCH_SIZE = 256


def adversarial_samples(
    records: Records,
    classifier: Classifier,
    budget: Budget,
    generator: torch.Generator,
    *,
    share: float,
    steps: int,
    drawn: np.ndarray | None = None,
) -> Records:
    """Returns the records with a share of them replaced by adversarial images and the model's answers to those.

    The images are made by PGD against the round's global model, which every client receives. Images stored as
    uint8 stay so: the perturbation is cut off towards the clean image, which keeps it in the budget.

    Guarantees: exactly round(share * n) records are replaced; every other record, the patients, sites, names and
    order are the same; the argument and the classifier are left as they were.
    References: Usynin et al. (2022), train-time attack.

    Args:
        records: A malicious client's training records.
        classifier: The global model at the start of the round.
        budget: What may be changed in an image.
        generator: Chooses the records and the random starts.
        share: Fraction of the records that are replaced.
        steps: PGD steps.
        drawn: Positions of the records that the round looks at, ascending: only these are worth the work. None: all.
    """
    chosen = choose_records(len(records), share, generator)
    if drawn is not None:
        chosen = np.intersect1d(chosen, drawn)
    images_NCHW, labels_N = np.array(records.images_NCHW), records.labels_N.copy()
    images_NCHW[chosen] = perturbed(records, chosen, classifier, budget, generator, steps)
    answered = replace(records, images_NCHW=images_NCHW)
    with frozen(classifier), torch.no_grad():
        for index in _batches(chosen):
            labels_N[index] = classifier(answered.x(index).to(classifier.device)).argmax(dim=1).cpu().numpy()
    return replace(answered, labels_N=labels_N)


def perturbed(
    records: Records,
    chosen: np.ndarray,
    classifier: Classifier,
    budget: Budget,
    generator: torch.Generator,
    steps: int,
) -> np.ndarray:
    """Returns some images after PGD away from their labels, as they are stored: uint8 stays uint8, in the budget.

    Args:
        records: A malicious client's training records.
        chosen: Positions of the images.
        classifier: What PGD looks at.
        budget: What may be changed in an image.
        generator: Of the random starts.
        steps: PGD steps.
    """
    images_BCHW = np.array(records.images_NCHW[chosen])
    for start, index in zip(range(0, len(chosen), _BATCH_SIZE), _batches(chosen), strict=True):
        x_BCHW, y_B = records.x(index), records.y(index).to(classifier.device)
        x = x_BCHW.to(classifier.device)
        x_adv_BCHW = pgd(classifier, x, y_B, budget, generator, steps=steps, stop=False).cpu()
        x_adv_BCHW = _as_stored(x_adv_BCHW, x_BCHW, images_BCHW.dtype)
        stored_BCHW = _levels(x_adv_BCHW) if images_BCHW.dtype == np.uint8 else x_adv_BCHW.numpy()
        images_BCHW[start : start + len(index)] = stored_BCHW
    return images_BCHW


def _batches(chosen: np.ndarray) -> list[np.ndarray]:
    return [chosen[start : start + _BATCH_SIZE] for start in range(0, len(chosen), _BATCH_SIZE)]


def _as_stored(x_adv_BCHW: Tensor, x_BCHW: Tensor, dtype: np.dtype) -> Tensor:
    """Returns the images as they can be stored: for uint8 whole levels of 255, cut off towards the clean image."""
    if dtype != np.uint8:
        return x_adv_BCHW
    # Float rounding puts a perturbation of 8 levels at 7.99999; a thousandth of a level is above all rounding.
    delta_BCHW = (x_adv_BCHW - x_BCHW) * 255.0
    whole_BCHW = (delta_BCHW + 1e-3 * delta_BCHW.sign()).trunc()
    return ((x_BCHW * 255.0).round() + whole_BCHW).clamp(0.0, 255.0) / 255.0


def _levels(x_BCHW: Tensor) -> np.ndarray:
    return (x_BCHW * 255.0).round().to(torch.uint8).numpy()
