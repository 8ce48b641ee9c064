"""Which configurations are worth choosing between: those that no other beats in everything at once."""

from collections.abc import Sequence
from typing import NamedTuple

from trilemma.report.claims import Claim
from trilemma.report.configurations import Headline, Row


class Point(NamedTuple):
    """Where a configuration stands on the four axes.

    Attributes:
        utility: AUROC or accuracy, higher is better.
        epsilon: Lower is better; infinity where no guarantee holds.
        robust: Robust accuracy, higher is better; 0 for a model at or below the majority class.
        file_bytes: Lower is better.
        claim: What epsilon is about, or None without a guarantee.
    """

    utility: float
    epsilon: float
    robust: float
    file_bytes: float
    claim: Claim | None


def dominates(a: Point, b: Point) -> bool:
    """Returns whether a is at least as good as b in everything and better in something.

    Any guarantee is at least as good as none. Two that do not claim the same (unit, delta, trust, source of the noise)
    cannot be compared, so neither is at least as good as the other.
    """
    if b.epsilon != float("inf") and a.claim != b.claim:
        return False
    ours = (a.utility, -a.epsilon, a.robust, -a.file_bytes)
    theirs = (b.utility, -b.epsilon, b.robust, -b.file_bytes)
    return all(x >= y for x, y in zip(ours, theirs, strict=True)) and ours != theirs


def pareto_optimal(points: Sequence[Point | None]) -> tuple[bool, ...]:
    """Returns for each point whether no other dominates it; equal points are all marked.

    A point that is None has a number missing: it is neither marked nor does it dominate.
    """
    known = [point for point in points if point is not None]
    return tuple(point is not None and not any(dominates(other, point) for other in known) for point in points)


def robust_score(row: Row, by: Headline) -> float | None:
    """Returns the least known robust accuracy, 0 at or below the majority class, None where there is none or withheld.

    A model that an attacker pushes to or below what a constant answer reaches is not robust, however it got there.
    Without an attack in the study every row scores 0, so that the axis separates nothing.
    """
    if not by.evaluation:
        return 0.0
    value = row.under(by.evaluation, by.radius).robust.judged
    if value is None or row.majority is None:
        return value
    return value if value > row.majority else 0.0


def point(row: Row, by: Headline) -> Point | None:
    """Returns where a row stands, or None where a number is missing."""
    utility, robust, size = row.metric(by.utility).value, robust_score(row, by), row.file_bytes.value
    if utility is None or robust is None or size is None:
        return None
    return Point(utility, float("inf") if row.epsilon is None else row.epsilon, robust, size, row.claim)


def is_choice(row: Row) -> bool:
    """Returns whether a federation could choose this row.

    Pooling all images is a yardstick and not a choice, and nobody chooses a model that answers the same for every
    image, however private it is.
    """
    return row.kind("algorithm") != "centralised" and not row.constant


def pareto_rows(rows: Sequence[Row], by: Headline) -> tuple[bool, ...]:
    """Returns for each row whether it is Pareto-optimal among the rows that met the same conditions.

    Data, partition and threat are met and not chosen, so rows compete only where these are equal, and a
    configuration that is alone under its conditions is not marked. Rows that are no choice stay out.
    """
    places: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        if is_choice(row):
            places.setdefault(row.conditions, []).append(index)
    marked = [False] * len(rows)
    for indices in places.values():
        if len(places) > 1 and len({rows[i].configuration for i in indices}) == 1:
            continue
        optimal = pareto_optimal([point(rows[i], by) for i in indices])
        for index, is_optimal in zip(indices, optimal, strict=True):
            marked[index] = is_optimal
    return tuple(marked)
