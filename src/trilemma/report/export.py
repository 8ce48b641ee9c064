"""The results for other programs: CSV and JSON with every number, LaTeX and Markdown with the table.

CSV is tidy: one row per measurement, an empty field where there is no value. `privacy_unit`, `delta` and `trust` are
what an epsilon is about, `noise_source` says whether the noise was fit for more than research; `positive_class` is
whose images sensitivity is about, empty for more than two classes, where it is a macro average. Text that a spreadsheet
would run as a formula gets an apostrophe in front.
"""

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trilemma.atomic import atomic_write
from trilemma.evaluation.measurement import Measurement
from trilemma.report.cells import Cell
from trilemma.report.claims import TIME_IS_SECRET, claim_of
from trilemma.report.configurations import configuration_rows, headline, void_reasons
from trilemma.report.datasets import DataUsed, data_in_words, data_of
from trilemma.report.markup import clean
from trilemma.report.poisoning import threats_caption, written_threats
from trilemma.report.sent import traffic_of
from trilemma.report.summary import legend, summary_rows, written_rows
from trilemma.results import Artefact, Results, Run

#: Columns of the CSV file and fields of a measurement in JSON, in order.
COLUMNS = (
    "study", "configuration", "seed", "compression", "artefact", "evaluation", "kind", "metric", "radius", "source",
    "client", "value", "low", "high", "n", "unit", "split", "status", "reason", "data", "synthetic",
    "positive_class", "privacy_unit", "delta", "trust", "noise_source",
)  # fmt: skip

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}", "\u00a0": "~",
    "–": "--", "−": "$-$", "ε": r"$\varepsilon$", "★": r"$\star$", "↓": r"$\downarrow$", "δ": r"$\delta$",
    "“": "``", "”": "''", "≤": r"$\leq$",
}  # fmt: skip
_MARKDOWN = {c: f"\\{c}" for c in "\\`*_[]|~$"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " ", "\r": " "}


def export_csv(results: Results, path: Path) -> None:
    """Writes every measurement as one row of UTF-8 CSV (RFC 4180); numbers at full precision."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for row in measurement_rows(results):
        writer.writerow([_cell(row[name]) for name in COLUMNS])
    atomic_write(Path(path), text.getvalue().encode())


def export_json(results: Results, path: Path) -> None:
    """Writes the study, its table of configurations and every measurement as one JSON object; missing is null.

    A training's guarantee may stand where that of an artefact is void: each has its own.
    """
    content = {
        "study": results.name,
        "question": results.question,
        "seeds": list(results.seeds),
        "command": results.command,
        "data": [
            {"name": d.name, "source": d.source, "synthetic": d.synthetic, "classes": list(d.classes),
             "positive_class": d.positive_class or None, "num_records": d.num_records,
             "majority_accuracy": d.majority_accuracy, "clients": d.clients, "warnings": list(d.warnings)}
            for d in results.data
        ],
        "configurations": summary_rows(results),
        "measurements": list(measurement_rows(results)),
        "trainings": [
            {"key": r.key, "configuration": r.configuration, "seed": r.seed, "spec": r.spec, "history": r.history,
             "guarantee": r.guarantee.model_dump(mode="json"), "provenance": r.provenance, "seconds": r.seconds,
             "peak_memory_bytes": r.peak_memory_bytes, "num_parameters": r.num_parameters,
             "chosen_round": r.chosen_round}
            for r in results.runs
        ],
        "artefacts": [
            {"key": a.key, "training": a.run_key, "compression": a.compression, "file_bytes": a.file_bytes,
             "sparsity": a.sparsity, "guarantee": a.guarantee.model_dump(mode="json")}
            for a in results.artefacts
        ],
        "missing": list(results.missing),
    }  # fmt: skip
    text = json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False, default=str)
    atomic_write(Path(path), (clean(text) + "\n").encode())


def export_latex(results: Results, path: Path) -> None:
    """Writes the table of configurations as a tabular for LaTeX with the package booktabs."""
    titles, rows = written_rows(results)
    columns = "ll" + "r" * (len(titles) - 3) + "c"
    lines = [
        "% Needs \\usepackage{booktabs}, and \\usepackage[T1]{fontenc} for quotation marks.",
        f"% {clean(data_in_words(results)).replace(chr(10), ' ')}",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        " & ".join(map(latex, titles)) + " \\\\",
        "\\midrule",
        *(" & ".join(map(latex, row)) + " \\\\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
        "",
        f"{{\\footnotesize {latex(' '.join(legend(results)))}\\par}}",
    ]
    atomic_write(Path(path), ("\n".join(lines) + "\n").encode())


def export_markdown(results: Results, path: Path) -> None:
    """Writes the table of configurations as a Markdown table, and that of threats and rules where there are threats."""
    titles, rows = written_rows(results)
    lines = [
        *_markdown_table(titles, rows, [" --- ", " --- ", *[" ---: "] * (len(titles) - 3), " :---: "]),
        "",
        markdown(" ".join(legend(results))),
        "",
        markdown(data_in_words(results)),
    ]
    configurations = configuration_rows(results)
    by = headline(configurations)
    titles, rows = written_threats(configurations, by)
    if rows:
        table = _markdown_table(titles, rows, [" --- ", *[" ---: "] * (len(titles) - 1)])
        lines = [*table, "", markdown(threats_caption(by)), "", *lines]
    atomic_write(Path(path), ("\n".join(lines) + "\n").encode())


def _markdown_table(titles: list[str], rows: list[list[str]], columns: list[str]) -> list[str]:
    return [
        "| " + " | ".join(map(markdown, titles)) + " |",
        "|" + "|".join(columns) + "|",
        *("| " + " | ".join(map(markdown, row)) + " |" for row in rows),
    ]


def measurement_rows(results: Results) -> Iterator[dict[str, Any]]:
    """Yields every measurement as a flat row.

    In the same form: each artefact's epsilon, training time, and bytes of one hospital in one round.
    """
    runs = {run.key: run for run in results.runs}
    artefacts = {artefact.key: artefact for artefact in results.artefacts}
    data = {run.key: data_of(run, results) for run in results.runs}
    for artefact in results.artefacts:
        if artefact.run_key in runs:
            for m in _of_training(runs[artefact.run_key], artefact):
                row = _row(results.name, runs[artefact.run_key], artefact, data[artefact.run_key], m)
                yield row | {"evaluation": "training", "kind": "training"}
    for evaluated in results.evaluated:
        artefact = artefacts.get(evaluated.artefact_key)
        if artefact is not None and artefact.run_key in runs:
            for m in evaluated.measurements:
                row = _row(results.name, runs[artefact.run_key], artefact, data[artefact.run_key], m)
                yield row | {"evaluation": evaluated.evaluation, "kind": evaluated.kind}


def latex(text: str) -> str:
    """Returns text that LaTeX sets as it is."""
    return "".join(_LATEX.get(character, character) for character in clean(text).replace("\n", " "))


def markdown(text: str) -> str:
    """Returns text that Markdown shows as it is, also within a table."""
    return "".join(_MARKDOWN.get(character, character) for character in clean(text))


def _of_training(run: Run, artefact: Artefact) -> Iterator[Measurement]:
    epsilon = artefact.guarantee.epsilon
    why = "; ".join(void_reasons(artefact))
    status = "ok" if epsilon is not None else "withheld"
    yield Measurement("epsilon", epsilon, unit="coefficient", split="train", status=status, reason=why)
    told = run.seconds is not None
    status, why = ("ok", "") if told else ("withheld", TIME_IS_SECRET)
    yield Measurement("training_seconds", run.seconds, unit="seconds", split="train", status=status, reason=why)
    traffic = traffic_of([Cell(run, artefact, ())])
    for metric, sent in (("bytes_up_by_client_mean", traffic.up), ("bytes_down_by_client_mean", traffic.down)):
        status = "ok" if sent.mean.value is not None else "withheld"
        yield Measurement(metric, sent.mean.value, unit="bytes", split="train", status=status, reason=sent.mean.reason)


def _row(study: str, run: Run, artefact: Artefact, data: DataUsed, m: Measurement) -> dict[str, Any]:
    """Returns a measurement with where it comes from, in the order of the columns; its evaluation is still empty."""
    claim = claim_of(artefact.guarantee)
    row = {
        "study": study,
        "configuration": run.configuration,
        "seed": run.seed,
        "compression": artefact.compression,
        "artefact": artefact.key,
        "evaluation": "",
        "kind": "",
        **m._asdict(),
        "data": data.name,
        "synthetic": data.synthetic,
        "positive_class": data.positive_class or None,
        "privacy_unit": claim.unit if claim else None,
        "delta": claim.delta if claim else None,
        "trust": claim.trust if claim else None,
        "noise_source": (artefact.guarantee.noise_source or None) if claim else None,
    }
    return {name: row[name] for name in COLUMNS}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value) if math.isfinite(value) else ""
    text = clean(str(value))
    return f"'{text}" if text.startswith(_FORMULA) else text


def finite(value: Any) -> Any:
    """Returns a JSON-like value with None for every number that is not finite."""
    if isinstance(value, dict):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
