"""One number with everything needed to read it."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

Status = Literal["ok", "bound", "undefined", "failed", "withheld"]


class Measurement(NamedTuple):
    """One measured value of one artefact under one evaluation.

    Missing is not zero: an undefined value is None with a status and a reason.

    Attributes:
        metric: Name from the glossary, such as "accuracy", "auroc", "robust_accuracy", "file_bytes".
        value: The number, or None.
        low: Lower end of the 95 % interval, or None where there is none (a file's size).
        high: Upper end.
        n: Records behind the number.
        unit: "fraction", "bytes", "seconds", "count", "coefficient", "multiply-adds".
        split: "test", "val" ...
        status: "ok", "bound" for a robust accuracy that is known to be too high, or why there is no value.
        reason: One sentence where status is not "ok", else "".
        radius: The attack's radius in pixel units, or None.
        source: The artefact on which a transferred attack was made, or None.
        client: The client whose records these are, "worst" for the worst client, or None for all records.
    """

    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    unit: str = "fraction"
    split: str = "test"
    status: Status = "ok"
    reason: str = ""
    radius: float | None = None
    source: str | None = None
    client: str | None = None


def on_split(measurements: Iterable[Measurement], split: str) -> tuple[Measurement, ...]:
    """Returns measurements as made on a split."""
    return tuple(measurement._replace(split=split) for measurement in measurements)


class Outcome(NamedTuple):
    """The logits of an artefact on every test record under one attack, kept so that nothing is measured twice.

    Attributes:
        logits_NK: float32, in the order of the test split.
        radius: The attack's radius, or None for clean images.
        source: The artefact on which the images were made, or None for the artefact itself.
    """

    logits_NK: np.ndarray
    radius: float | None = None
    source: str | None = None
