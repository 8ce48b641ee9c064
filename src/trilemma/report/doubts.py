"""What limits a study's statements about robustness: numbers that are withheld, and attacks that are weak."""

from collections.abc import Sequence

from trilemma.evaluation.strength import ENOUGH_STEPS
from trilemma.report.configurations import Headline, Row, is_weak
from trilemma.report.finding import Finding
from trilemma.report.flags import Flag, in_words

#: Flags that are written out; the others stand in the table of flags.
MOST_FLAGS = 12


def doubts(rows: Sequence[Row], by: Headline) -> list[Finding]:
    """Returns what is withheld and why, and whether the study's strongest attack is a weak one."""
    return [*_withheld(rows), *_weak(rows, by), *_too_high(rows, by)]


def _withheld(rows: Sequence[Row]) -> list[Finding]:
    sentences = [sentence for row in rows for sentence in _of_row(row)]
    if not sentences:
        return []
    more = len(sentences) - MOST_FLAGS
    rest = [f"{more} more stand in the table “Is the robustness real?”."] if more > 0 else []
    return [Finding("Robustness withheld", (*sentences[:MOST_FLAGS], *rest), caution=True)]


def _of_row(row: Row) -> list[str]:
    """Returns a sentence per flag that was raised in a row, and one per reason to withhold that is no flag."""
    raised: dict[tuple[str, str], list[Flag]] = {}
    for flag in row.raised:
        raised.setdefault((flag.name, flag.at), []).append(flag)
    reasons = dict.fromkeys(a.robust.reason for a in row.attacked if a.robust.withheld)
    others = [reason for reason in reasons if not any(f"{name}: " in reason for name, _ in raised)]
    said = [_sentence(row, flags) for flags in raised.values()]
    return said + [f"“{row.title}”: {in_words(reason).rstrip('.')}." for reason in others]


def _sentence(row: Row, flags: Sequence[Flag]) -> str:
    first = flags[0]
    others = ""
    if len(flags) > 1:
        others = f", and in {len(flags) - 1} more of its {row.num_trainings} trainings"
    return f"“{row.title}”, {first.title} within {first.at} ({first.where}{others}): {first.evidence.rstrip('.')}."


def _weak(rows: Sequence[Row], by: Headline) -> list[Finding]:
    if not by.evaluation or not is_weak(rows):
        return []
    text = (
        f"The strongest attack of this study is “{by.evaluation}”; none is AutoAttack or an APGD of {ENOUGH_STEPS} "
        "steps or more. Every robust accuracy is an upper bound, and a stronger attack may leave far less."
    )
    return [Finding("A weak attack", (text,), caution=True)]


def _too_high(rows: Sequence[Row], by: Headline) -> list[Finding]:
    """Returns which rows keep less than the numbers by which they are compared."""
    found = [(row, row.under(by.evaluation, by.radius).robust) for row in rows]
    said = [f"“{row.title}”: {robust.reason}." for row, robust in found if robust.bound]
    opening = f"Under “{by.evaluation}” some numbers are known to be too high; they are marked ≤."
    return [Finding("Upper bounds", (opening, *said[:MOST_FLAGS]), caution=True)] if said else []
