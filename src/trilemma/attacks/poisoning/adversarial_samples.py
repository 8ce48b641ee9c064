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
    images_NCHW = np.array(records.images_NCHW)
    labels_N = records.labels_N.copy()
    for start in range(0, len(chosen), _BATCH_SIZE):
        index = chosen[start : start + _BATCH_SIZE]
        x_BCHW = records.x(index)
        y_B = records.y(index).to(classifier.device)
        x = x_BCHW.to(classifier.device)
        x_adv_BCHW = pgd(classifier, x, y_B, budget, generator, steps=steps, stop=False).cpu()
        x_adv_BCHW = _as_stored(x_adv_BCHW, x_BCHW, images_NCHW.dtype)
        with frozen(classifier), torch.no_grad():
            labels_N[index] = classifier(x_adv_BCHW.to(classifier.device)).argmax(dim=1).cpu().numpy()
        images_NCHW[index] = _levels(x_adv_BCHW) if images_NCHW.dtype == np.uint8 else x_adv_BCHW.numpy()
    return replace(records, images_NCHW=images_NCHW, labels_N=labels_N)


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
