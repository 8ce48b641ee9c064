"""Label flipping: the images stay, some labels lie."""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from trilemma.attacks.poisoning.selection import choose_among
from trilemma.data.records import Records

FlipMode = Literal["random", "next", "targeted"]


def label_flip(
    records: Records,
    num_classes: int,
    generator: torch.Generator,
    *,
    mode: FlipMode = "random",
    share: float = 1.0,
    source: int | None = None,
    target: int | None = None,
) -> Records:
    """Returns the records with a share of their labels changed to another class.

    Guarantees: of the n records that may be changed exactly round(share * n) labels differ; images, patients, sites,
    names and order are the same; the argument is left as it was.
    References: Biggio et al. (2011), section 4, with labels drawn at random; Tolpegin et al. (2020), section 3, from
    one class to another.

    Args:
        records: A malicious client's training records.
        num_classes: At least 2.
        generator: Chooses the records and the random labels.
        mode: "random": uniform over the other classes. "next": the following class, the first after the last.
            "targeted": `target`.
        share: Of the records that may be changed.
        source: Only records of this class may be; None: of any, but for the target's own.
        target: The class of a targeted flip.
    """
    allowed_N = np.full(len(records), True) if source is None else records.labels_N == source
    if mode == "targeted":
        allowed_N = allowed_N & (records.labels_N != target)
    chosen = choose_among(np.flatnonzero(allowed_N), share, generator)
    labels_N = records.labels_N.copy()
    if mode == "targeted":
        labels_N[chosen] = target
        return replace(records, labels_N=labels_N)
    if mode == "next":
        shift = np.ones(len(chosen), dtype=np.int64)
    else:
        drawn = torch.randint(1, num_classes, (len(chosen),), generator=generator, device=generator.device)
        shift = drawn.cpu().numpy()
    labels_N[chosen] = (labels_N[chosen] + shift) % num_classes
    return replace(records, labels_N=labels_N)
