"""A backdoor in the records: images with a trigger, and the class that the attacker wants for them."""

from dataclasses import replace

import numpy as np
import torch

from trilemma.attacks.budget import Budget
from trilemma.attacks.poisoning.adversarial_samples import perturbed
from trilemma.attacks.poisoning.selection import choose_among
from trilemma.attacks.poisoning.triggers import Mark, triggered
from trilemma.data.records import Records
from trilemma.models.classifier import Classifier


def backdoor(records: Records, mark: Mark, target: int, generator: torch.Generator, *, share: float) -> Records:
    """Returns the records with the trigger on a share of those of the other classes, which become the target's.

    Guarantees: exactly round(share * n) of the n records of other classes are changed, no other.
    References: Gu et al. (2017), section 3; with a blended mark Chen et al. (2017).

    Args:
        records: A malicious client's training records.
        mark: The trigger, or a part of it.
        target: The class that triggered images shall be given.
        generator: Chooses the records.
        share: Of the records of other classes.
    """
    chosen = choose_among(np.flatnonzero(records.labels_N != target), share, generator)
    images_NCHW, labels_N = np.array(records.images_NCHW), records.labels_N.copy()
    images_NCHW[chosen] = triggered(images_NCHW[chosen], mark)
    labels_N[chosen] = target
    return replace(records, images_NCHW=images_NCHW, labels_N=labels_N)


def clean_label_backdoor(
    records: Records,
    classifier: Classifier,
    mark: Mark,
    target: int,
    generator: torch.Generator,
    *,
    share: float,
    budget: Budget,
    steps: int,
    drawn: np.ndarray | None = None,
) -> Records:
    """Returns the records with the trigger on a share of the target's own images, whose labels stay true.

    Before that the images are made hard to tell by PGD against the global model, so that the trigger is what is left to
    learn.

    Guarantees: exactly round(share * n) of the n records of the target are changed (of those drawn), and no label.
    References: Turner et al. (2019), section 4.2.

    Args:
        records: A malicious client's training records.
        classifier: The global model at the start of the round.
        mark: The trigger, or a part of it.
        target: The class that triggered images shall be given.
        generator: Chooses the records and the random starts.
        share: Of the target's records.
        budget: What PGD may change.
        steps: Of PGD.
        drawn: Positions of the records that the round looks at, ascending: only these are worth the work. None: all.
    """
    chosen = choose_among(np.flatnonzero(records.labels_N == target), share, generator)
    if drawn is not None:
        chosen = np.intersect1d(chosen, drawn)
    images_NCHW = np.array(records.images_NCHW)
    images_NCHW[chosen] = triggered(perturbed(records, chosen, classifier, budget, generator, steps), mark)
    return replace(records, images_NCHW=images_NCHW)
