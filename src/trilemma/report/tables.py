"""The report's tables: every value with its interval, and a footnote wherever one is missing."""

from collections.abc import Iterable, Sequence

from trilemma.report import numbers
from trilemma.report.cells import WORST
from trilemma.report.claims import TIME_IS_SECRET
from trilemma.report.configurations import Headline, Row, claims_of
from trilemma.report.estimates import Estimate
from trilemma.report.flags import in_words
from trilemma.report.markup import Content, Html, tag
from trilemma.report.pareto import pareto_rows
from trilemma.report.summary import majority_shares
from trilemma.results import DataFacts, Results


class Notes:
    """The footnotes of one table: equal reasons share a letter.

    Args:
        name: Unique on the page, for the links.
    """

    def __init__(self, name: str):
        self.name = name
        self.reasons: list[str] = []

    def mark(self, reason: str) -> Html:
        """Returns the link to a reason's footnote."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        index = self.reasons.index(reason)
        return tag("sup", tag("a", _letter(index), href=f"#{self.name}-{index + 1}", title=reason))

    def written(self) -> Content:
        """Returns the footnotes."""
        if not self.reasons:
            return None
        items = [
            tag("li", tag("b", _letter(i)), " ", reason, id=f"{self.name}-{i + 1}")
            for i, reason in enumerate(self.reasons)
        ]
        return tag("ul", *items, class_="footnotes", style="list-style:none")


def table(
    caption: Content, head: Sequence[Content], body: Sequence[Content], notes: Notes | None = None, **attributes: str
) -> Html:
    """Returns a table with its caption and footnotes, which scrolls where the page is too narrow."""
    element = tag("table", tag("caption", caption), tag("thead", *head), tag("tbody", *body), **attributes)
    return Html(tag("div", element, class_="scroll") + tag("div", notes.written() if notes else None))


def header(cells: Sequence[Content], first: int = 1) -> Html:
    """Returns a header row, its first columns set as text."""
    return tag("tr", *(tag("th", c, scope="col", class_="text" if i < first else None) for i, c in enumerate(cells)))


def rate_cell(metric: str, estimate: Estimate, notes: Notes, majority: float | None = None) -> Html:
    """Returns a cell with a metric and its interval; marked where it is at or below the majority class."""
    if estimate.withheld:
        return withheld(estimate.reason, notes)
    if estimate.value is None:
        return absent(estimate.reason, notes)
    below = majority is not None and estimate.judged is not None and estimate.judged <= majority
    content: list[Content] = [
        tag(
            "data", numbers.at_most(numbers.metric_value(metric, estimate.value), estimate), value=repr(estimate.value)
        ),
        notes.mark("at or below the majority class: no better than a constant answer") if below else None,
        notes.mark(estimate.reason) if estimate.reason else None,
    ]
    if estimate.low is not None and estimate.high is not None:
        content.append(tag("span", numbers.metric_bounds(metric, estimate.low, estimate.high), class_="range"))
    return tag("td", *content, class_="below" if below else None)


def amount_cell(estimate: Estimate, write, notes: Notes) -> Html:
    """Returns a cell with bytes or seconds."""
    if estimate.value is None:
        return absent(estimate.reason, notes)
    mark = notes.mark(estimate.reason) if estimate.reason else None
    return tag("td", tag("data", write(estimate.value), value=repr(estimate.value)), mark)


def absent(reason: str, notes: Notes) -> Html:
    """Returns a cell without a value, and why."""
    return tag("td", numbers.NO_VALUE, notes.mark(reason or "not measured"), class_="missing", title=reason)


def withheld(reason: str, notes: Notes) -> Html:
    """Returns a cell whose value may not be shown, and why."""
    why = in_words(reason)
    return tag("td", numbers.WITHHELD, notes.mark(why), class_="missing", title=why)


def main_table(rows: Sequence[Row], by: Headline, seeds: Sequence[int]) -> Html:
    """Returns the table of configurations: useful, private, robust, scalable, the Pareto-optimal rows marked."""
    notes, optimal, mixed = Notes("note-main"), pareto_rows(rows, by), len(claims_of(rows)) > 1
    utilities = ("auroc", "accuracy") if any(row.metric("auroc").value is not None for row in rows) else ("accuracy",)
    honest = "worst honest" if any("worst honest" in row.clients for row in rows) else "worst"
    worst: list[Content] = [[honest, Html("<br>"), "hospital"]] if any("worst" in row.clients for row in rows) else []
    body = []
    for i, (row, best) in enumerate(zip(rows, optimal, strict=True)):
        again = i > 0 and rows[i - 1].configuration == row.configuration
        name = [row.configuration, *(notes.mark(phrase) for phrase in dict.fromkeys(row.constant))]
        if len(row.seeds) < len(seeds):
            name.append(notes.mark(f"{len(row.seeds)} of {len(seeds)} seeds"))
        robust = row.under(by.evaluation, by.radius).robust
        cells = [
            tag("th", *name, scope="row"),
            tag("td", row.compression, class_="text"),
            *(rate_cell(metric, row.metric(metric), notes) for metric in utilities),
            rate_cell("accuracy", row.worst, notes) if worst else None,
            _epsilon_cell(row, notes, mixed),
            rate_cell("robust_accuracy", robust, notes, row.majority) if by.evaluation else None,
            amount_cell(row.file_bytes, numbers.byte_size, notes),
            amount_cell(row.latency_1, numbers.duration, notes),
            amount_cell(row.bytes_per_round, numbers.byte_size, notes),
            amount_cell(row.training_seconds, numbers.duration, notes),
            tag("td", "★" if best else "", tag("span", "Pareto-optimal", class_="unseen") if best else None),
        ]
        body.append(tag("tr", *cells, class_=" ".join(["optimal"] * best + ["same"] * again) or None))
    return table(
        _main_caption(rows, by, seeds), _main_head(by, utilities, worst), body, notes, id="configurations-table"
    )


def _main_caption(rows: Sequence[Row], by: Headline, seeds: Sequence[int]) -> Content:
    robust = ""
    if by.evaluation:
        shares = majority_shares(rows)
        robust = f" Robust: accuracy under “{by.evaluation}” at radius {numbers.radius(by.radius)}"
        robust += f"; always giving the most frequent answer reaches {shares}." if shares else "."
        if any(row.under(by.evaluation, by.radius).robust.withheld for row in rows):
            robust += " It is withheld where there are signs that the robustness is not there: no ★ counts it."
    return (
        f"Means over seeds {', '.join(map(str, seeds))}, with 95\u00a0% intervals: Student’s t over seeds, or the mean "
        f"interval of the single models where that is wider.{_about_epsilon(rows)}{robust} ★ marks what is "
        "Pareto-optimal: no other configuration under the same conditions is as good in usefulness, ε, robustness and "
        "file size and better in one. It compares the values alone: where intervals overlap, which of two is marked is "
        "partly luck. Pooled (centralised) training is a yardstick and takes no part, nor does a model that answers "
        "the same for every image."
    )


def _about_epsilon(rows: Sequence[Row]) -> str:
    claims = claims_of(rows)
    if not claims:
        return ""
    if len(claims) == 1:
        return f" ε is for {claims[0].in_words}, the largest over hospitals and seeds."
    return (
        " ε is for what stands below it, the largest over hospitals and seeds; two of them are compared only where "
        "unit, δ and noise are the same."
    )


def _main_head(by: Headline, utilities: Sequence[str], worst: list[Content]) -> list[Content]:
    def group(title: str, span: int) -> Html:
        return tag("th", tag("span", title), scope="colgroup", colspan=span, class_="group")

    groups = [
        tag("td", colspan=2),
        group("Useful", len(utilities) + len(worst)),
        group("Private", 1),
        group("Robust", 1) if by.evaluation else None,
        group("Scalable", 4),
        tag("td"),
    ]
    attack = [[by.evaluation, Html("<br>"), f"at {numbers.radius(by.radius)}"]] if by.evaluation else []
    columns: list[Content] = [
        "Configuration",
        "Compression",
        *map(numbers.metric_title, utilities),
        *worst,
        "ε",
        *attack,
    ]
    columns += ["file", ["latency", Html("<br>"), "1 image"], ["sent", Html("<br>"), "per round"], "training", "★"]
    return [tag("tr", *groups), header(columns, first=2)]


def _epsilon_cell(row: Row, notes: Notes, mixed: bool) -> Html:
    if row.epsilon is None:
        return tag("td", "no guarantee", notes.mark("; ".join(row.void)), class_="missing")
    about = tag("span", row.claim.in_words, class_="range") if mixed and row.claim else None
    return tag("td", tag("data", numbers.epsilon(row.epsilon), value=repr(row.epsilon)), about)


def cost_table(rows: Sequence[Row]) -> Html:
    """Returns size and speed of what ships."""
    notes = Notes("note-cost")
    body = []
    for row in rows:
        latencies = [_latency_cell(estimate, notes) for estimate in (row.latency_1, row.latency_32)]
        size = amount_cell(row.file_bytes, numbers.byte_size, notes)
        counted = amount_cell(row.multiply_adds, numbers.count, notes)
        body.append(tag("tr", tag("th", row.title, scope="row"), size, counted, *latencies))
    caption = (
        "The exported file, the multiply-adds of its convolutions and linear layers for one image, and its median "
        "latency with quartiles in ONNX Runtime on the machine that measured it."
    )
    return table(caption, [header(["Configuration", "file", "multiply-adds", "1 image", "32 images"])], body, notes)


def _latency_cell(estimate: Estimate, notes: Notes) -> Html:
    if estimate.value is None:
        return absent(estimate.reason, notes)
    content = [tag("data", numbers.duration(estimate.value), value=repr(estimate.value))]
    if estimate.low is not None and estimate.high is not None:
        span = f"{numbers.duration(estimate.low)} to {numbers.duration(estimate.high)}"
        content.append(tag("span", span, class_="range"))
    return tag("td", *content)


def training_table(results: Results) -> Html:
    """Returns the last value of every training's curve."""
    body, chosen = [], any(run.chosen_round is not None for run in results.runs)
    for run in results.runs:
        last = run.history[-1] if run.history else {}
        accuracy, loss = last.get("val_accuracy"), last.get("loss")
        cells = [
            str(run.seed),
            str(len(run.history)),
            *([numbers.NO_VALUE if run.chosen_round is None else str(run.chosen_round)] if chosen else []),
            numbers.NO_VALUE if accuracy is None else numbers.percent(accuracy),
            numbers.NO_VALUE if loss is None else numbers.decimal(loss),
            numbers.NO_VALUE if run.seconds is None else numbers.duration(run.seconds),
            numbers.NO_VALUE if run.peak_memory_bytes is None else numbers.byte_size(run.peak_memory_bytes),
            f"{run.num_parameters:,}".replace(",", "\u202f"),
        ]
        body.append(tag("tr", tag("th", run.configuration, scope="row"), *(tag("td", cell) for cell in cells)))
    titles = [
        "Configuration",
        "seed",
        "rounds",
        *(["chosen"] if chosen else []),
        "validation accuracy",
        "loss",
        "time",
        "peak memory",
        "parameters",
    ]
    caption = "Every training at its last round, whose model it is unless averaging or early stopping chose another."
    if chosen:
        caption += " Chosen: the round whose model early stopping took."
    if any(run.seconds is None for run in results.runs):
        caption += f" Time and memory are not told where {TIME_IS_SECRET}."
    return table(caption, [header(titles)], body)


def clients_table(rows: Sequence[Row]) -> Html:
    """Returns clean accuracy on each hospital's test images."""
    notes = Notes("note-clients")
    there = list(dict.fromkeys(name for row in rows for name in row.clients))
    columns = [name for name in there if name not in WORST] + [name for name in WORST if name in there]
    body = [
        tag(
            "tr",
            tag("th", row.title, scope="row"),
            *(rate_cell("accuracy", row.client(name, "accuracy"), notes) for name in columns),
        )
        for row in rows
    ]
    titles = [f"{name} hospital" if name in WORST else name for name in columns]
    caption = (
        "Accuracy on the test images of patients like each hospital’s. A hospital that trained alone is judged by its "
        "own model there."
    )
    return table(caption, [header(["Configuration", *titles])], body, notes)


def partition_table(facts: DataFacts) -> Html:
    """Returns what each hospital holds for training."""
    notes = Notes("note-partition")
    body = []
    for client in facts.clients:
        classes = client.get("classes") or {}
        patients = client.get("patients")
        body.append(
            tag(
                "tr",
                tag("th", str(client.get("client", "")), scope="row"),
                tag("td", str(client.get("records", numbers.NO_VALUE))),
                absent("patients are not known", notes) if patients is None else tag("td", str(patients)),
                *(tag("td", str(classes.get(name, 0))) for name in facts.classes),
            )
        )
    caption = "Training images of each hospital, by class."
    return table(caption, [header(["Hospital", "images", "patients", *facts.classes])], body, notes)


def facts_table(caption: str, rows: Iterable[tuple[str, Content]]) -> Html:
    """Returns a table of names and values."""
    body = [tag("tr", tag("th", name, scope="row"), tag("td", value, class_="text")) for name, value in rows]
    return table(caption, [header(["fact", "value"], first=2)], body)


def _letter(index: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return letters[index % 26] * (index // 26 + 1)
