"""A study of poisoned hospitals from its file to its report: rules, threats, backdoors on every artefact, what was left
out."""

import json
from dataclasses import replace

import pytest

from helpers.tiny_study import plan_of, roots_below, run_plan, write_study
from trilemma.errors import UserError
from trilemma.report.configurations import configuration_rows, headline
from trilemma.report.export import export_json, export_markdown
from trilemma.report.html import report_html
from trilemma.report.poisoning import WITHSTOOD, _withstood
from trilemma.study.assemble import assemble
from trilemma.study.store import Store

STUDY = """
name = "poisoned"
question = "What do liars do?"
base.data = { kind = "phantom", size = 16, train = 90, val = 30, test = 40, classes = 2 }
base.partition = { kind = "iid", num_clients = 3 }
base.model = { kind = "resnet9", width = 4, norm = "batch" }
base.local = { batch_size = 8, steps = 2 }
base.rounds = 2
grid.aggregation = [{ kind = "mean" }, { kind = "median" }]
grid.threat = [
    { kind = "none" },
    { kind = "backdoor", num_malicious = 1, target = 1 },
    { kind = "malformed", flaw = "nan", num_malicious = 1 },
]
[[baselines]]
name = "trusted"
aggregation = { kind = "fltrust", num_images = 20 }
threat = { kind = "malformed", flaw = "nan", num_malicious = 1 }
[[compressions]]
kind = "none"
[[compressions]]
kind = "int8"
num_calibration = 16
[[evaluations]]
kind = "clean"
[[evaluations]]
kind = "backdoor"
target = 1
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("poisoned")
    plan = plan_of(write_study(folder, STUDY))
    store_folder = folder / "store"
    run_plan(plan, store_folder, roots_below(folder))
    with Store(store_folder) as store:
        yield plan, assemble(plan, store, STUDY, "trilemma run poisoned.toml")


def test_every_artefact_is_looked_into_for_the_backdoor(study):
    plan, results = study
    found = [e for e in results.evaluated if e.kind == "backdoor"]
    assert {e.artefact_key for e in found} == {cell.key for cell in plan.cells} and len(plan.cells) == 14
    for evaluated in found:
        by_metric = {m.metric: m for m in evaluated.measurements}
        assert by_metric.keys() == {"attack_success_rate", "trigger_effect", "triggered_accuracy"}
        success = by_metric["attack_success_rate"]
        assert success.n == 20 or 0 < success.n < 40
        assert success.value is not None and success.low <= success.value <= success.high
    assert {e.evaluation for e in found} == {"backdoor by 3-pixel patch to class 1"}


def test_the_trigger_is_drawn(study):
    _, results = study
    drawn = [example for example in results.examples if example.title.startswith("backdoor by")]
    assert drawn and all(example.clean_png != example.adversarial_png for example in drawn)


def test_the_report_sets_threats_against_rules_and_names_what_was_left_out(study):
    _, results = study
    page = report_html(results)
    section = page.partition('<section id="poisoning">')[2].partition("</section>")[0]
    for text in ("threat ↓  rule →", "median", "malformed (nan) by 1 client", "attack success", "int8"):
        assert text in section, text
    assert WITHSTOOD == 0.02
    answer = page.partition('<section id="answer">')[2].partition("</section>")[0]
    assert "client 3’s update holds numbers that are not finite in 2 of 2 rounds and was left out" in answer
    assert "What does the threat do?" in answer and "succeeds on" in answer


def test_a_malformed_client_is_the_same_as_none_of_it_under_the_mean(study):
    _, results = study
    left_out = {run.configuration: [row.get("left_out") for row in run.history] for run in results.runs}
    assert left_out["mean, malformed (nan) by 1 client"] == [{"client 3": "holds numbers that are not finite"}] * 2
    assert left_out["mean"] == [None, None]
    assert {run.labels["aggregation"] for run in results.runs} == {"mean", "median", "FLTrust 20 validation images"}


def test_nothing_is_said_to_be_withstood_without_a_baseline_or_while_a_backdoor_works(study):
    _, results = study
    rows = configuration_rows(results)
    by = headline(rows)
    clean = next(row for row in rows if row.configuration == "mean" and row.compression == "fp32")
    planted = next(row for row in rows if "backdoor" in row.configuration and row.compression == "fp32")
    (name,) = planted.triggered
    assert _withstood(clean, rows, by) and not _withstood(clean, [clean], by._replace(utility="nothing"))
    assert not _withstood(planted, [row for row in rows if row.kind("threat") != "none"], by)

    def with_rate(value):
        rate = replace(planted.backdoor(name, "attack_success_rate"), value=value)
        useful = {**planted.clean, by.utility: clean.metric(by.utility)}
        return replace(planted, clean=useful, triggered={name: {"attack_success_rate": rate}})

    others = [row for row in rows if row.configuration != planted.configuration]
    assert _withstood(with_rate(0.1), others, by)
    assert not _withstood(with_rate(0.9), others, by)
    assert not _withstood(replace(with_rate(0.1), triggered={}), others, by)
    for in_int8, withstood in ((0.1, True), (0.97, False)):
        smaller = replace(with_rate(in_int8), compression="int8")
        assert _withstood(with_rate(0.1), [*others, smaller], by) == withstood


def test_the_worst_honest_hospital_stands_beside_the_worst(study):
    _, results = study
    poisoned = {run.key for run in results.runs if run.spec["threat"]["kind"] != "none"}
    keys = {artefact.key for artefact in results.artefacts if artefact.run_key in poisoned}
    for evaluated in (e for e in results.evaluated if e.kind == "clean"):
        names = {m.client for m in evaluated.measurements}
        assert ("worst honest" in names) == (evaluated.artefact_key in keys)
        each = {m.client: m.value for m in evaluated.measurements if m.metric == "accuracy" and m.client}
        if "worst honest" in names:
            assert each["worst honest"] == min(each["client 1"], each["client 2"]) >= each["worst"]


def test_exports_hold_what_the_trigger_does_and_what_every_rule_keeps(study, tmp_path):
    _, results = study
    export_json(results, tmp_path / "poisoned.json")
    metrics = {m["metric"] for m in json.loads((tmp_path / "poisoned.json").read_text())["measurements"]}
    assert {"attack_success_rate", "trigger_effect", "triggered_accuracy"} <= metrics
    export_markdown(results, tmp_path / "poisoned.md")
    lines = (tmp_path / "poisoned.md").read_text().splitlines()
    assert lines[0] == "| threat | mean | median | FLTrust 20 validation images |"
    assert [line.split(" | ")[0] for line in lines[2:5]] == [
        "| none", "| backdoor by 3-pixel patch to class 1 50 % by 1 client", "| malformed (nan) by 1 client",
    ]  # fmt: skip
    assert lines[2].count("–") == 1 and lines[2].split(" | ")[1].endswith("✓")  # which it is measured against
    assert any("attack success (backdoor by 3-pixel patch to class 1)" in line for line in lines)


def test_a_backdoor_that_cannot_be_looked_for_is_refused_before_anything_runs(tmp_path):
    for change, said in (("target = 1", "target = 7"), ("target = 1", 'trigger = { kind = "patch", size = 40 }')):
        text = STUDY.rpartition(change)[0] + said + "\n"
        plan = plan_of(write_study(tmp_path, text))
        with pytest.raises(UserError, match="class|fit"):
            run_plan(plan, tmp_path / "store", roots_below(tmp_path))
