"""What attacks leave of a configuration, and how strong the study's attacks are."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from trilemma.evaluation.measurement import Measurement
from trilemma.report import numbers
from trilemma.report.cells import Cell
from trilemma.report.estimates import Estimate, estimate

#: Under which the robust accuracies are kept with the least that is known in the place of those that are too high.
_LEAST = "least"


@dataclass(frozen=True)
class Attacked:
    """A configuration under one attack at one radius, over all records and the worst source.

    Attributes:
        evaluation: The evaluation's label, such as "PGD-10 Linf".
        strength: Of the attack, as in `evaluation.strength`; of two the higher one judges.
        radius: In pixel units.
        robust: Robust accuracy: right on the clean image and on the attacked one.
        among_correct: The same among the images that were right before the attack.
        robust_auroc: AUROC where every image was driven to its highest margin; few attacks measure it.
        sensitivity: Under attack, as a share of all positive images.
        specificity: Under attack, as a share of all negative images.
    """

    evaluation: str
    strength: int
    radius: float
    robust: Estimate = field(default_factory=Estimate)
    among_correct: Estimate = field(default_factory=Estimate)
    robust_auroc: Estimate = field(default_factory=Estimate)
    sensitivity: Estimate = field(default_factory=Estimate)
    specificity: Estimate = field(default_factory=Estimate)


class Scored(NamedTuple):
    """A robust AUROC with the attack that measured it.

    Attributes:
        estimate: The AUROC, or why there is none.
        evaluation: The attack's label, or "" where none measured it.
    """

    estimate: Estimate
    evaluation: str


def attacked(cells: Iterable[Cell]) -> tuple[Attacked, ...]:
    """Returns what every attack and radius leaves of some cells of one configuration, over their seeds."""
    samples: dict[tuple[str, int, float], dict[str, list[tuple[int, Measurement]]]] = {}
    for cell in cells:
        for evaluated in cell.evaluated:
            for m in evaluated.measurements:
                if evaluated.strength is not None and m.radius is not None and m.source is None and m.client is None:
                    at = samples.setdefault((evaluated.evaluation, evaluated.strength, m.radius), {})
                    at.setdefault(m.metric, []).append((cell.run.seed, m))
                    if m.metric == "robust_accuracy":
                        at.setdefault(_LEAST, []).append((cell.run.seed, m))
                    elif m.metric == "robust_accuracy_known":  # which stands behind the one that it speaks of
                        at[_LEAST][-1] = (cell.run.seed, m)
    return tuple(
        Attacked(
            *where,
            robust=_with_least(by_metric.get("robust_accuracy", []), by_metric.get(_LEAST, [])),
            among_correct=estimate(by_metric.get("robust_accuracy_among_correct", [])),
            robust_auroc=estimate(by_metric.get("robust_auroc", [])),
            sensitivity=estimate(by_metric.get("sensitivity", [])),
            specificity=estimate(by_metric.get("specificity", [])),
        )
        for where, by_metric in samples.items()
    )


def _with_least(robust: list[tuple[int, Measurement]], least: list[tuple[int, Measurement]]) -> Estimate:
    """Returns a robust accuracy and, where some training's is known to be too high, the least that is left."""
    found, num_bounds = estimate(robust), sum(m.status == "bound" for _, m in robust)
    left = estimate((seed, m._replace(status="ok") if m.status == "bound" else m) for seed, m in least)
    if found.value is None or left.value is None or not num_bounds:
        return found
    where = f" of {num_bounds} of {len(robust)} trainings" if num_bounds < len(robust) else ""
    reason = f"{found.reason}{where}; with that {numbers.percent(left.value)} are left"
    return replace(found, reason=reason, least=left.value)


def scored(found: Iterable[Attacked], evaluation: str, radius: float) -> Scored:
    """Returns the robust AUROC at a radius: that of an attack itself, or the lowest that others in its norm measured.

    An attack that stops when an answer changes measures none; a full-budget one beside it does. Where one of the
    attacks was withheld, all are: they are of one norm.
    """
    norm = _norm(evaluation)
    near = [a for a in found if a.radius == radius and (a.evaluation == evaluation or _norm(a.evaluation) == norm)]
    of_metric = [a for a in near if a.robust_auroc.value is not None or a.robust_auroc.withheld]
    own = [a for a in of_metric if a.evaluation == evaluation]
    chosen = min(own or of_metric, key=lambda a: (a.robust_auroc.value or 0.0, a.evaluation), default=None)
    if chosen is not None:
        return Scored(chosen.robust_auroc, chosen.evaluation)
    reasons = [a.robust_auroc for a in near if a.evaluation == evaluation]
    return Scored(reasons[0] if reasons else Estimate(), "")


def _norm(evaluation: str) -> str:
    """Returns the norm with which the label of every attack ends, "Linf" or "L2"; two of one norm can be compared."""
    return evaluation.rpartition(" ")[2]
