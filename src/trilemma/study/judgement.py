"""Which of the measured numbers may be read: doubtful ones are withheld, those known to be too high are marked."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.attack import Attack
from trilemma.evaluation.bounds import Known, known_from, marked, told
from trilemma.evaluation.flags import withheld
from trilemma.evaluation.measurement import Measurement
from trilemma.evaluation.specs import AllAtOnce, Diagnostics, EvaluationSpec, Transfer
from trilemma.evaluation.strength import strength
from trilemma.results import Evaluated
from trilemma.study.rows import EvaluationRow

ATTACKS = (Attack, Transfer, AllAtOnce)

#: Why robust accuracies are withheld until it has been looked whether they are real.
NOT_DIAGNOSED = "withheld until the diagnostics have run"


class Found(NamedTuple):
    """An evaluation of an artefact as it was measured.

    Attributes:
        key: Of its row, or of the combined one where it has several.
        spec: What was asked for.
        evaluated: What was measured, nothing marked or withheld.
    """

    key: str
    spec: EvaluationSpec
    evaluated: Evaluated


def doubts_of(diagnosed: Iterable[tuple[Budget, EvaluationRow | None]]) -> dict[Budget, str]:
    """Returns why robustness within each budget is withheld: raised flags, or diagnostics that were not made; or "".

    Args:
        diagnosed: Every diagnosis of one artefact, None for one that is missing.
    """
    doubts: dict[Budget, list[str]] = {}
    hidden: dict[str, list[str]] = {}
    for budget, row in diagnosed:
        doubts.setdefault(budget, []).append(withheld(row.measurements) if row else NOT_DIAGNOSED)
        hidden.setdefault(budget.norm, []).append(withheld(row.measurements, elsewhere=True) if row else "")
    return {budget: _joined(own) or _elsewhere(hidden[budget.norm]) for budget, own in doubts.items()}


def judged(found: Sequence[Found], doubts: Mapping[Budget, str]) -> list[Evaluated]:
    """Returns evaluations with what may be read of them: bounds are marked, doubtful values withheld.

    Args:
        found: Everything that was measured of one artefact.
        doubts: As `doubts_of` returns them, for every budget of `found`.
    """
    known = [what for each in found for what in _known_of(each)]
    return [_judged(each, known, doubts) for each in found]


def _known_of(found: Found) -> list[Known]:
    spec, evaluated = found.spec, found.evaluated
    if not isinstance(spec, (Diagnostics, *ATTACKS)):
        return []
    label = "" if isinstance(spec, Diagnostics) else evaluated.evaluation
    return known_from(found.key, label, spec.norm, evaluated.measurements)


def _judged(found: Found, known: Sequence[Known], doubts: Mapping[Budget, str]) -> Evaluated:
    spec, evaluated = found.spec, found.evaluated
    if isinstance(spec, Diagnostics):
        within = {spec.radius: doubts[spec.budget]}
        measurements = told(evaluated.measurements)
        shown = (_withheld(m, within) if m.metric == "robust_accuracy_bound" else m for m in measurements)
        return replace(evaluated, measurements=tuple(shown))
    if not isinstance(spec, ATTACKS):
        return evaluated
    measurements = marked(found.key, evaluated.evaluation, spec.norm, evaluated.measurements, known)
    within = {budget.radius: doubts[budget] for budget in spec.budgets}
    measurements = tuple(_withheld(measurement, within) for measurement in measurements)
    return replace(evaluated, measurements=measurements, strength=strength(spec))


def _elsewhere(hidden: list[str]) -> str:
    """Returns why nothing is believed within a radius where no flag was raised: one was within another radius."""
    why = _joined(hidden)
    return f"within another radius of this norm {why}" if why else ""


def _joined(reasons: list[str]) -> str:
    return "; ".join(dict.fromkeys(filter(None, reasons)))


def _withheld(measurement: Measurement, doubts: Mapping[float, str]) -> Measurement:
    """Returns a measurement under attack without its value where there is a doubt at its radius."""
    doubt = doubts.get(measurement.radius, "") if measurement.radius is not None else ""
    if measurement.value is None or not doubt:
        return measurement
    return measurement._replace(value=None, low=None, high=None, status="withheld", reason=doubt)
