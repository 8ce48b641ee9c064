"""What poisoned hospitals do: every threat against every rule, what triggers do, and what was left out and why."""

from collections.abc import Sequence
from typing import NamedTuple

from trilemma.report import numbers
from trilemma.report.configurations import UNCOMPRESSED, Headline, Row
from trilemma.report.estimates import difference
from trilemma.report.finding import Finding
from trilemma.report.markup import Html, tag
from trilemma.report.tables import Notes, header, rate_cell, table
from trilemma.results import Results, Run

#: Of what an untouched training reaches, a rule may lose so much and still count as having withstood a threat.
WITHSTOOD = 0.02
#: A backdoor whose trigger succeeds more often has not been withstood.
SUCCEEDS = 0.15

_EFFECTS = {
    "attack_success_rate": "attack success",
    "trigger_effect": "of images not given the class anyway",
    "triggered_accuracy": "accuracy with the trigger",
}

#: Sentences about rules and clients that are written out; a table or the history holds the rest.
MOST_SENTENCES = 12


def poisoning_section_parts(rows: Sequence[Row], by: Headline) -> list[Html]:
    """Returns the tables of threats against rules and of backdoors, those that there are."""
    parts = [threats_table(rows, by)] if _poisoned(rows) else []
    return parts + ([backdoors_table(rows)] if any(row.triggered for row in rows) else [])


class Line(NamedTuple):
    """What one threat leaves of every rule.

    Attributes:
        threat: Its label.
        others: What else the configurations have in common, where a study varies more.
        by_rule: Rule's label -> its row.
    """

    threat: str
    others: str
    by_rule: dict[str, Row]


def threat_lines(rows: Sequence[Row]) -> tuple[list[str], list[Line]]:
    """Returns the rules of a study and a line for every threat, and for none where the same was trained without one.

    Where several configurations share a threat and a rule, each has a line of its own.
    """
    federated, poisoned = [row for row in rows if _federated(row)], _poisoned(rows)
    compared = {row.profile("threat", "aggregation") for row in poisoned}
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in federated:
        if row.profile("threat", "aggregation") in compared:
            lines.setdefault((_threat(row), _others(row)), {})[_rule(row)] = row
    rules = list(dict.fromkeys(_rule(row) for row in federated))
    return rules, [Line(threat, others, by_rule) for (threat, others), by_rule in lines.items()]


def threats_table(rows: Sequence[Row], by: Headline) -> Html:
    """Returns the usefulness that every rule keeps under every threat; what it withstands is marked."""
    notes, (rules, lines) = Notes("note-threats"), threat_lines(rows)
    several = len({line.others for line in lines}) > 1
    body = []
    for line in lines:
        other = tag("span", line.others, class_="range") if several and line.others else None
        cells = [_kept_cell(line.by_rule.get(rule), rows, by, notes) for rule in rules]
        body.append(tag("tr", tag("th", line.threat, other, scope="row"), *cells))
    return table(threats_caption(by), [header(["threat ↓  rule →", *rules])], body, notes)


def threats_caption(by: Headline) -> str:
    """Returns what the table of threats and rules shows."""
    return (
        f"{numbers.metric_title(by.utility)} that each rule of aggregation keeps under each threat. ✓ marks a value at "
        f"most {numbers.metric_difference(by.utility, WITHSTOOD)} below the mean without a threat; a "
        f"backdoor must also succeed on no more than {numbers.percent(SUCCEEDS, 0)} of the images, in every file."
    )


def written_threats(rows: Sequence[Row], by: Headline) -> tuple[list[str], list[list[str]]]:
    """Returns column titles and cells of the table of threats and rules, for tables of text; empty without a threat."""
    if not _poisoned(rows):
        return [], []
    rules, lines = threat_lines(rows)
    several = len({line.others for line in lines}) > 1
    cells = []
    for line in lines:
        name = f"{line.threat} ({line.others})" if several and line.others else line.threat
        cells.append([name, *(_written(line.by_rule.get(rule), rows, by) for rule in rules)])
    return ["threat", *rules], cells


def _written(row: Row | None, rows: Sequence[Row], by: Headline) -> str:
    if row is None:
        return numbers.NO_VALUE
    written = numbers.metric_estimate(by.utility, row.metric(by.utility))
    return f"{written} ✓" if _withstood(row, rows, by) else written


def backdoors_table(rows: Sequence[Row]) -> Html:
    """Returns what the triggers do to every artefact."""
    notes = Notes("note-backdoors")
    names = list(dict.fromkeys(name for row in rows for name in row.triggered))
    body = []
    for name in names:
        for row in (row for row in rows if name in row.triggered):
            cells = [rate_cell("accuracy", row.backdoor(name, metric), notes) for metric in _EFFECTS]
            body.append(tag("tr", tag("th", row.title, scope="row"), tag("td", name, class_="text"), *cells))
    caption = (
        "What a trigger does. Attack success: of the test images of other classes, the share that is given the "
        "attacker’s class with the trigger on. A model that nobody attacked shows the rate by chance."
    )
    return table(caption, [header(["Configuration", "trigger", *_EFFECTS.values()], first=2)], body, notes)


def poisoning_findings(results: Results, rows: Sequence[Row]) -> list[Finding]:
    """Returns which updates were left out, which rounds were refused, and which rules may withstand less."""
    left_out, doubts = _left_out(results.runs), _doubts(results.runs)
    found = []
    if left_out:
        found.append(Finding("Updates left out", _shortened(left_out), caution=True))
    if doubts:
        found.append(Finding("What rules of aggregation cannot do here", _shortened(doubts), caution=True))
    return found


def backdoor_sentences(rows: Sequence[Row]) -> list[str]:
    """Returns for each model in which a backdoor was planted how often its trigger succeeds."""
    said = []
    for row in (row for row in rows if row.kind("threat") == "backdoor"):
        for name in _own_triggers(row):
            success = row.backdoor(name, "attack_success_rate")
            if success.value is not None:
                rate = numbers.metric_estimate("accuracy", success)
                said.append(f"“{row.title}”: {name} succeeds on {rate} of the images of other classes.")
    return said


def _left_out(runs: Sequence[Run]) -> list[str]:
    said: dict[str, None] = {}
    for run in runs:
        reasons: dict[tuple[str, str], int] = {}
        for of_round in run.history:
            for client, why in (of_round.get("left_out") or {}).items():
                reasons[client, _kind(why)] = reasons.get((client, _kind(why)), 0) + 1
        for (client, why), times in reasons.items():
            said[f"“{run.configuration}”, seed {run.seed}: {client}’s update {why} in {times} of {len(run.history)} "
                 "rounds and was left out."] = None  # fmt: skip
        refused = [row["refused"] for row in run.history if row.get("refused")]
        if refused:
            said[f"“{run.configuration}”, seed {run.seed}: {len(refused)} of {len(run.history)} rounds changed "
                 f"nothing, for {refused[0]}."] = None  # fmt: skip
    return list(said)


def _kind(why: str) -> str:
    """Returns a reason without its numbers, which differ from round to round."""
    return "is far too long" if " long, and " in why else why


def _doubts(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(f"“{run.configuration}”: {doubt}." for run in runs for doubt in run.doubts))


def _shortened(sentences: Sequence[str]) -> tuple[str, ...]:
    more = len(sentences) - MOST_SENTENCES
    rest = [f"{more} more of this kind stand in the store (`trilemma show KEY`)."] if more > 0 else []
    return (*sentences[:MOST_SENTENCES], *rest)


def _kept_cell(row: Row | None, rows: Sequence[Row], by: Headline, notes: Notes) -> Html:
    if row is None:
        return tag("td", numbers.NO_VALUE, class_="missing", title="the study does not ask for it")
    cell = rate_cell(by.utility, row.metric(by.utility), notes)
    return Html(cell.replace("</td>", " ✓</td>")) if _withstood(row, rows, by) else cell


def _withstood(row: Row, rows: Sequence[Row], by: Headline) -> bool:
    """Returns whether a configuration is nearly as useful as the mean without a threat, and has no working backdoor.

    Of a backdoor accuracy tells nothing: without a measurement of its own trigger nothing is said to be withstood.
    """
    untouched = _untouched(row, rows)
    gap = difference(row.metric(by.utility), untouched.metric(by.utility)) if untouched is not None else None
    if row.kind("threat") == "backdoor":
        # Compression may switch a backdoor on: none of the training's files may have it.
        files = [row, *(r for r in rows if r.configuration == row.configuration and r.compression != row.compression)]
        rates = [r.backdoor(name, "attack_success_rate").value for r in files for name in _own_triggers(r)]
        if not rates or any(rate is None or rate > SUCCEEDS for rate in rates):
            return False
    return gap is not None and gap.value >= -WITHSTOOD


def _own_triggers(row: Row) -> list[str]:
    """Returns the measured triggers of a row that are the planted one; both are called alike."""
    return [name for name in row.triggered if f"{name} " in _threat(row)]  # "to class 1" is not "to class 10"


def _untouched(row: Row, rows: Sequence[Row]) -> Row | None:
    """Returns the configuration with the mean and without a threat, or None where the study has none."""
    mean = [r for r in rows if r.kind("threat") == "none" and r.kind("aggregation") == "mean"]
    for other in mean:
        if other.compression == row.compression and _same_but_threat(other, row):
            return other
    return None


def _same_but_threat(one: Row, other: Row) -> bool:
    return one.profile("threat", "aggregation") == other.profile("threat", "aggregation")


def _poisoned(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.kind("threat") != "none" and _federated(row)]


def _federated(row: Row) -> bool:
    return row.compression == UNCOMPRESSED and row.kind("algorithm") not in ("centralised", "local_only")


def _rule(row: Row) -> str:
    return row.labels.get("aggregation", "")


def _threat(row: Row) -> str:
    return row.labels.get("threat", "none")


def _others(row: Row) -> str:
    return ", ".join(
        label for axis, label in row.labels.items() if axis not in ("aggregation", "threat") and label != "none"
    )
