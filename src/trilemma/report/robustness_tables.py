"""The report's tables about attacks: what they leave, what stands beside it, and whether it is real."""

from collections.abc import Sequence

from trilemma.report import numbers
from trilemma.report.configurations import Headline, Row
from trilemma.report.flags import Flag, flag_names, title_of
from trilemma.report.markup import Content, Html, tag
from trilemma.report.tables import Notes, absent, header, rate_cell, table, withheld
from trilemma.report.transfer import Transfer

#: Below so many images a flag is raised only where more than 6 % of them are amiss.
FEW_IMAGES = 50

#: What stands beside robust accuracy, with the metric by which each is written.
_BESIDE = {
    "robust accuracy": "robust_accuracy",
    "of those right when clean": "robust_accuracy",
    "robust AUROC": "robust_auroc",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
}


def robustness_table(rows: Sequence[Row]) -> Html:
    """Returns robust accuracy of every row under every attack and radius."""
    notes = Notes("note-robust")
    attacks = dict.fromkeys((a.evaluation, a.strength, a.radius) for row in rows for a in row.attacked)
    columns = sorted(attacks, key=lambda a: (-a[1], a[0], a[2]))
    body = [
        tag(
            "tr",
            tag("th", row.title, scope="row"),
            rate_cell("accuracy", row.metric("accuracy"), notes, row.majority),
            *(
                rate_cell("robust_accuracy", row.under(name, radius).robust, notes, row.majority)
                for name, _, radius in columns
            ),
        )
        for row in rows
    ]
    titles = [[name, Html("<br>"), numbers.radius(radius)] for name, _, radius in columns]
    return table(
        "Robust accuracy: the share of test images that are answered right both clean and attacked.",
        [header(["Configuration", "clean", *titles])],
        body,
        notes,
    )


def transfer_table(transfer: Transfer, index: int) -> Html:
    """Returns the transfer matrix as a heat map: the darker, the more accuracy survives."""
    notes = Notes(f"note-transfer-{index}")
    body = []
    for source, values, same in zip(transfer.sources, transfer.values, transfer.same_training, strict=True):
        each = zip(values, same, transfer.withheld, strict=True)
        cells = [withheld(why, notes) if why else _transfer_cell(value, is_same) for value, is_same, why in each]
        body.append(tag("tr", tag("th", source, scope="row"), *cells))
    caption = (
        f"{transfer.evaluation} at radius {numbers.radius(transfer.radius)}: robust accuracy in percent, mean over "
        "seeds. Row: the model on which the images were made. Column: the model that they attack. The darker, the more "
        "answers survive; – where a model would attack itself."
    )
    if any(map(any, transfer.same_training)):
        caption += (
            " † The two are files of one training (where hospitals trained alone: some of the pairs are), nearly the "
            "same model; no black-box attacker has that file, so the worst over sources leaves it out."
        )
    return table(caption, [header(["made on ↓  attacks →", *transfer.targets])], body, notes, class_="heat")


def _transfer_cell(value: float | None, same_training: bool) -> Html:
    if value is None:
        return tag("td", numbers.NO_VALUE, class_="missing", title="no such pair was attacked", style="--share:0")
    number = tag("data", f"{100 * value:.1f}", value=repr(value))
    content = [tag("em", number), "†"] if same_training else [number]
    return tag("td", *content, style=f"--share:{value:.3f}")


def detail_table(rows: Sequence[Row], by: Headline) -> Html:
    """Returns what stands beside robust accuracy under the strongest attack, against radius, clean images first."""
    notes = Notes("note-detail")
    body: list[Html] = []
    for row in rows:
        radii = sorted(a.radius for a in row.attacked if a.evaluation == by.evaluation)
        if radii:
            lines = [_clean_cells(row, notes), *(_radius_cells(row, by.evaluation, radius, notes) for radius in radii)]
            name = tag("th", row.title, scope="row", rowspan=len(lines))
            body += [
                tag("tr", name if i == 0 else None, *cells, class_="same" if i else None)
                for i, cells in enumerate(lines)
            ]
    caption = (
        f"Under “{by.evaluation}”. Robust AUROC is taken where every image was driven to its highest margin, by the "
        "attack itself or by the full-budget one beside it. Sensitivity and specificity count an image that is wrong "
        "when clean as wrong. The majority class is what a constant answer reaches at any radius."
    )
    head = ["Configuration", "radius", *_BESIDE, "majority class"]
    return table(caption, [header(head)], body, notes)


def _clean_cells(row: Row, notes: Notes) -> list[Html]:
    names = ("accuracy", None, "auroc", "sensitivity", "specificity")
    cells = [
        tag("td", "all", class_="missing") if name is None else rate_cell(name, row.metric(name), notes)
        for name in names
    ]
    return [tag("th", "clean", scope="row"), *cells, _majority_cell(row, notes)]


def _radius_cells(row: Row, evaluation: str, radius: float, notes: Notes) -> list[Html]:
    at, score = row.under(evaluation, radius), row.scored(evaluation, radius)
    auroc = rate_cell("robust_auroc", score.estimate, notes)
    if score.evaluation not in ("", evaluation) and score.estimate.value is not None:
        auroc = Html(auroc.removesuffix("</td>") + notes.mark(f"under “{score.evaluation}”") + "</td>")
    return [
        tag("th", numbers.radius(radius), scope="row"),
        rate_cell("robust_accuracy", at.robust, notes, row.majority),
        rate_cell("robust_accuracy", at.among_correct, notes),
        auroc,
        rate_cell("sensitivity", at.sensitivity, notes),
        rate_cell("specificity", at.specificity, notes),
        _majority_cell(row, notes),
    ]


def _majority_cell(row: Row, notes: Notes) -> Html:
    if row.majority is None:
        return absent("not measured", notes)
    return tag("td", tag("data", numbers.percent(row.majority), value=repr(row.majority)))


def flags_table(rows: Sequence[Row]) -> Html:
    """Returns which signs of robustness that is not there were seen, a row for each norm that was looked at."""
    notes = Notes("note-flags")
    names = flag_names([flag for row in rows for flag in row.diagnosed])
    body = []
    for row in rows:
        for at in dict.fromkeys(flag.at for flag in row.diagnosed):
            here = [flag for flag in row.diagnosed if flag.at == at]
            cells = [_flag_cell([f for f in here if f.name == name], row.num_trainings, notes) for name in names]
            looked_at = tag("td", at, tag("span", _looked_at(here), class_="range"), class_="text")
            body.append(tag("tr", tag("th", row.title, scope="row"), looked_at, *cells))
        if not row.diagnosed:
            unseen = tag("td", "not looked at", class_="missing text", colspan=len(names) + 1)
            body.append(tag("tr", tag("th", row.title, scope="row"), unseen))
    caption = (
        "Signs of robustness that is not there, looked for in every training: a cell tells in how many of them one was "
        "seen, with the evidence below, and – that it was seen in none."
    )
    return table(
        caption, [header(["Configuration", "within", *map(title_of, names)], first=2)], body, notes, class_="flags"
    )


def _looked_at(flags: Sequence[Flag]) -> str:
    """Returns how many images were looked at, and that few tell little: every test needs 3 at least."""
    n = max((flag.n for flag in flags), default=0)
    return f"{n} images" + (": too few to tell much" if n < FEW_IMAGES else "")


def _flag_cell(flags: Sequence[Flag], num_trainings: int, notes: Notes) -> Html:
    """Returns a cell with what became of one flag in every training of a row."""
    raised = [flag for flag in flags if flag.raised]
    unknown = [flag for flag in flags if flag.raised is None]
    absent_in = num_trainings - len(flags)
    parts: list[Content] = []
    if raised:
        parts.append([tag("b", "raised"), f" in {len(raised)}", *(notes.mark(_said(flag)) for flag in raised)])
    if unknown:
        parts.append([f"undefined in {len(unknown)}", *(notes.mark(_said(flag)) for flag in unknown)])
    if absent_in > 0:
        parts.append(f"not looked for in {absent_in}")
    if not parts:
        quiet = tag("span", numbers.NO_VALUE, aria_hidden="true")
        return tag("td", quiet, tag("span", "not raised", class_="unseen"))
    said = [[tag("br") if i else None, part] for i, part in enumerate(parts)]
    return tag("td", *said, f" of {num_trainings}", class_="below" if raised else "missing")


def _said(flag: Flag) -> str:
    return f"{flag.where}: {flag.evidence}"
