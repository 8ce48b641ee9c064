"""What is withheld shows nowhere as a number, counts for nothing, and is explained."""

import csv
import html
import io
import json
import re
from dataclasses import replace

import pytest
from builder import (
    BOTH,
    DIAGNOSTICS,
    EVIDENCE,
    FLAGS,
    MADE,
    PGD,
    PLAIN,
    RADII,
    STRENGTHS,
    bounded,
    build,
    flagged,
    pick,
    rate,
    withhold,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from trilemma.evaluation.measurement import Measurement
from trilemma.evaluation.strength import BLACK_BOX, ENSEMBLE, GRADIENTS, SELF_TUNING
from trilemma.report import numbers
from trilemma.report.answer import answer
from trilemma.report.configurations import configuration_rows, headline
from trilemma.report.estimates import Estimate, estimate
from trilemma.report.export import export_csv, export_json, export_latex, export_markdown
from trilemma.report.figures import robustness_figure
from trilemma.report.flags import FLAG_TITLES, title_of
from trilemma.report.html import report_html
from trilemma.report.pareto import pareto_rows, point
from trilemma.report.summary import legend, summary_rows, written_rows
from trilemma.report.terminal import answer_table
from trilemma.report.transfer import transfer_matrices

FLAG = "black_box_beats_white_box"
WINNING = {**MADE, BOTH: replace(MADE[BOTH], robust=(0.77, 0.75, 0.74))}


def row_of(results, title):
    return next(row for row in configuration_rows(results) if row.title == title)


def raised(results, configuration, compression="int8", name=FLAG, seeds=2, evidence=EVIDENCE):
    return flagged(results, pick(results, configuration, compression)[:seeds], name, evidence)


def text_of(results, section):
    markup = re.search(f'<section id="{section}">(.*?)</section>', report_html(results), re.S).group(1)
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


def line_of(markup, title):
    """The table rows of a configuration in some markup."""
    return [line for line in re.findall(r"<tr[^>]*>.*?</tr>", markup, re.S) if title in html.unescape(line)]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1), st.booleans()), min_size=1, max_size=6))
def test_no_mean_is_taken_of_what_is_left(trainings):
    samples = [
        (seed, withhold(rate("robust_accuracy", value), "a flag") if hidden else rate("robust_accuracy", value))
        for seed, value, hidden in trainings
    ]
    found = estimate(samples)
    hidden = [hidden for *_, hidden in trainings]
    assert found.withheld == any(hidden)
    assert (found.value is None) == any(hidden)
    if found.withheld:
        assert found == Estimate(reason=found.reason, withheld=True), "neither an interval nor a seed's value is left"
        assert "a flag" in found.reason
        assert found.reason.startswith(f"{sum(hidden)} of {len(hidden)} trainings: ") == (not all(hidden))


def test_undefined_is_not_withheld():
    undefined = Measurement("robust_accuracy", None, status="undefined", reason="no other training")
    assert not estimate([(0, undefined)]).withheld
    assert estimate([(0, undefined), (1, rate("robust_accuracy", 0.4))]).value == 0.4
    assert estimate([(0, undefined), (1, withhold(rate("robust_accuracy", 0.4), "a flag"))]).reason == (
        "1 of 2 trainings: a flag"
    )


def test_one_flagged_training_withholds_its_row_and_no_other():
    results = raised(build(), PGD, seeds=1)
    row = row_of(results, f"{PGD}, int8")
    assert all(a.robust.withheld for a in row.attacked)
    beside = [
        (a.among_correct, a.sensitivity, a.specificity) for a in row.attacked if a.strength != STRENGTHS["transfer"]
    ]
    assert len(beside) == 9
    assert all(each.withheld for at in beside for each in at)
    assert row.scored("PGD-20 Linf", RADII[2]).estimate.withheld
    assert row.flags == (f"black box beats white box (seed 0): {EVIDENCE}",)
    assert row.metric("accuracy").value is not None
    others = [other for other in configuration_rows(results) if other.title != row.title]
    assert not any(a.robust.withheld for other in others for a in other.attacked)
    assert not any(other.flags for other in others)


def test_every_cell_of_a_withheld_row_says_so_and_why():
    results = raised(build(), PGD)
    text = report_html(results)
    for table in ("configurations", "robustness", "diagnostics"):
        assert EVIDENCE in text_of(results, table).replace("\u00a0", " "), table
    main = re.search('<table id="configurations-table">(.*?)</table>', text, re.S).group(1)
    (line,) = [line for line in line_of(main, PGD) if ">int8<" in line and BOTH not in line]
    assert ">withheld<sup>" in line
    value = row_of(build(), f"{PGD}, int8").under("all at once Linf", RADII[2]).robust.value
    assert repr(value) in report_html(build()), "the number is there where nothing is raised"
    assert repr(value) not in text
    assert "Withheld and not drawn: “PGD 4/255, int8”." in text_of(results, "robustness")


def test_a_withheld_row_is_not_drawn():
    def lines(results):
        rows = configuration_rows(results)
        return len(json.loads(robustness_figure(rows, "PGD-20 Linf", 0).json)["data"])

    assert lines(raised(build(), PGD)) == lines(build()) - 1


def test_a_transfer_to_a_flagged_model_is_withheld_for_every_seed():
    (before,) = transfer_matrices(build())
    (after,) = transfer_matrices(raised(build(), PGD, seeds=1))
    assert after.targets == before.targets and after.sources == before.sources
    column = after.targets.index(f"{PGD}, int8")
    assert after.withheld[column] == f"{FLAG}: {EVIDENCE}"
    assert {values[column] for values in after.values} == {None}
    assert None not in {values[column] for values in before.values}
    rest = [i for i in range(len(after.targets)) if i != column]
    assert [[v[i] for i in rest] for v in after.values] == [[v[i] for i in rest] for v in before.values]
    assert text_of(raised(build(), PGD), "transfer").count("withheld") == len(after.sources)


def test_withheld_never_counts_for_pareto():
    results = build(WINNING)
    rows = configuration_rows(results)
    index = [row.title for row in rows].index(f"{BOTH}, int8")
    assert pareto_rows(rows, headline(rows))[index]
    rows = configuration_rows(raised(results, BOTH, seeds=1))
    assert point(rows[index], headline(rows)) is None
    assert not pareto_rows(rows, headline(rows))[index]


def verdict_of(results):
    return next(finding.text for finding in answer(results) if "at once?" in finding.topic)


def test_withheld_is_never_called_robust():
    results = build(WINNING)
    assert verdict_of(results).startswith(f"Yes, on these data: “{BOTH}, int8”")
    text = verdict_of(raised(results, BOTH, seeds=1))
    assert text.startswith("Not shown. Of 10 configurations as shipped, 6 carry a privacy guarantee, 3 are better")
    assert "none is shown to do all three. The robust accuracy of 1 is withheld, and counts as none." in text
    assert f"The closest, “{BOTH}, int8”, is private and small but not robust: " in text
    assert "is withheld (black box beats white box)." in text


def test_a_constant_that_is_flagged_leaves_nothing_open():
    assert verdict_of(raised(build(WINNING), BOTH, name="constant")).startswith("No. Of 10")


def test_a_withheld_yardstick_leaves_the_winner_alone():
    assert verdict_of(raised(build(WINNING), PGD)).startswith("Yes, on these data")


def test_the_answer_names_configuration_flag_and_evidence():
    results = raised(raised(build(), PGD), BOTH, seeds=1, name="zero_gradient", evidence="on 200 of 256 images")
    findings = {finding.topic: finding for finding in answer(results)}
    finding = findings["Robustness withheld"]
    assert finding.caution
    assert finding.sentences == (
        f"“{PGD}, int8”, black box beats white box within Linf 8/255 (seed 0, and in 1 more of its 2 trainings): "
        f"{EVIDENCE}.",
        f"“{BOTH}, int8”, zero gradient within Linf 8/255 (seed 0): on 200 of 256 images.",
    )
    assert "Robustness withheld" not in {finding.topic for finding in answer(build())}


def test_only_so_many_flags_are_written_out():
    results = build()
    for name in FLAGS:
        results = raised(raised(results, PGD, name=name), BOTH, name=name)
    (finding,) = [finding for finding in answer(results) if finding.topic == "Robustness withheld"]
    assert len(finding.sentences) == 13
    assert finding.sentences[-1].startswith(f"{2 * len(FLAGS) - 12} more stand in the table")


def test_a_comparison_with_a_withheld_side_is_not_made():
    results = raised(raised(build(), PGD, "fp32"), PLAIN, "fp32")
    text = next(finding.text for finding in answer(results) if "adversarial training" in finding.topic)
    assert f"Under attack nothing can be said: the robust accuracy of “{PGD}” and of “{PLAIN}” is withheld." in text
    assert "survive" not in " ".join(finding.text for finding in answer(results))
    fragile = next(finding.text for finding in answer(results) if "fragile" in finding.topic)
    assert fragile == f"It cannot be told: the robust accuracy of “{PLAIN}” is withheld."


def undiagnosed(results):
    reason = "withheld until the diagnostics have run"
    return replace(
        results,
        evaluated=tuple(
            replace(e, measurements=tuple(withhold(m, reason) for m in e.measurements)) if e.strength is not None else e
            for e in results.evaluated
            if e.kind != "diagnostics"
        ),
    )


def test_what_was_not_diagnosed_is_said_so():
    results = undiagnosed(build({PLAIN: MADE[PLAIN], BOTH: MADE[BOTH]}))
    (finding,) = [finding for finding in answer(results) if finding.topic == "Robustness withheld"]
    assert finding.sentences[0] == f"“{PLAIN}, fp32”: withheld until the diagnostics have run."
    assert len(finding.sentences) == 4
    assert verdict_of(results).startswith("Not shown.")
    assert "Nothing has been looked at yet." in text_of(results, "diagnostics")
    assert headline(configuration_rows(results)).evaluation == "all at once Linf", "no weaker attack takes its place"
    only = replace(build(), evaluated=tuple(e for e in build().evaluated if e.kind in ("clean", "cost")))
    assert 'id="diagnostics"' not in report_html(only)


def test_the_table_of_flags_has_a_row_per_model_and_a_column_per_flag():
    results = build()
    keys = {artefact.key for artefact in pick(results, PGD, "int8")}
    first, second = sorted(keys)

    def change(e):
        if e.kind != "diagnostics":
            return e
        flags = list(e.measurements)
        if e.artefact_key == first:
            flags[0] = flags[0]._replace(value=None, status="undefined", reason="no image is answered rightly")
            del flags[-1]
        return replace(e, measurements=tuple(flags))

    results = replace(raised(results, PGD, seeds=2), evaluated=tuple(map(change, raised(results, PGD).evaluated)))
    section = re.search('<section id="diagnostics">(.*?)</section>', report_html(results), re.S).group(1)
    lines = re.findall(r"<tr>.*?</tr>", section, re.S)
    assert [html.unescape(t) for t in re.findall('<th scope="col"[^>]*>(.*?)</th>', lines[0])] == [
        "Configuration",
        "within",
        *map(title_of, FLAGS),
    ]
    assert len(lines) == 1 + len(configuration_rows(results))
    (line,) = [line for line in lines if f">{PGD}, int8<" in line]
    cells = [re.sub("<sup>.*?</sup>", "", cell) for cell in re.findall("<td[^>]*>(.*?)</td>", line)]
    quiet = '<span aria-hidden="true">–</span><span class="unseen">not raised</span>'
    assert cells[0] == 'Linf 8/255<span class="range">256 images</span>'
    assert cells[1] == "undefined in 1 of 2"
    assert cells[2] == quiet
    assert cells[3] == "<b>raised</b> in 2 of 2"
    assert cells[-1] == "not looked for in 1 of 2"
    assert section.count(EVIDENCE.replace("<", "&lt;")) == 2 * 2, "a footnote and a title for every seed"
    assert "no image is answered rightly" in section
    other = next(line for line in lines if f">{PLAIN}, fp32<" in line)
    assert re.findall("<td[^>]*>(.*?)</td>", other)[1:] == [quiet] * len(FLAGS)


def test_few_images_are_said_to_tell_little():
    results = build({PGD: MADE[PGD]})
    few = [
        replace(e, measurements=tuple(m._replace(n=40) for m in e.measurements)) if e.kind == "diagnostics" else e
        for e in results.evaluated
    ]
    assert "40 images: too few to tell much" in text_of(replace(results, evaluated=tuple(few)), "diagnostics")
    assert "too few" not in text_of(results, "diagnostics")


def test_a_hospitals_own_model_is_named_where_it_is_flagged():
    results = build()
    where = pick(results, "local only", "fp32")
    row = row_of(flagged(results, where[1:2], FLAG), "local only, fp32")
    assert row.flags[0].startswith("black box beats white box (seed 0, hospital 2’s own model): ")


def test_two_norms_have_a_row_each_and_withhold_apart():
    results = build({PGD: MADE[PGD]})
    second = []
    for e in results.evaluated:
        if e.kind == "diagnostics":
            second.append(replace(e, evaluation="diagnostics L2 0.5"))
        elif e.kind == "pgd":
            second.append(replace(e, evaluation="PGD-20 L2"))
    flagged_linf = raised(results, PGD)
    both = replace(flagged_linf, evaluated=(*flagged_linf.evaluated, *second))
    row = row_of(both, f"{PGD}, int8")
    assert row.under("PGD-20 Linf", RADII[0]).robust.withheld
    assert row.under("PGD-20 L2", RADII[0]).robust.value is not None
    assert row.scored("PGD-20 L2", RADII[0]).estimate.value is not None
    assert [flag.at for flag in row.raised] == ["Linf 8/255"] * 2
    section = text_of(both, "diagnostics")
    assert section.count("Linf 8/255") == section.count("L2 0.5") == 2


def test_every_flag_has_words():
    assert set(FLAGS) == set(FLAG_TITLES)
    assert title_of("something_new") == "something new"


def with_strength(results, strength, label):
    """The evaluation of all attacks at once as another attack."""
    return replace(
        results,
        evaluated=tuple(
            replace(e, kind="other", strength=strength, evaluation=label) if e.kind == "all_at_once" else e
            for e in results.evaluated
        ),
    )


@pytest.mark.parametrize("strength", [SELF_TUNING, ENSEMBLE])
def test_a_strong_attack_is_the_headline_and_no_caution(strength):
    results = with_strength(build(), strength, "Strong Linf")
    assert headline(configuration_rows(results)).evaluation == "Strong Linf"
    assert "A weak attack" not in {finding.topic for finding in answer(results)}


@pytest.mark.parametrize("strength", [BLACK_BOX, GRADIENTS])
def test_without_a_strong_attack_robust_accuracy_is_an_upper_bound(strength):
    results = with_strength(build(), strength, "Other Linf")
    (finding,) = [finding for finding in answer(results) if finding.topic == "A weak attack"]
    assert finding.caution
    assert "upper bound" in finding.text
    by = headline(configuration_rows(results))
    assert f"The strongest attack of this study is “{by.evaluation}”" in finding.text
    clean = replace(build(), evaluated=tuple(e for e in build().evaluated if e.kind == "clean"))
    assert "A weak attack" not in {finding.topic for finding in answer(clean)}


WHY = "an upper bound: “PGD-20 Linf” leaves less"


def test_a_number_that_is_known_to_be_too_high_is_marked_everywhere(tmp_path):
    results = build({PLAIN: MADE[PLAIN], PGD: MADE[PGD], BOTH: MADE[BOTH]})
    results = bounded(results, pick(results, PGD, "fp32")[:1], "all at once Linf", WHY)
    by = headline(configuration_rows(results))
    assert by.evaluation == "all at once Linf"  # the strongest, even so
    robust = row_of(results, f"{PGD}, fp32").under(by.evaluation, by.radius).robust
    other = dict(robust.by_seed)[1]
    assert robust.bound and robust.least == pytest.approx((0.1 + other) / 2)  # of one training 10 % are left
    assert robust.reason == f"{WHY} of 1 of 2 trainings; with that {numbers.percent(robust.least)} are left"
    assert not row_of(results, f"{PGD}, int8").under(by.evaluation, by.radius).robust.bound
    titles, rows = written_rows(results)
    cells = {(r[0], r[1]): r[titles.index("robust (all at once Linf, 8/255)")] for r in rows}
    assert [where for where, cell in cells.items() if cell.startswith("≤\u00a0")] == [(PGD, "fp32")]
    assert cells[PGD, "fp32"].endswith(" ↓")  # what is left is below the majority class
    assert "≤ an upper bound: something else that was tried leaves less." in legend(results)
    findings = {finding.topic: finding.text for finding in answer(results)}
    assert f"“{PGD}, fp32”: {robust.reason}." in findings["Upper bounds"]
    comparison = next(text for topic, text in findings.items() if "adversarial training" in topic)
    assert f"≤\u00a0{numbers.percent(robust.value)} against" in comparison
    assert "and the larger one is known to be too high." in comparison
    assert "so it is not robust" in comparison
    markup = html.unescape(report_html(results))
    assert f"≤\u00a0{numbers.percent(robust.value)}" in markup and robust.reason in markup
    assert f"Known to be too high at some radius: “{PGD}, fp32”." in markup
    assert "Upper bounds" not in {finding.topic for finding in answer(build())}
    export_csv(results, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        marked = [row for row in csv.DictReader(file) if row["status"] == "bound"]
    assert {(row["evaluation"], row["reason"]) for row in marked} == {("all at once Linf", WHY)}
    assert all(row["value"] for row in marked)
    export_latex(results, tmp_path / "t.tex")
    assert r"$\leq$" in (tmp_path / "t.tex").read_text(encoding="utf-8")
    export_json(results, tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    row = next(r for r in content["configurations"] if (r["configuration"], r["compression"]) == (PGD, "fp32"))
    assert (row["robust_bound_because"], row["robust_accuracy_known"]) == (robust.reason, robust.least)
    assert content["configurations"][0]["robust_bound_because"] == ""


def test_a_row_is_judged_by_the_least_that_is_known():
    results = build(WINNING)
    assert verdict_of(results).startswith("Yes, on these data")
    title = f"{BOTH}, int8"
    by = headline(configuration_rows(results))
    below = bounded(results, list(results.artefacts), "all at once Linf", WHY, known=0.1)
    assert verdict_of(below).startswith("No.")  # all are below a constant
    assert point(row_of(below, title), by).robust == 0.0
    above = bounded(results, list(results.artefacts), "all at once Linf", WHY, known=0.7)
    assert verdict_of(above).startswith("Perhaps: another attack leaves less, but")
    assert point(row_of(above, title), by).robust == pytest.approx(0.7)


def test_of_hospitals_that_trained_alone_each_is_judged_by_its_own():
    results = build()
    first = pick(results, "local only", "fp32")[0]
    marked = bounded(results, [first], "all at once Linf", WHY, known=0.0)
    robust = [row_of(r, "local only, fp32").under("all at once Linf", RADII[0]).robust for r in (results, marked)]
    (own,) = (
        m.value
        for e in results.evaluated
        if e.artefact_key == first.key and e.evaluation == "all at once Linf"
        for m in e.measurements
        if m.metric == "robust_accuracy" and m.radius == RADII[0]
    )
    assert robust[1].least == pytest.approx(robust[0].value - own / 6)  # one of two seeds, one of three hospitals


def test_where_the_smaller_side_is_too_high_the_difference_is_shown():
    results = build({PLAIN: MADE[PLAIN], PGD: MADE[PGD]})
    results = bounded(results, pick(results, PLAIN, "fp32"), "all at once Linf", WHY, known=0.0)
    text = next(finding.text for finding in answer(results) if "adversarial training" in finding.topic)
    assert "against ≤\u00a01.0\u00a0%" in text and "points more" in text


def test_all_at_once_takes_its_auroc_from_the_attack_of_its_norm_that_measured_it():
    row = row_of(build(), f"{PGD}, fp32")
    assert row.under("all at once Linf", RADII[1]).robust_auroc.value is None
    found = row.scored("all at once Linf", RADII[1])
    assert found.evaluation == "PGD-20 Linf"
    assert found.estimate == row.under("PGD-20 Linf", RADII[1]).robust_auroc
    assert found.estimate.value == pytest.approx(0.98 * 0.74, abs=0.01)
    assert row.scored("all at once L2", RADII[1]) == (Estimate(), "")
    assert row.scored("all at once Linf", 0.5) == (Estimate(), "")


def test_the_detail_table_holds_what_was_measured():
    results = build()
    row = row_of(results, f"{PGD}, fp32")
    section = re.search('<section id="robustness">(.*?)</section>', report_html(results), re.S).group(1)
    table = section.rpartition("<table")[2]
    lines = line_of(table, "")
    start = next(i for i, line in enumerate(lines) if f">{PGD}, fp32<" in line)
    assert 'rowspan="4"' in lines[start]
    at = row.under("all at once Linf", RADII[0])
    auroc = row.scored("all at once Linf", RADII[0]).estimate
    expected = [at.robust, at.among_correct, auroc, at.sensitivity, at.specificity]
    found = [float(value) for value in re.findall(r'<data value="([^"]+)"', lines[start + 1])]
    assert found == [*(each.value for each in expected), row.majority]
    clean = [row.metric(name).value for name in ("accuracy", "auroc", "sensitivity", "specificity")]
    assert [float(v) for v in re.findall(r'<data value="([^"]+)"', lines[start])] == [*clean, row.majority]
    assert "under “PGD-20 Linf”" in html.unescape(section)


def test_text_tables_say_withheld_and_explain_it(tmp_path):
    results = raised(build(), PGD, seeds=1)
    titles, rows = written_rows(results)
    column = titles.index("robust (all at once Linf, 8/255)")
    cells = {(row[0], row[1]): row[column] for row in rows}
    assert [where for where, cell in cells.items() if cell == "withheld"] == [(PGD, "int8")]
    said = "Withheld, for there are signs that the robustness is not there"
    assert f"{said}: “{PGD}, int8” (black box beats white box)." in legend(results)
    assert not any("Withheld" in line for line in legend(build()))
    console = Console(width=160, file=io.StringIO())
    with console.capture() as captured:
        console.print(answer_table(results, 160))
    assert "withheld" in captured.get()
    for export, name in ((export_latex, "t.tex"), (export_markdown, "t.md")):
        export(results, tmp_path / name)
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert " withheld " in text and "black box beats white box" in text


def test_exports_hold_no_withheld_number(tmp_path):
    results = raised(build(), PGD, seeds=1)
    export_csv(results, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    (key,) = {a.key for a in pick(results, PGD, "int8")[:1]}
    attacked = [row for row in rows if row["artefact"] == key and row["kind"] in STRENGTHS]
    assert attacked
    assert {(row["value"], row["low"], row["high"], row["status"]) for row in attacked} == {("", "", "", "withheld")}
    flags = [row for row in rows if row["artefact"] == key and row["evaluation"] == DIAGNOSTICS]
    assert {row["metric"]: row["value"] for row in flags}[f"flag_{FLAG}"] == "1.0"
    export_json(results, tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    table = {(row["configuration"], row["compression"]): row for row in content["configurations"]}
    row = table[PGD, "int8"]
    for name in ("robust_accuracy", "robust_accuracy_among_correct", "robust_auroc", "robust_sensitivity"):
        assert (row[name], row[f"{name}_low"], row[f"{name}_high"]) == (None, None, None)
        assert table[PGD, "fp32"][name] is not None
    assert row["flags"] == [f"black box beats white box (seed 0): {EVIDENCE}"]
    assert row["robust_withheld_because"] == f"1 of 2 trainings: {FLAG}: {EVIDENCE}"
    assert table[PGD, "fp32"]["robust_withheld_because"] == ""
    assert summary_rows(results)[0]["robust_auroc_evaluation"] == "PGD-20 Linf"


def test_hostile_evidence_stays_text():
    results = raised(build({PGD: MADE[PGD]}), PGD, evidence='<script>alert("1")</script>')
    text = report_html(results)
    assert '<script>alert("1")' not in text
    assert "&lt;script&gt;alert(&quot;1&quot;)" in text
