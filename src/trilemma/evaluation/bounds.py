"""Robust accuracies that a study knows to be too high, because something else it tried leaves less of the same model.

What an attack leaves is an upper bound of what the best attack would leave. Where another attack within the same or a
smaller radius leaves more than a point less, or the diagnostics do, a reader must not take the number for robustness:
it is marked as a bound and not withheld, for how weak an attack is can be worth knowing.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from scipy.special import bdtr as binomial_cdf

from trilemma.attacks.budget import Norm
from trilemma.data.records import Records
from trilemma.evaluation.evidence import Evidence, independent_sample
from trilemma.evaluation.intervals import wilson
from trilemma.evaluation.measurement import Measurement
from trilemma.evaluation.metrics import Floats
from trilemma.evaluation.significance import LEVEL, TOLERANCE, beyond_a_point

#: What is too high where something else leaves less; an AUROC says nothing about single images.
_MARKED = ("robust_accuracy", "robust_accuracy_among_correct")
#: Of an attack on the diagnosed images alone; its source is the key of the attack's evaluation.
_ON_SAMPLE = "robust_accuracy_on_sample"


class Known(NamedTuple):
    """What something that was tried leaves of a model.

    Attributes:
        key: Of its evaluation.
        label: What was tried: an attack's label, or "" for the diagnostics.
        norm: "linf" or "l2".
        radius: In pixel units.
        left: The share of images that it leaves right.
        n: Images; for the diagnostics a sample of the others'.
        sample: For the diagnostics: key of an evaluation -> the share of the sample that its attack leaves right.
    """

    key: str
    label: str
    norm: Norm
    radius: float
    left: float
    n: int
    sample: Mapping[str, float] = {}


def bounds(
    evidence: Evidence, test: Records, num_images: int, seed: int, tried: Mapping[str, Floats]
) -> list[Measurement]:
    """Returns what everything leaves of the diagnosed images, an upper bound of robust accuracy, and what each attack.

    Args:
        evidence: Of the model within a budget.
        test: The test split.
        num_images: As the evidence was gathered with.
        seed: As well.
        tried: Key of an evaluation -> logits on the whole test split.
    """
    positions_M, left_M = independent_sample(test, num_images, seed), evidence.left_N
    n, radius = len(left_M), evidence.budget.radius
    low, high = wilson(int(left_M.sum()), n)
    found = [Measurement("robust_accuracy_bound", float(left_M.mean()), low, high, n, radius=radius)]
    for key, logits_NK in tried.items():
        wrong_M = evidence.errors(logits_NK[positions_M]) | evidence.errors(evidence.clean_NK)
        found.append(Measurement(_ON_SAMPLE, float(1 - wrong_M.mean()), n=n, radius=radius, source=key))
    return found


def told(measurements: Iterable[Measurement]) -> tuple[Measurement, ...]:
    """Returns what a reader is told of some diagnostics: not what single attacks leave of their images."""
    return tuple(m for m in measurements if m.metric != _ON_SAMPLE)


def known_from(key: str, label: str, norm: Norm, measurements: Iterable[Measurement]) -> list[Known]:
    """Returns what the measurements of an attack, or of diagnostics, say about a model, at every radius."""
    measurements = list(measurements)
    sample = {m.source: m.value for m in measurements if m.metric == _ON_SAMPLE and m.source and m.value is not None}
    names = {"robust_accuracy", "robust_accuracy_bound"}
    own = [m for m in measurements if m.metric in names and m.source is None and m.client is None]
    return [
        Known(key, label, norm, m.radius, m.value, m.n, sample)
        for m in own
        if m.value is not None and m.radius is not None
    ]


def marked(
    key: str, label: str, norm: Norm, measurements: Sequence[Measurement], known: Sequence[Known]
) -> tuple[Measurement, ...]:
    """Returns the measurements of an attack with status "bound" wherever less is known to be left.

    Where that is so, another one says how much: "robust_accuracy_known", the least that anything leaves.

    Args:
        key: Of the attack's evaluation.
        label: The attack's.
        norm: Its norm.
        measurements: Its own; those without a value stay as they are.
        known: What everything that was tried on the model leaves.
    """
    least = {own.radius: _least(own, known) for own in known_from(key, label, norm, measurements)}
    found = []
    for m in measurements:
        lower = least.get(m.radius) if m.radius is not None and m.source is None and m.client is None else None
        marks = lower is not None and m.metric in _MARKED and m.status == "ok"
        found.append(m._replace(status="bound", reason=_why(lower, m.radius)) if lower and marks else m)
        if lower and m.metric == "robust_accuracy":
            why = _why(lower, m.radius)
            found.append(Measurement("robust_accuracy_known", lower.left, n=lower.n, radius=m.radius, reason=why))
    return tuple(found)


def _least(own: Known, known: Iterable[Known]) -> Known | None:
    """Returns what shows that a value is too high, of several what leaves the least, with that; or None."""
    near = [k for k in known if k.norm == own.norm and k.radius <= own.radius and _leaves_less(k, own)]
    lower = [k._replace(left=_left_of_all(k, own)) for k in near]
    return min(lower, key=lambda k: (k.left, k.label), default=None)


def _left_of_all(other: Known, own: Known) -> float:
    """Returns what something leaves of all images: of a sample's share, the attack's own less the difference there."""
    on_sample = other.sample.get(own.key) if own.radius == other.radius else None
    return min(own.left, other.left if on_sample is None else max(0.0, own.left - (on_sample - other.left)))


def _why(least: Known, radius: float | None) -> str:
    who = f"“{least.label}” leaves" if least.label else "the attacks of the diagnostics leave"
    where = "" if least.radius == radius else f" within a smaller radius, {least.radius:.4g}"
    return f"an upper bound: {who} less{where}"


def _leaves_less(other: Known, own: Known) -> bool:
    """Returns whether something leaves more than a point less.

    Of the same images of the same model that is a fact. The diagnostics see some of the images: there the attack must
    leave significantly more than they do, of these images where its answers within their radius are known, of all where
    they are not.
    """
    if other.label:
        return own.left - other.left > TOLERANCE
    if own.key in other.sample and own.radius == other.radius:
        return beyond_a_point(round((other.sample[own.key] - other.left) * other.n), other.n)
    least = max(0.0, min(1.0, own.left - TOLERANCE))
    return bool(binomial_cdf(round(other.left * other.n), other.n, least) < LEVEL)
