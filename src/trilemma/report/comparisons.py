"""Pairs of configurations that differ in one thing, and the sentence about their difference."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from trilemma.report import numbers
from trilemma.report.configurations import UNCOMPRESSED, Row, counterpart
from trilemma.report.estimates import Difference, Estimate, difference

#: Fields that a study switches on; the plainest pair has the fewest of them on.
_SWITCHES = ("privacy", "defence", "threat")


class Pair(NamedTuple):
    """Two rows that differ in one thing.

    Attributes:
        changed: The row with the thing that is asked about.
        base: The row without it.
        exact: False where the two were also tuned differently (learning rate, rounds ...).
    """

    changed: Row
    base: Row
    exact: bool


class Effect(NamedTuple):
    """What a change did to one metric.

    Attributes:
        sign: 1 where more is shown, -1 where less is shown, 0 where no difference can be shown.
        difference: The difference.
        sentence: It in words, to follow a comma or a colon, with its full stop.
    """

    sign: int
    difference: Difference
    sentence: str


def pairs(
    rows: Sequence[Row], fields: Sequence[str], is_changed: Callable[[Row], bool], is_base: Callable[[Row], bool]
) -> list[Pair]:
    """Returns the pairs of rows that differ in nothing but some fields, plainest first.

    Uncompressed rows only, where there are any: what compression does is asked on its own. Only the pairs with
    as little else switched on as the plainest are returned.
    """
    compressions = {row.compression for row in rows}
    compared = [row for row in rows if row.compression == UNCOMPRESSED or UNCOMPRESSED not in compressions]
    found = []
    for row in compared:
        if is_changed(row):
            other, exact = counterpart(row, compared, fields, is_base)
            if other is not None:
                found.append(Pair(row, other, exact))
    fewest = min((_switched_on(pair, fields) for pair in found), default=0)
    return [pair for pair in found if _switched_on(pair, fields) == fewest]


def change(pair: Pair, metric: str) -> Effect | None:
    """Returns what a pair's difference did to a clean metric, or None where either side has no value."""
    return admitting(pair, side_by_side(pair.changed.metric(metric), pair.base.metric(metric), metric))


def admitting(pair: Pair, effect: Effect | None) -> Effect | None:
    """Returns an effect whose sentence admits it where a pair was tuned differently."""
    if effect is None or pair.exact:
        return effect
    return effect._replace(sentence=f"{effect.sentence} (The two were also tuned differently.)")


def side_by_side(first: Estimate, second: Estimate, metric: str, of: str = "") -> Effect | None:
    """Returns the effect between two estimates in words, or None where either has no value.

    Args:
        first: With the change.
        second: Without it.
        metric: How to write the numbers and what to call them.
        of: What the share is of, in place of the metric's name: "of the right answers".
    """
    gap = difference(first, second)
    if gap is None or first.value is None or second.value is None:
        return None
    written = [
        numbers.at_most(numbers.metric_value(metric, value), estimate)
        for value, estimate in ((first.value, first), (second.value, second))
    ]
    values = " against ".join(written)
    values = f"{values} {of}" if of else f"{numbers.metric_title(metric)} is {values}"
    if gap.low is None or gap.high is None:
        size = numbers.metric_difference(metric, gap.value)
        return Effect(0, gap, f"no difference can be shown: {values} ({size} apart, without an interval).")
    bounds = numbers.metric_bounds(metric, gap.low, gap.high)
    if not gap.shown:
        return Effect(0, gap, f"no difference can be shown: {values} (difference 95\u00a0% interval {bounds}).")
    if (first if gap.value > 0 else second).bound:
        return Effect(0, gap, f"no difference can be shown: {values}, and the larger one is known to be too high.")
    word = "more" if gap.value > 0 else "less"
    size = numbers.metric_difference(metric, gap.value)
    ends = sorted((abs(gap.low), abs(gap.high)))
    return Effect(
        1 if gap.value > 0 else -1,
        gap,
        f"{values}, {size} {word} (95\u00a0% interval {numbers.metric_bounds(metric, *ends)}).",
    )


def named(pair: Pair) -> str:
    """Returns what is compared with what, to stand before a colon."""
    return f"“{pair.changed.configuration}” against “{pair.base.configuration}”"


def _switched_on(pair: Pair, fields: Sequence[str]) -> int:
    others = [name for name in _SWITCHES if name not in fields]
    baseline = "algorithm" not in fields and pair.changed.kind("algorithm") in ("centralised", "local_only")
    return sum(pair.changed.kind(name) != "none" for name in others) + baseline
