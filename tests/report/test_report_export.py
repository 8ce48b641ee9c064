import csv
import json
import math
import re
from dataclasses import replace

import pytest
from builder import BOTH, DP, MADE, PLAIN, build, pick
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from trilemma.evaluation.measurement import Measurement
from trilemma.report.export import COLUMNS, export_csv, export_json, export_latex, export_markdown, latex, markdown
from trilemma.report.summary import summary_rows, written_rows
from trilemma.report.terminal import answer_names, answer_table


@pytest.fixture(scope="module")
def results():
    return build()


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_holds_every_measurement_and_comes_back_exactly(results, tmp_path):
    export_csv(results, tmp_path / "out.csv")
    rows = read_csv(tmp_path / "out.csv")
    assert tuple(rows[0]) == COLUMNS
    rows = [row for row in rows if row["kind"] != "training"]
    expected = [(e, m) for e in results.evaluated for m in e.measurements]
    assert len(rows) == len(expected)
    for row, (e, m) in zip(rows, expected, strict=True):
        assert row["artefact"] == e.artefact_key
        assert (row["evaluation"], row["kind"], row["metric"]) == (e.evaluation, e.kind, m.metric)
        for name in ("value", "low", "high", "radius"):
            number = getattr(m, name)
            assert row[name] == "" if number is None else float(row[name]) == number
        assert (int(row["n"]), row["unit"], row["split"]) == (m.n, m.unit, m.split)
        assert (row["status"], row["reason"]) == (m.status, m.reason)
        assert (row["source"], row["client"]) == (m.source or "", m.client or "")


def test_csv_says_epsilon_or_why_there_is_none(results, tmp_path):
    export_csv(results, tmp_path / "out.csv")
    rows = [row for row in read_csv(tmp_path / "out.csv") if row["metric"] == "epsilon"]
    assert len(rows) == len(results.artefacts)
    for row in rows:
        if "epsilon" in row["configuration"]:
            assert (row["status"], row["reason"]) == ("ok", "")
            assert float(row["value"]) > 0
        else:
            assert row["value"] == ""
            assert (row["status"], row["reason"]) == ("withheld", "training without differential privacy")


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\r=1"])
def test_a_spreadsheet_runs_nothing(results, tmp_path, name):
    runs = tuple(replace(run, configuration=name) for run in results.runs)
    export_csv(replace(results, runs=runs, name=name), tmp_path / "out.csv")
    row = read_csv(tmp_path / "out.csv")[0]
    assert row["configuration"] == f"'{name}"
    assert row["study"] == f"'{name}"


def test_negative_numbers_are_no_formulas(results, tmp_path):
    first = results.evaluated[0]
    negative = replace(first, measurements=(Measurement("mcc", -0.25, -0.3, -0.2, 10, "coefficient"),))
    export_csv(replace(results, evaluated=(negative,)), tmp_path / "out.csv")
    assert read_csv(tmp_path / "out.csv")[-1]["value"] == "-0.25"


def test_json_comes_back_with_null_for_missing(results, tmp_path):
    export_json(results, tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert content["study"] == results.name
    assert content["configurations"] == summary_rows(results)
    measured = [m for m in content["measurements"] if m["kind"] != "training"]
    assert len(measured) == sum(len(e.measurements) for e in results.evaluated)
    undefined = [m for m in measured if m["status"] == "undefined"]
    assert undefined
    assert all(m["value"] is None for m in undefined)
    assert len(content["trainings"]) == len(results.runs)


def test_json_has_no_infinities(results, tmp_path):
    first = results.evaluated[0]
    broken = replace(first, measurements=(Measurement("accuracy", math.inf), Measurement("auroc", math.nan)))
    export_json(replace(results, evaluated=(broken,)), tmp_path / "out.json")
    json.loads((tmp_path / "out.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_summary_rows_hold_none_for_missing_and_the_numbers_otherwise(results):
    rows = {(row["configuration"], row["compression"]): row for row in summary_rows(results)}
    assert rows[PLAIN, "fp32"]["epsilon"] is None
    assert rows[PLAIN, "fp32"]["no_guarantee_because"] == "training without differential privacy"
    assert rows[DP, "int8"]["epsilon"] == 7.96
    assert rows[DP, "int8"]["file_bytes"] == pick(results, DP, "int8")[0].file_bytes
    assert rows[BOTH, "fp32"]["robust_evaluation"] == "all at once"
    clean = replace(results, evaluated=())
    assert all(row["accuracy"] is None and row["robust_accuracy"] is None for row in summary_rows(clean))


def test_latex_is_a_complete_booktabs_table(results, tmp_path):
    export_latex(results, tmp_path / "out.tex")
    lines = (tmp_path / "out.tex").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("\\") and "&" not in line] == [
        lines[2], "\\toprule", "\\midrule", "\\bottomrule", "\\end{tabular}",
    ]  # fmt: skip
    rows = [line for line in lines if line.endswith("\\\\")]
    assert len(rows) == 1 + len(summary_rows(results))
    num_columns = len(re.fullmatch(r"\\begin\{tabular\}\{([lrc]+)\}", lines[2]).group(1))
    assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {num_columns}
    assert "0.962 (0.947 to 0.977)" in rows[1]
    assert "no guarantee" in rows[1]


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=30))
def test_latex_and_markdown_leave_no_special_character_alone(text):
    written = latex(text)
    for safe in (r"\textbackslash{}", r"\textasciitilde{}", r"\textasciicircum{}", r"\textless{}", r"\textgreater{}",
                 r"\textbar{}", r"\textquotedbl{}", r"\textasciigrave{}", r"\textquotesingle{}", r"$\varepsilon$",
                 r"$\star$", r"$\downarrow$", "$-$"):  # fmt: skip
        written = written.replace(safe, "")
    assert not re.search(r"(?<!\\)[&%$#_{}]", written)
    assert not re.search(r"[\\](?![&%$#_{}])", written)
    assert not re.search(r"(?<!\\)[|`<]", markdown(text))
    assert "\n" not in markdown(text)


def test_markdown_is_a_table_of_equal_rows(results, tmp_path):
    export_markdown(results, tmp_path / "out.md")
    lines = (tmp_path / "out.md").read_text(encoding="utf-8").splitlines()
    lines, end = lines[:-2], lines[-2:]
    assert end == ["", "Data: pneumoniamnist 28."]
    assert len(lines) == 2 + len(summary_rows(results))
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    runs = tuple(replace(run, configuration="a|b<script>") for run in results.runs)
    export_markdown(replace(results, runs=runs), tmp_path / "out.md")
    assert "a\\|b&lt;script&gt;" in (tmp_path / "out.md").read_text(encoding="utf-8")


def test_every_export_names_its_data_and_says_where_they_are_synthetic(tmp_path):
    for results, said, cells in [
        (build(), "Data: pneumoniamnist 28.", ("pneumoniamnist 28", "false")),
        (build(synthetic=True), "Data: phantom 64 (SYNTHETIC images, not taken of patients).", ("phantom 64", "true")),
    ]:
        export_latex(results, tmp_path / "out.tex")
        assert f"% {said}" in (tmp_path / "out.tex").read_text(encoding="utf-8").splitlines()
        export_markdown(results, tmp_path / "out.md")
        assert (tmp_path / "out.md").read_text(encoding="utf-8").splitlines()[-1] == said
        export_csv(results, tmp_path / "out.csv")
        assert {(row["data"], row["synthetic"]) for row in read_csv(tmp_path / "out.csv")} == {cells}
        export_json(results, tmp_path / "out.json")
        measured = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["measurements"]
        assert {m["synthetic"] for m in measured} == {cells[1] == "true"}


def test_a_mixed_study_says_which_rows_are_synthetic(tmp_path):
    real, made_up = build(), build(synthetic=True)
    runs = tuple(
        replace(run, spec={**run.spec, "data": {"kind": "phantom"}}) if run.configuration == DP else run
        for run in real.runs
    )
    mixed = replace(real, runs=runs, data=(*real.data, *made_up.data))
    export_csv(mixed, tmp_path / "out.csv")
    for row in read_csv(tmp_path / "out.csv"):
        assert row["synthetic"] == ("true" if row["configuration"] == DP else "false")
    export_latex(mixed, tmp_path / "out.tex")
    said = "% Data: pneumoniamnist 28; phantom 64 (SYNTHETIC images, not taken of patients)."
    assert said in (tmp_path / "out.tex").read_text(encoding="utf-8")


def test_exports_are_the_same_every_time(tmp_path):
    for export in (export_csv, export_json, export_latex, export_markdown):
        export(build(), tmp_path / "a")
        export(build(), tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def shown(results, width):
    console = Console(width=width, record=True, file=None, quiet=False, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(answer_table(results, width))
    return capture.get()


def test_the_terminal_table_shows_the_numbers(results):
    text = shown(results, 140)
    assert "0.962" in text
    assert "0.947–0.977" in text
    assert "no guarantee" in text
    assert max(map(len, text.splitlines())) <= 140
    assert max(map(len, shown(results, 100).splitlines())) <= 100
    assert answer_names(results, 100) == []


def test_a_narrow_terminal_cuts_no_number_in_two(results):
    text = shown(results, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "0.947–0.977" in text  # the widest interval, on one line
    names = answer_names(results, 80)
    _, rows = written_rows(results)
    assert [name.split(None, 1) for name in names] == [
        [str(number), f"{row[0]}, {row[1]}"] for number, row in enumerate(rows, 1)
    ]
    assert re.findall(r"^ *(\d+)  ", text, re.MULTILINE) == [str(number) for number in range(1, len(rows) + 1)]


def test_names_are_no_markup_and_no_escape_sequences_in_a_terminal():
    results = build({PLAIN: MADE[PLAIN]})
    runs = tuple(replace(run, configuration="[red]x[/red]\x1b[2J") for run in results.runs)
    text = shown(replace(results, runs=runs), 140)
    assert "[red]x[/red]" in text
    assert "\x1b[2J" not in text
