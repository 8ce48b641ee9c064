"""The report's sections, in reading order; each is a function from results to markup."""

import base64
import json
from collections.abc import Sequence
from typing import Any

from trilemma.report import numbers, robustness_tables, tables
from trilemma.report.answer import answer
from trilemma.report.configurations import Headline, Row, artefact_titles, void_reasons
from trilemma.report.datasets import data_of
from trilemma.report.figures import Figure
from trilemma.report.markup import Content, Html, tag
from trilemma.report.poisoning import poisoning_section_parts
from trilemma.report.traffic import seconds_table, traffic_rows, traffic_table
from trilemma.report.transfer import transfer_matrices
from trilemma.results import Artefact, DataFacts, Example, Results

_REAL = "Is the robustness real?"


def section(name: str, title: str, *content: Content) -> Html:
    """Returns a section with its heading."""
    return tag("section", tag("h2", title), *content, id=name)


def answer_section(results: Results) -> Html:
    """Returns the answer in words: limits first, then the verdict, then the paragraphs."""
    limits, verdict, others = [], [], []
    for finding in answer(results):
        body = (tag("h3", finding.topic), *(tag("p", sentence) for sentence in finding.sentences))
        if finding.caution:
            limits.append(tag("div", *body))
        elif not verdict:
            verdict.append(tag("div", *body, class_="verdict"))
        else:
            others.append(tag("div", *body))
    note = tag(
        "p",
        "Differences are taken seed by seed. Their 95\u00a0% intervals hold both what other trainings and what other "
        "test patients would change; a difference is called shown when its interval excludes zero. The two models’ "
        "errors count as independent although they saw the same images, so the report errs on the side of “cannot be "
        "shown”. Intervals are not corrected for the number of comparisons.",
        class_="note",
    )
    box = tag("div", *limits, class_="caution") if limits else None
    return section("answer", "The answer", box, *verdict, tag("div", *others, class_="findings"), note)


def table_section(results: Results, rows: Sequence[Row], by: Headline) -> Html:
    """Returns the table of configurations."""
    if not rows:
        return section("configurations", "Configurations", tag("p", "No artefact is in the store yet."))
    return section("configurations", "Configurations", tables.main_table(rows, by, results.seeds))


def robustness_section(
    rows: Sequence[Row], by: Headline, figures: Sequence[Figure], evaluations: Sequence[str]
) -> Html:
    """Returns robust accuracy against radius, one figure per attack, with all numbers below."""
    if not evaluations:
        return section("robustness", "Robustness", tag("p", "No evaluation of this study attacks the models."))
    drawn = [
        Html(tag("h3", name) + plot(figure, _dashes(rows) + _left_out(rows, name)))
        for name, figure in zip(evaluations, figures, strict=True)
    ]
    beside = robustness_tables.detail_table(rows, by) if by.evaluation else None
    return section(
        "robustness",
        "Robust accuracy against radius",
        *drawn,
        tag("details", tag("summary", "All numbers behind these figures"), robustness_tables.robustness_table(rows)),
        tag("details", tag("summary", "AUROC, sensitivity and specificity under the strongest attack"), beside)
        if beside
        else None,
    )


def diagnostics_section(rows: Sequence[Row]) -> Html | None:
    """Returns the signs of robustness that is not there, or None where the study attacks nothing."""
    if not any(row.attacked for row in rows):
        return None
    lead = (
        "A robust accuracy is only as good as the attack behind it, so every model is searched for signs that attacks "
        "fail for another reason than robustness. One raised flag withholds all that attacks in that norm measured of "
        "the model, and with it the mean of its row."
    )
    if not any(row.diagnosed for row in rows):
        return section("diagnostics", _REAL, tag("p", lead), tag("p", "Nothing has been looked at yet."))
    return section("diagnostics", _REAL, tag("p", lead), robustness_tables.flags_table(rows))


def poisoning_section(rows: Sequence[Row], by: Headline) -> Html | None:
    """Returns what threats leave of every rule and what triggers do, or None in a study without either."""
    parts = poisoning_section_parts(rows, by)
    if not parts:
        return None
    lead = (
        "Some hospitals of this study lie: in their images, their labels, or in what they send. The attackers of a "
        "threat act as one, and most of them know what the honest hospitals send."
    )
    return section("poisoning", "Poisoned hospitals", tag("p", lead), *parts)


def traffic_section(rows: Sequence[Row], by: Headline) -> Html | None:
    """Returns what crosses the network, or None in a study without a codec."""
    if not traffic_rows(rows):
        return None
    lead = (
        "Updates of this study, or the changes of its models, are written for the network by a codec. Rules of "
        "aggregation see the updates that were read, and every hospital and the server go on from the change that was "
        "read."
    )
    return section("traffic", "Network", tag("p", lead), traffic_table(rows, by), seconds_table(rows))


def _left_out(rows: Sequence[Row], evaluation: str) -> str:
    """Returns which rows are not drawn because their numbers are withheld, and which are drawn too high."""
    of = {row.title: [a.robust for a in row.attacked if a.evaluation == evaluation] for row in rows}
    withheld = [f"“{title}”" for title, all_radii in of.items() if any(robust.withheld for robust in all_radii)]
    too_high = [f"“{title}”" for title, all_radii in of.items() if any(robust.bound for robust in all_radii)]
    said = f" Withheld and not drawn: {', '.join(withheld)}." if withheld else ""
    return said + (f" Known to be too high at some radius: {', '.join(too_high)}." if too_high else "")


def _dashes(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(row.compression for row in rows))
    drawn = [
        f"{style} {name}" for style, name in zip(("solid", "dotted", "dash-dotted", "long dashes"), names, strict=False)
    ]
    said = f" Lines: {', '.join(drawn)}." if len(names) > 1 else ""
    return f"Bars: 95\u00a0% intervals.{said} Below the dashed majority class a model is not robust."


def transfer_section(results: Results) -> Html | None:
    """Returns the transfer matrices, or None where the study has no transfer evaluation."""
    matrices = transfer_matrices(results)
    if not matrices:
        return None
    drawn = [robustness_tables.transfer_table(matrix, i) for i, matrix in enumerate(matrices)]
    lead = (
        "A black-box attacker has no access to the model: the images are made on another model of the study. The "
        "worst over sources, by which the figures and tables above judge a model, counts models of other trainings "
        "only; files of the same training, such as a model and its int8 form, stand in the matrix with a †."
    )
    return section("transfer", "Attacks that transfer", tag("p", lead), *drawn)


def cost_section(rows: Sequence[Row], figure: Figure) -> Html:
    """Returns size and latency."""
    caption = "Usefulness against the size of the file that ships. Bars: 95\u00a0% intervals."
    return section("cost", "Size and latency", plot(figure, caption), tables.cost_table(rows))


def training_section(results: Results, figure: Figure) -> Html | None:
    """Returns the training curves, or None before the first training ended."""
    if not results.runs:
        return None
    all_numbers = tag("details", tag("summary", "Every training"), tables.training_table(results))
    return section("training", "Training", plot(figure, "One line per training; seeds share a colour."), all_numbers)


def clients_section(rows: Sequence[Row]) -> Html | None:
    """Returns the per-hospital accuracies, or None where none were measured."""
    return (
        section("clients", "Hospital by hospital", tables.clients_table(rows)) if any(r.clients for r in rows) else None
    )


def gallery_section(results: Results) -> Html | None:
    """Returns the example images, or None without any."""
    if not results.examples:
        return None
    titles = artefact_titles(results)
    synthetic = {e.artefact_key: _is_synthetic(results, e.artefact_key) for e in results.examples}
    shown = [_example(e, titles.get(e.artefact_key), synthetic[e.artefact_key]) for e in results.examples]
    return section("examples", "What an attack looks like", tag("div", *shown, class_="gallery"))


def guarantees_section(results: Results) -> Html:
    """Returns what may be claimed of every training and artefact, equal claims together."""
    runs = {run.key: run for run in results.runs}
    claims: dict[tuple[str, str], list[str]] = {}
    for artefact in results.artefacts:
        if artefact.run_key in runs:
            run = runs[artefact.run_key]
            where = f"seed {run.seed}, {artefact.compression}"
            claims.setdefault((run.configuration, _words(artefact)), []).append(where)
    blocks = []
    for (configuration, words), where in claims.items():
        void = words.startswith("No guarantee")
        blocks.append(
            tag(
                "div",
                tag("h3", configuration),
                tag("p", words, class_="none" if void else None),
                tag("p", "Holds for: " + "; ".join(dict.fromkeys(where)) + ".", class_="note"),
                class_="guarantee",
            )
        )
    lead = "What may be told a patient or a data-protection officer about each model, or why nothing may."
    return section("guarantees", "Privacy guarantees in plain words", tag("p", lead), *blocks)


def data_section(data: Sequence[DataFacts]) -> Html:
    """Returns what the study was run on, with its warnings."""
    content = []
    for facts in data:
        records = ", ".join(f"{number} {split}" for split, number in facts.num_records.items())
        label = tag("span", "synthetic", class_="tag") if facts.synthetic else None
        about: list[tuple[str, Content]] = [
            ("Source", facts.source),
            ("Images", records),
            ("Classes", ", ".join(facts.classes)),
            ("Majority class", f"{numbers.percent(facts.majority_accuracy)} of the test images"),
        ]
        if facts.positive_class:
            about.append(("Counted as positive", facts.positive_class))
        warnings = [tag("div", tag("p", w), class_="caution") for w in facts.warnings]
        content += [tag("h3", facts.name, label), *warnings, tables.facts_table("About the images.", about)]
        content.append(tables.partition_table(facts) if facts.clients else None)
    return section("data", "Data and hospitals", *content)


def reproduce_section(results: Results) -> Html:
    """Returns how to run the study again and what it ran on."""
    provenance = [_flat(run.provenance) for run in results.runs]
    names = sorted({name for flat in provenance for name in flat})
    versions: list[tuple[str, Content]] = []
    for name in names:
        values = dict.fromkeys(flat.get(name, "not recorded") for flat in provenance)
        versions.append((name, tag("code", "; ".join(values))))
    versions += [(f"report: {name}", tag("code", value)) for name, value in sorted(_flat(results.environment).items())]
    return section(
        "reproduce",
        "How to reproduce",
        tag("p", "Run this command; the same seeds give the same numbers on the same machine.")
        if results.command
        else None,
        tag("pre", results.command) if results.command else None,
        tag("details", tag("summary", "The study file"), tag("pre", results.study_toml), open=True),
        tables.facts_table("What the trainings ran on.", versions) if versions else None,
    )


def missing_section(results: Results) -> Html:
    """Returns the cells that are not in the store."""
    if not results.missing:
        return section("missing", "Missing cells", tag("p", "None: every cell of the study is in the store."))
    lead = "These cells of the study have no result. Running the command above again does only these."
    return section(
        "missing", "Missing cells", tag("p", lead), tag("ul", *(tag("li", cell) for cell in results.missing))
    )


def plot(figure: Figure, caption: str) -> Html:
    """Returns a figure's place on the page; the page's script draws it from the JSON beside it."""
    quiet = tag("noscript", "This figure needs JavaScript; its numbers are in the table below.")
    place = tag(
        "div",
        quiet,
        id=figure.name,
        class_="plot",
        role="img",
        aria_label=figure.alt,
        style=f"height:{figure.height}px",
    )
    payload = Html(figure.json.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
    data = tag("script", payload, type="application/json", data_figure=figure.name)
    return tag("figure", place, data, tag("figcaption", caption))


def _words(artefact: Artefact) -> str:
    void = void_reasons(artefact)
    return f"No guarantee: {'; '.join(void)}." if void else artefact.guarantee.in_words()


def _example(example: Example, title: tuple[str, str, int] | None, synthetic: bool) -> Html:
    model = f"{title[0]}, {title[1]}, seed {title[2]}" if title else "a model outside this study"
    clean, adversarial = example.clean_prediction, example.adversarial_prediction
    images = [
        (example.clean_png, "Clean", f"{clean[0]}, {numbers.percent(clean[1], 0)} sure"),
        (example.perturbation_png, "Perturbation", f"{example.scale:.3g} times as strong as it is"),
        (example.adversarial_png, "Attacked", f"{adversarial[0]}, {numbers.percent(adversarial[1], 0)} sure"),
    ]
    shown = [
        tag("div", tag("img", src=_data_uri(png), alt=f"{what}: {said}"), tag("b", what), said)
        for png, what, said in images
    ]
    label = tag("span", "synthetic image", class_="tag") if synthetic else None
    caption = tag("figcaption", tag("b", example.title), label, tag("br"), f"{model}. True class: {example.truth}.")
    return tag("figure", caption, tag("div", *shown, class_="images"), class_="example")


def _is_synthetic(results: Results, artefact_key: str) -> bool:
    run_key = next((a.run_key for a in results.artefacts if a.key == artefact_key), None)
    run = next((run for run in results.runs if run.key == run_key), None)
    if run is None:
        return bool(results.data) and all(facts.synthetic for facts in results.data)
    return data_of(run, results).synthetic


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}: ")
        else:
            flat[prefix + str(name)] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat
