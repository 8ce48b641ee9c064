"""Robust accuracies that a study knows to be too high, because something else it tried leaves less of the same model.

What an attack leaves is an upper bound of what the best attack would leave. Where another attack within the same or a
smaller radius leaves more than a point less, or the diagnostics do, a reader must not take the number for robustness:
it is marked as a bound and not withheld, for how weak an attack is can be worth knowing.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from scipy.stats import binom

from trilemma.attacks.budget import Norm
from trilemma.evaluation.evidence import Evidence
from trilemma.evaluation.intervals import wilson
from trilemma.evaluation.measurement import Measurement
from trilemma.evaluation.significance import LEVEL, TOLERANCE, beyond_a_point


class Known(NamedTuple):
    """What something that was tried leaves of a model.

    Attributes:
        label: What was tried: an attack's label, or "" for the diagnostics.
        norm: "linf" or "l2".
        radius: In pixel units.
        left: The share of images that it leaves right.
        n: Images; for the diagnostics a sample of the others'.
    """

    label: str
    norm: Norm
    radius: float
    left: float
    n: int


def bound(evidence: Evidence) -> Measurement:
    """Returns the share of the diagnosed images that everything leaves right: an upper bound of robust accuracy."""
    left_N = evidence.left_N
    low, high = wilson(int(left_N.sum()), len(left_N))
    return Measurement(
        "robust_accuracy_bound", float(left_N.mean()), low, high, len(left_N), radius=evidence.budget.radius
    )


def known_from(label: str, norm: Norm, measurements: Iterable[Measurement]) -> list[Known]:
    """Returns what the measurements of an attack, or of diagnostics, say about a model, at every radius."""
    names = {"robust_accuracy", "robust_accuracy_bound"}
    own = [m for m in measurements if m.metric in names and m.source is None and m.client is None]
    return [Known(label, norm, m.radius, m.value, m.n) for m in own if m.value is not None and m.radius is not None]


def marked(
    label: str, norm: Norm, measurements: Sequence[Measurement], known: Sequence[Known]
) -> tuple[Measurement, ...]:
    """Returns the measurements of an attack with status "bound" at every radius where less is known to be left.

    Args:
        label: The attack's.
        norm: Its norm.
        measurements: Its own; those without a value stay as they are.
        known: What everything that was tried on the model leaves.
    """
    why = {own.radius: _why(own, known) for own in known_from(label, norm, measurements)}
    return tuple(
        m._replace(status="bound", reason=reason)
        if m.status == "ok" and m.radius is not None and (reason := why.get(m.radius, ""))
        else m
        for m in measurements
    )


def _why(own: Known, known: Iterable[Known]) -> str:
    """Returns what shows that a value is too high, of several what leaves the least; or ""."""
    lower = [k for k in known if k.norm == own.norm and k.radius <= own.radius and _leaves_less(k, own)]
    if not lower:
        return ""
    least = min(lower, key=lambda k: (k.left, k.label))
    who = f"“{least.label}” leaves" if least.label else "the attacks of the diagnostics leave"
    where = "" if least.radius == own.radius else f" within a smaller radius, {least.radius:.4g}"
    return f"an upper bound: {who} less{where}"


def _leaves_less(other: Known, own: Known) -> bool:
    """Returns whether something leaves more than a point less: on the same images, or beyond chance on some of them."""
    if other.label:
        return beyond_a_point(round((own.left - other.left) * own.n), own.n)
    least = max(0.0, min(1.0, own.left - TOLERANCE))
    return bool(binom.cdf(round(other.left * other.n), other.n, least) < LEVEL)
