"""The report: one HTML file that holds everything it shows and fetches nothing.

Its content policy forbids every request and every script but its own two (plotly, and the lines that draw), so a
hostile name in a study can neither run nor call home even if an escape were missed.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from trilemma.atomic import atomic_write
from trilemma.report import sections
from trilemma.report.configurations import Row, configuration_rows, headline
from trilemma.report.figures import Figure, library, robustness_figure, size_figure, training_figure
from trilemma.report.markup import Content, Html, tag
from trilemma.report.stylesheet import STYLE
from trilemma.results import Results

_DRAW = """
document.querySelectorAll("script[data-figure]").forEach(function (script) {
  var place = document.getElementById(script.dataset.figure), figure = JSON.parse(script.textContent);
  place.textContent = "";
  figure.layout.font.family = getComputedStyle(document.body).fontFamily;
  Plotly.newPlot(place, figure.data, figure.layout, {displaylogo: false, responsive: true, displayModeBar: false,
    showSendToCloud: false, plotlyServerURL: ""});
});
addEventListener("beforeprint", function () {
  document.querySelectorAll("details").forEach(function (each) { each.open = true; });
  document.querySelectorAll(".js-plotly-plot").forEach(function (each) { Plotly.Plots.resize(each); });
});
"""


def write_report(results: Results, path: Path) -> None:
    """Writes the report of a study to one self-contained HTML file, whole or not at all.

    Raises:
        Failure: If the file cannot be written.
    """
    atomic_write(Path(path), report_html(results).encode())


def report_html(results: Results) -> str:
    """Returns the report; equal results give equal text."""
    rows = configuration_rows(results)
    body = _body(results, rows)
    scripts = (library(), _DRAW)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src " + " ".join(map(_hash, scripts))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content="trilemma"),
        tag("title", f"{results.name}: report"),
        tag("style", Html(STYLE)),
    )
    tail = Html("".join(tag("script", Html(script)) for script in scripts))
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", body, tail), lang="en") + "\n"


def _body(results: Results, rows: Sequence[Row]) -> Html:
    by = headline(rows)
    attacks = {a.evaluation: a.strength for row in rows for a in row.attacked}
    evaluations = sorted(attacks, key=lambda name: (-attacks[name], name))
    drawn: list[Figure] = [robustness_figure(rows, name, i) for i, name in enumerate(evaluations)]
    parts: list[tuple[str, str, Html | None]] = [
        ("answer", "Answer", sections.answer_section(results)),
        ("configurations", "Configurations", sections.table_section(results, rows, by)),
        ("robustness", "Robustness", sections.robustness_section(rows, by, drawn, evaluations)),
        ("diagnostics", "Is it real?", sections.diagnostics_section(rows)),
        ("poisoning", "Poisoned hospitals", sections.poisoning_section(rows, by)),
        ("transfer", "Transfer", sections.transfer_section(results)),
        ("cost", "Size and latency", sections.cost_section(rows, size_figure(rows, by)) if rows else None),
        ("traffic", "Network", sections.traffic_section(rows, by)),
        ("training", "Training", sections.training_section(results, training_figure(results))),
        ("clients", "Hospitals", sections.clients_section(rows)),
        ("examples", "Examples", sections.gallery_section(results)),
        ("guarantees", "Guarantees", sections.guarantees_section(results)),
        ("data", "Data", sections.data_section((*results.data, *results.public))),
        ("reproduce", "Reproduce", sections.reproduce_section(results)),
        ("missing", "Missing cells", sections.missing_section(results)),
    ]
    there = [(name, title, part) for name, title, part in parts if part is not None]
    links = [tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in there]
    page: Content = [
        tag("nav", tag("p", "Trilemma", class_="name"), tag("ol", *links), aria_label="Sections"),
        _header(results),
        tag("main", *(part for _, _, part in there), id="main"),
        tag("footer", "Every number is drawn from the study’s store. ε and δ mean differential privacy; a radius is in "
            "pixel units, images in [0, 1]."),
    ]  # fmt: skip
    return Html(tag("a", "Skip to the answer", href="#answer", class_="skip") + tag("div", page, class_="page"))


def _header(results: Results) -> Html:
    facts: list[Content] = [
        [tag("b", ", ".join(_data_names(results)) or "no data yet"), _synthetic(results)],
        [tag("b", str(len({run.configuration for run in results.runs}))), " configurations"],
        [tag("b", str(len(results.seeds))), " seeds" if len(results.seeds) != 1 else " seed"],
        [tag("b", str(len(results.runs))), " trainings, ", tag("b", str(len(results.artefacts))), " artefacts"],
    ]
    return tag(
        "header",
        tag("p", "Can collaborative learning be private, robust and scalable?", class_="kind"),
        tag("h1", results.name),
        tag("p", results.question, class_="lead", id="question"),
        tag("ul", *(tag("li", fact) for fact in facts), class_="facts"),
    )


def _data_names(results: Results) -> list[str]:
    """Returns the name of each data set and partition once, whatever the number of seeds."""
    return list(dict.fromkeys(facts.name.partition(", seed ")[0] for facts in results.data))


def _synthetic(results: Results) -> Content:
    return tag("span", "synthetic images", class_="tag") if any(f.synthetic for f in results.data) else None


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
