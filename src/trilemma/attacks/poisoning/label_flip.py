"""Label flipping: the images stay, some labels lie."""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from trilemma.attacks.poisoning.selection import choose_records
from trilemma.data.records import Records

FlipMode = Literal["random", "next"]


def label_flip(
    records: Records, num_classes: int, generator: torch.Generator, *, mode: FlipMode = "random", share: float = 1.0
) -> Records:
    """Returns the records with a share of their labels changed to another class.

    Guarantees: exactly round(share * n) labels differ; images, patients, sites, names and order are the same; the
    argument is left as it was.
    References: Biggio et al. (2011), section 4, with labels drawn at random.

    Args:
        records: A malicious client's training records.
        num_classes: At least 2.
        generator: Chooses the records and the random labels.
        mode: "random": uniform over the other classes. "next": the following class, the first after the last.
        share: Fraction of the records that are changed.
    """
    chosen = choose_records(len(records), share, generator)
    if mode == "next":
        shift = np.ones(len(chosen), dtype=np.int64)
    else:
        drawn = torch.randint(1, num_classes, (len(chosen),), generator=generator, device=generator.device)
        shift = drawn.cpu().numpy()
    labels_N = records.labels_N.copy()
    labels_N[chosen] = (labels_N[chosen] + shift) % num_classes
    return replace(records, labels_N=labels_N)
