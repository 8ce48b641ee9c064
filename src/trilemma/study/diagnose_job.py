"""The job that looks whether an artefact's robustness is real, with the attacks of the study as further evidence."""

import time
from typing import NamedTuple

import numpy as np

from trilemma.evaluation.diagnostics import diagnose, diagnostic_measurements, transfer_beats_white_box
from trilemma.evaluation.measurement import on_split
from trilemma.evaluation.robustness import worst_logits
from trilemma.evaluation.specs import Diagnostics
from trilemma.study.evaluate_job import open_target
from trilemma.study.plan import Cell
from trilemma.study.provenance import provenance
from trilemma.study.rows import EvaluationRow
from trilemma.study.workplace import Workplace


class Tried(NamedTuple):
    """What the study has tried on an artefact at the diagnosed radius: logits on the whole test split.

    Attributes:
        clean_NK: On clean images.
        white: Under each white-box attack.
        transferred: On the images of each other training.
    """

    clean_NK: np.ndarray
    white: tuple[np.ndarray, ...]
    transferred: tuple[np.ndarray, ...]


def diagnose_job(place: Workplace, cell: Cell, spec: Diagnostics, key: str, tried: Tried) -> EvaluationRow:
    """Diagnoses one artefact within one budget.

    Args:
        place: Where jobs run.
        cell: The artefact.
        spec: The budget, and how many images are looked at.
        key: Of the evaluation, which names what was tried too.
        tried: What the study has tried.
    """
    place.enter()
    started, training = time.perf_counter(), cell.training.spec
    test = place.dataset(training.data).test
    flags = diagnose(open_target(place, cell), test, spec.budget, training.seed, num_images=spec.num_images)
    if tried.white and tried.transferred:
        white_NK, transferred_NK = (
            worst_logits(logits, tried.clean_NK, test.labels_N) for logits in (tried.white, tried.transferred)
        )
        flags.append(transfer_beats_white_box(white_NK, transferred_NK, test.labels_N, test.units(), spec.radius))
    return EvaluationRow(
        key=key,
        artefact_key=cell.key,
        spec={**spec.model_dump(mode="json"), "label": spec.label},
        provenance=provenance(place.torch_device),
        seconds=time.perf_counter() - started,
        measurements=on_split(diagnostic_measurements(flags), training.data.evaluate_on),
    )
