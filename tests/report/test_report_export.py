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
from trilemma.privacy.guarantee import Guarantee
from trilemma.privacy.noise import noise_source_in_words
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


def test_a_void_guarantee_is_exported_as_a_reason_and_no_epsilon(results, tmp_path):
    """The training's guarantee stands, and so does that of its other artefact."""
    why = "int8 calibration reads the training images"
    void, sound = pick(results, DP, "int8"), pick(results, DP, "fp32")
    artefacts = tuple(replace(a, guarantee=a.guarantee.voided(why)) if a in void else a for a in results.artefacts)
    export_csv(replace(results, artefacts=artefacts), tmp_path / "out.csv")
    rows = {row["artefact"]: row for row in read_csv(tmp_path / "out.csv") if row["metric"] == "epsilon"}
    assert void and sound
    for artefact in void:
        row = rows[artefact.key]
        assert (row["value"], row["status"], row["reason"]) == ("", "withheld", why)
    for artefact in sound:
        row = rows[artefact.key]
        assert (row["value"], row["status"], row["reason"]) == (repr(artefact.guarantee.epsilon), "ok", "")


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
    assert rows[BOTH, "fp32"]["robust_evaluation"] == "all at once Linf"
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
                 r"$\star$", r"$\downarrow$", r"$\delta$", "$-$"):  # fmt: skip
        written = written.replace(safe, "")
    assert not re.search(r"(?<!\\)[&%$#_{}]", written)
    assert not re.search(r"[\\](?![&%$#_{}])", written)
    assert not re.search(r"(?<!\\)[|`<]", markdown(text))
    assert "\n" not in markdown(text)


def test_markdown_is_a_table_of_equal_rows(results, tmp_path):
    export_markdown(results, tmp_path / "out.md")
    lines = (tmp_path / "out.md").read_text(encoding="utf-8").splitlines()
    threats, lines = lines[:6], lines[6:]
    assert threats[0] == "| threat | mean |" and threats[2].startswith("| none | 0.96")
    assert (
        threats[3].startswith("| label flip | 0.90") and threats[4] == "" and "each rule of aggregation" in threats[5]
    )
    lines, end = lines[1:-4], lines[-4:]
    assert (end[0], end[2], end[3]) == ("", "", "Data: pneumoniamnist 28.")
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


SIGNS = "★ Pareto-optimal, ↓ at or below the majority class, – not measured."


def tables_of(results, tmp_path):
    """Returns the three tables of text: Markdown, LaTeX and the terminal's at 80 columns."""
    export_markdown(results, tmp_path / "out.md")
    export_latex(results, tmp_path / "out.tex")
    written = [(tmp_path / name).read_text(encoding="utf-8") for name in ("out.md", "out.tex")]
    return [*written, shown(results, 80)]


def test_every_table_of_text_explains_its_signs_and_names_the_majority_class(results, tmp_path):
    claim = "any one image, δ 0.0001, local noise (seeded)"
    about = ["Majority class: 62.5 % of the test images.", f"Epsilon is for {claim}."]
    lines = [SIGNS, *about]
    written, tex, terminal = tables_of(results, tmp_path)
    assert written.splitlines()[-3] == " ".join(lines).replace("62.5 %", "62.5\u00a0%").replace("δ ", "δ\u00a0")
    after = tex.partition("\\end{tabular}\n")[2]
    signs = r"$\star$ Pareto-optimal, $\downarrow$ at or below the majority class, -- not measured."
    assert signs in after
    assert r"Majority class: 62.5~\% of the test images." in after
    assert r"Epsilon is for any one image, $\delta$~0.0001, local noise (seeded)." in after
    assert [line.strip().replace("\u00a0", " ") for line in terminal.splitlines()[-3:]] == lines


def test_without_privacy_nothing_is_said_of_epsilon(tmp_path):
    for text in tables_of(build({PLAIN: MADE[PLAIN]}), tmp_path):
        assert "Epsilon" not in text


def test_different_claims_stand_with_their_epsilons(tmp_path):
    both = replace(MADE[BOTH], unit="client", trust="central")
    results = build({PLAIN: MADE[PLAIN], DP: MADE[DP], BOTH: both})
    written, tex, terminal = (text.replace("\u00a0", " ") for text in tables_of(results, tmp_path))
    assert written.count("| 7.96 (any one image, δ 0.0001, local noise (seeded)) |") == 2
    assert written.count("| 7.96 (any one hospital, δ 0.0001, central noise (seeded)) |") == 2
    assert tex.count(r"& 7.96 (any one hospital, $\delta$~0.0001, central noise (seeded)) &") == 2
    assert terminal.count("hospital") == 2
    assert max(map(len, terminal.splitlines())) <= 80
    assert "0.947–0.977" in terminal
    for text in (written, terminal):
        assert "Epsilons are compared only where unit, δ and noise are the same." in text


def test_csv_and_json_say_what_epsilon_and_sensitivity_are_about(tmp_path):
    results = build({PLAIN: MADE[PLAIN], DP: replace(MADE[DP], unit="patient")})
    results = replace(results, data=(replace(results.data[0], positive_class="normal, benign"),))
    export_csv(results, tmp_path / "out.csv")
    export_json(results, tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    claims = {PLAIN: (None, None, None), DP: ("patient", 1e-4, "local")}
    names = ("privacy_unit", "delta", "trust")
    for row in [*content["configurations"], *content["measurements"]]:
        assert tuple(row[name] for name in names) == claims[row["configuration"]]
        assert row["positive_class"] == "normal, benign"
    assert content["data"][0]["positive_class"] == "normal, benign"
    for row in read_csv(tmp_path / "out.csv"):
        said = tuple("" if value is None else str(value) for value in claims[row["configuration"]])
        assert tuple(row[name] for name in names) == said
        assert row["positive_class"] == "normal, benign"


def test_seeded_noise_is_told_from_the_operating_systems(tmp_path):
    results = build({PLAIN: MADE[PLAIN], DP: MADE[DP], BOTH: MADE[BOTH]})
    system = {run.key for run in results.runs if run.configuration == BOTH}
    artefacts = tuple(
        replace(a, guarantee=a.guarantee.model_copy(update={"noise_source": "the system's"}))
        if a.run_key in system
        else a
        for a in results.artefacts
    )
    results = replace(results, artefacts=artefacts)
    export_csv(results, tmp_path / "out.csv")
    export_json(results, tmp_path / "out.json")
    said = {PLAIN: None, DP: "seeded noise, for research", BOTH: "the system's"}
    for row in json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["measurements"]:
        assert row["noise_source"] == said[row["configuration"]]
    for row in read_csv(tmp_path / "out.csv"):
        assert row["noise_source"] == (said[row["configuration"]] or "")


@pytest.mark.parametrize(("kind", "seeded"), [("system", False), ("seeded", True)])
def test_the_table_says_of_which_noise_an_epsilon_is(tmp_path, kind, seeded):
    results = build({DP: MADE[DP]})
    words = {"noise_source": noise_source_in_words(kind)}
    artefacts = tuple(replace(a, guarantee=a.guarantee.model_copy(update=words)) for a in results.artefacts)
    export_json(replace(results, artefacts=artefacts), tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["configurations"]
    assert [row["seeded_noise"] for row in rows] == [seeded] * len(rows) and rows


def test_json_holds_the_guarantee_of_each_artefact_and_not_only_of_its_training(results, tmp_path):
    void = {a.key for a in pick(results, DP, "int8")}
    artefacts = tuple(
        replace(a, guarantee=a.guarantee.voided("looked at private images")) if a.key in void else a
        for a in results.artefacts
    )
    export_json(replace(results, artefacts=artefacts), tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [row["key"] for row in content["artefacts"]] == [a.key for a in artefacts]
    assert {row["noise_source"] for row in content["measurements"] if row["artefact"] in void} == {None}
    trainings = {row["key"]: Guarantee.model_validate(row["guarantee"]) for row in content["trainings"]}
    for row, artefact in zip(content["artefacts"], artefacts, strict=True):
        assert Guarantee.model_validate(row["guarantee"]) == artefact.guarantee
        assert (row["training"], row["compression"]) == (artefact.run_key, artefact.compression)
        assert (row["file_bytes"], row["sparsity"]) == (artefact.file_bytes, artefact.sparsity)
        if artefact.key in void:
            assert row["guarantee"]["void"] == ["looked at private images"]
            assert trainings[row["training"]].epsilon is not None


def test_of_two_data_sets_each_has_its_positive_class(tmp_path):
    results = build({PLAIN: MADE[PLAIN], DP: MADE[DP]})
    breast = {"kind": "medmnist", "name": "breastmnist", "size": 28}
    runs = tuple(
        replace(run, spec={**run.spec, "data": breast}) if run.configuration == DP else run for run in results.runs
    )
    facts = replace(results.data[0], name="breastmnist 28, iid, 3 clients, seed 0", positive_class="normal, benign")
    rows = summary_rows(replace(results, runs=runs, data=(*results.data, facts)))
    found = {row["configuration"]: row["positive_class"] for row in rows}
    assert found == {PLAIN: "pneumonia", DP: "normal, benign"}


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
