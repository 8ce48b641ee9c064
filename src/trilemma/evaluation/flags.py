"""What a sign of robustness that is not there looks like, how it is stored, and what it withholds."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from trilemma.evaluation.measurement import Measurement

#: What the metric of every flag begins with.
FLAG = "flag_"


class Flag(NamedTuple):
    """One sign of robustness that is not there.

    Attributes:
        name: Such as "zero_gradient".
        raised: Whether it was seen.
        evidence: What was seen, with numbers, and where it is raised what that means.
        value: The share of images that the flag speaks of.
        low: Lower end of Wilson's 95 % interval.
        high: Upper end.
        n: Images behind it.
        radius: Of the budget, in pixel units.
    """

    name: str
    raised: bool
    evidence: str
    value: float
    low: float
    high: float
    n: int
    radius: float


def diagnostic_measurements(flags: Sequence[Flag]) -> list[Measurement]:
    """Returns a measurement per flag: 1 where it is raised, else 0, with the evidence as the reason."""
    return [
        Measurement(
            f"{FLAG}{flag.name}", float(flag.raised), n=flag.n, unit="count", reason=flag.evidence, radius=flag.radius
        )
        for flag in flags
    ]


#: Flags that speak of a model within one radius; all others say that its gradients, or its twin, do not lead an attack.
OF_ONE_RADIUS = frozenset({"constant", "not_converged"})


def withheld(measurements: Iterable[Measurement], *, elsewhere: bool = False) -> str:
    """Returns why robust accuracies must not be reported, from the measurements of some flags, or "" where they may.

    Every flag withholds within its radius. With `elsewhere` those count that withhold at other radii of the norm, too:
    a model that hides its gradients within one radius is not believed within another. `logit_scaling` alone would
    leave an accuracy under margin losses as it is, but whoever repeats the study with the usual cross entropy measures
    another one, so that it withholds too.
    """
    raised = [m for m in measurements if m.metric.startswith(FLAG) and m.value]
    raised = [m for m in raised if not elsewhere or m.metric.removeprefix(FLAG) not in OF_ONE_RADIUS]
    return "; ".join(f"{m.metric.removeprefix(FLAG)}: {m.reason}" for m in raised)
