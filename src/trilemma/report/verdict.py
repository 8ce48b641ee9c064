"""The study's question in one paragraph: is one configuration private, robust and scalable at once?"""

from collections.abc import Sequence
from typing import NamedTuple

from trilemma.report import numbers
from trilemma.report.configurations import Headline, Row
from trilemma.report.flags import why_withheld

#: A file counts as small when it takes at most this share of the largest one that was measured.
SMALL_SHARE = 0.5

#: Above this epsilon a guarantee holds but promises little.
WEAK_EPSILON = 10.0


class Corners(NamedTuple):
    """What a row achieves.

    Attributes:
        private: It carries a guarantee, whatever its noise: where that comes from a seed, the answer says so.
        robust: Under the strongest attack it is better than always giving the most frequent answer.
        small: Its file takes at most half of the largest one.
        certain: The whole interval of its robust accuracy lies above the majority class, and no attack leaves less.
    """

    private: bool
    robust: bool
    small: bool
    certain: bool

    @property
    def all(self) -> bool:
        """Returns whether every corner is reached."""
        return self.private and self.robust and self.small


def corners(row: Row, by: Headline, largest_bytes: float) -> Corners:
    """Returns which corners a row reaches; what was not measured is not reached."""
    robust, size, majority = row.under(by.evaluation, by.radius).robust, row.file_bytes.value, row.majority
    above = robust.judged is not None and majority is not None and robust.judged > majority
    whole = robust.low is not None and majority is not None and robust.low > majority
    return Corners(
        private=row.epsilon is not None,
        robust=above and not row.constant,
        small=size is not None and size <= SMALL_SHARE * largest_bytes,
        certain=above and whole and not robust.bound,
    )


def verdict(rows: Sequence[Row], by: Headline) -> str:
    """Returns the verdict over the rows that trained together, without malicious hospitals where there are such."""
    choices = [row for row in rows if row.kind("algorithm") not in ("centralised", "local_only")] or list(rows)
    choices = [row for row in choices if row.kind("threat") == "none"] or choices
    unasked = _unasked(choices, by)
    if unasked:
        return f"This study cannot say: {unasked}."
    largest = max((row.file_bytes.value or 0.0 for row in choices), default=0.0)
    reached = [(row, corners(row, by, largest)) for row in choices]
    winners = [(row, c) for row, c in reached if c.all]
    if winners:
        row, at = max(winners, key=lambda item: (item[1].certain, item[0].metric(by.utility).value or 0.0))
        return _won(row, at, len(winners), choices, by)
    return _lost(reached, by)


def is_open(row: Row, at: Corners, by: Headline) -> bool:
    """Returns whether only the robust accuracy that is withheld stands between a row and all three corners.

    Where it is withheld because the model hardly tells images apart nothing is open: that is not robust.
    """
    constant = row.constant or any(flag.name == "constant" for flag in row.raised)
    return at.private and at.small and row.under(by.evaluation, by.radius).robust.withheld and not constant


def attack(by: Headline) -> str:
    """Returns the attack that rows are judged by, to stand in a sentence."""
    return f"“{by.evaluation}” at radius {numbers.radius(by.radius)}"


def _unasked(choices: Sequence[Row], by: Headline) -> str:
    missing = []
    if all(row.kind("privacy") == "none" for row in choices):
        missing.append("no configuration trains with differential privacy")
    if not by.evaluation:
        missing.append("no evaluation attacks the models")
    if len({row.compression for row in choices}) == 1:
        missing.append("no compression is compared with another")
    return "; ".join(missing)


def _won(row: Row, at: Corners, num_winners: int, choices: Sequence[Row], by: Headline) -> str:
    assert row.epsilon is not None and row.file_bytes.value is not None  # what winning means
    others = f" ({num_winners} configurations do; this one is the most useful)" if num_winners > 1 else ""
    bound = row.under(by.evaluation, by.radius).robust.bound
    but = "another attack leaves less" if bound else "the interval reaches down to the majority class"
    opening = "Yes, on these data" if at.certain else f"Perhaps: {but}, but"
    weak = f" An ε above {WEAK_EPSILON:g} is a weak promise, though." if row.epsilon > WEAK_EPSILON else ""
    return (
        f"{opening}: “{row.title}” is all three{others}. It is private ({row.promise}), "
        f"{_robustness(row, by)}, and its file takes {numbers.byte_size(row.file_bytes.value)}. "
        f"{_price(row, choices, by)}{weak}"
    )


def _lost(reached: Sequence[tuple[Row, Corners]], by: Headline) -> str:
    num = len(reached)
    counts = [sum(getattr(c, name) for _, c in reached) for name in ("private", "robust", "small")]
    withheld = sum(row.under(by.evaluation, by.radius).robust.withheld for row, _ in reached)
    unknown = any(is_open(row, at, by) for row, at in reached)
    said, does = ("Not shown", "is shown to do") if unknown else ("No", "does")
    text = (
        f"{said}. Of {num} configurations as shipped, {counts[0]} carry a privacy "
        f"guarantee, {counts[1]} are better under {attack(by)} than always giving the most frequent answer, and "
        f"{counts[2]} ship a file of at most half the largest; none {does} all three."
    )
    if withheld:
        text += f" The robust accuracy of {withheld} is withheld, and counts as none."
    able = [(row, at) for row, at in reached if not row.constant]
    if not able:
        return text
    row, at = max(
        able, key=lambda item: (sum(item[1][:3]), is_open(*item, by), item[0].metric(by.utility).value or 0.0)
    )
    words = ("private", "robust", "small")
    has = [word for word, there in zip(words, at[:3], strict=True) if there]
    lacks = [word for word, there in zip(words, at[:3], strict=True) if not there]
    if not has:
        return text
    why = {
        "private": "; ".join(row.void),
        "robust": _robustness(row, by),
        "small": "its size was not measured"
        if row.file_bytes.value is None
        else numbers.byte_size(row.file_bytes.value),
    }
    reasons = "; ".join(why[word] for word in lacks)
    return f"{text} The closest, “{row.title}”, is {' and '.join(has)} but not {' or '.join(lacks)}: {reasons}."


def _robustness(row: Row, by: Headline) -> str:
    estimate = row.under(by.evaluation, by.radius).robust
    if estimate.withheld:
        return f"its accuracy under {by.evaluation} is withheld ({why_withheld(estimate, row.diagnosed)})"
    if estimate.value is None:
        return f"its accuracy under {by.evaluation} is not known ({estimate.reason})"
    majority = "" if row.majority is None else f", against {numbers.percent(row.majority)} for a constant answer"
    return (
        f"it answers {numbers.metric_estimate('robust_accuracy', estimate)} of the images right under "
        f"{attack(by)}{majority}"
    )


def _price(row: Row, choices: Sequence[Row], by: Headline) -> str:
    known = [other for other in choices if other.metric(by.utility).value is not None]
    ours = row.metric(by.utility)
    if ours.value is None or not known:
        return "Its usefulness was not measured."
    best = max(known, key=lambda other: other.metric(by.utility).value or 0.0)
    said = f"Its {numbers.metric_title(by.utility)} is {numbers.metric_estimate(by.utility, ours)}"
    if best is row:
        return f"{said}, the best of the study."
    theirs = best.metric(by.utility)
    return f"{said}; the best of the study, “{best.title}”, reaches {numbers.metric_estimate(by.utility, theirs)}."
