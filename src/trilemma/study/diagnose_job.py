"""The job that looks whether an artefact's robustness is real, with the attacks of the study as further evidence."""

import time

from trilemma.evaluation.bounds import bounds
from trilemma.evaluation.diagnostics import Tried, examined, judged
from trilemma.evaluation.flags import diagnostic_measurements
from trilemma.evaluation.measurement import on_split
from trilemma.evaluation.specs import Diagnostics
from trilemma.study.evaluate_job import open_target
from trilemma.study.plan import Cell
from trilemma.study.provenance import provenance
from trilemma.study.rows import EvaluationRow
from trilemma.study.workplace import Workplace


def diagnose_job(place: Workplace, cell: Cell, spec: Diagnostics, key: str, tried: Tried) -> EvaluationRow:
    """Diagnoses one artefact within one budget.

    Args:
        place: Where jobs run.
        cell: The artefact.
        spec: The budget, and how many images are looked at.
        key: Of the evaluation, which names what was tried too.
        tried: What the study has tried on the artefact within this budget.
    """
    place.enter()
    started, training = time.perf_counter(), cell.training.spec
    test, target = place.dataset(training.data).test, open_target(place, cell)
    evidence = examined(target, test, spec.budget, training.seed, num_images=spec.num_images, tried=tried)
    measurements = []
    if evidence is not None:
        measurements += diagnostic_measurements(judged(evidence))
        measurements += bounds(evidence, test, spec.num_images, training.seed, {**tried.white, **tried.elsewhere})
    return EvaluationRow(
        key=key,
        artefact_key=cell.key,
        spec={**spec.model_dump(mode="json"), "label": spec.label},
        provenance=provenance(place.torch_device),
        seconds=time.perf_counter() - started,
        measurements=on_split(measurements, training.data.evaluate_on),
    )
