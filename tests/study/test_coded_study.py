"""A study of codecs from its file to its report: what was sent, and how long it takes."""

import json
import re
from dataclasses import replace

import pytest

from helpers.tiny_study import SMALLEST, plan_of, roots_below, run_plan, write_study
from trilemma.report.configurations import configuration_rows
from trilemma.report.export import export_json
from trilemma.report.html import report_html
from trilemma.report.summary import summary_rows
from trilemma.report.traffic import fewer, seconds, traffic_rows
from trilemma.study.assemble import assemble
from trilemma.study.store import Store

STUDY = """
base.rounds = 2
grid.codec = [
    { kind = "dense", numbers = "float32" },
    { kind = "top_k", share = 0.05, numbers = "int8" },
    { kind = "power_sgd", rank = 1 },
]
[[baselines]]
name = "in one place"
algorithm = { kind = "centralised" }
"""


def results_of(folder, text):
    plan = plan_of(write_study(folder, text))
    run_plan(plan, folder / "store", roots_below(folder))
    with Store(folder / "store") as store:
        return assemble(plan, store, text, "trilemma run coded.toml")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("coded"), SMALLEST.replace("base.rounds = 1\n", "") + STUDY)


def test_each_codec_has_its_bytes_and_its_seconds(results):
    rows = traffic_rows(configuration_rows(results))
    assert [row.configuration for row in rows] == ["float32", "top 5 % int8", "PowerSGD 1 float32"]
    plain, sparse, _ = rows
    ups = [fewer(row, row.traffic.up) for row in rows]
    assert 1 <= ups[0] < 1.5 and ups[1] > 20 and ups[2] > 3
    assert [fewer(row, row.traffic.down) for row in rows] == [1, 1, 1]
    runs = {run.configuration: run for run in results.runs}
    sent = [round_["bytes_up"] / 2 for round_ in runs["top 5 % int8"].history]
    assert sparse.traffic.up.mean.value == pytest.approx(sum(sent) / 2)
    most = [max(round_["bytes_up_by_client"].values()) for round_ in runs["top 5 % int8"].history]
    assert seconds(sparse.traffic.up, 1e9).value == pytest.approx(8e-9 * sum(most) / 2)
    assert seconds(sparse.traffic.down, 1e7).value == pytest.approx(8e-7 * plain.traffic.whole.value)
    assert sparse.traffic.up.largest.value == max(most) > sparse.traffic.up.mean.value
    history = runs["top 5 % int8"].history
    assert sparse.traffic.total.value == sum(round_["bytes_up"] + round_["bytes_down"] for round_ in history)


def test_the_report_shows_them(results):
    page = report_html(results)
    section = re.search('<section id="traffic".*?</section>', page, re.S).group(0)
    titles = ("times fewer", "largest", "in all", "up, 10 Mbit/s", "down, 1 Gbit/s")
    for title in (*titles, "top 5 % int8", "PowerSGD 1 float32"):
        assert title in section
    assert "in one place" not in section


def test_a_store_that_holds_only_sums_is_still_reported(results):
    """As versions wrote it that knew no hospital's own bytes: what was the same for all is the same still."""
    new = {"bytes_up_by_client", "bytes_down_by_client"}
    older = [
        replace(run, history=[{name: value for name, value in row.items() if name not in new} for row in run.history])
        for run in results.runs
    ]
    assert all(new <= set(row) for run in results.runs for row in run.history)
    old = replace(results, runs=tuple(older))
    for one, other in zip(*(traffic_rows(configuration_rows(each)) for each in (results, old)), strict=True):
        assert one.traffic.up.mean == other.traffic.up.mean and one.traffic.total == other.traffic.total
        assert one.traffic.down.mean == other.traffic.down.mean and one.traffic.whole == other.traffic.whole
        assert other.traffic.up.largest.value is None and other.traffic.up.slowest.value <= one.traffic.up.slowest.value
        assert seconds(other.traffic.down, 1e7) == seconds(one.traffic.down, 1e7)
    assert "recorded only the sum of all hospitals" in report_html(old)
    assert "recorded only the sum of all hospitals" not in report_html(results)


DOWN = """
base.rounds = 3
base.codec = { kind = "dense", numbers = "int8" }
grid.downlink = [{ kind = "dense", numbers = "int8" }, { kind = "top_k", share = 0.05, numbers = "int8" }]
[[baselines]]
name = "whole model down"
downlink = { kind = "dense", numbers = "float32" }
"""


def test_a_study_of_the_way_down_from_its_file_to_its_exports(tmp_path):
    text = SMALLEST.replace("base.rounds = 1\n", "") + DOWN
    found = results_of(tmp_path, text)
    rows = {row.configuration: row for row in traffic_rows(configuration_rows(found))}
    assert list(rows) == ["int8 down", "top 5 % int8 down", "whole model down"]
    history = next(run.history for run in found.runs if run.configuration == "top 5 % int8 down")
    whole, changes = history[0]["bytes_down"] / 2, [row["change_bytes"] for row in history]
    sparse = rows["top 5 % int8 down"].traffic
    assert sparse.down.largest.value == sparse.whole.value == whole
    assert sparse.down.mean.value == sparse.down.slowest.value == pytest.approx((whole + changes[0] + changes[1]) / 3)
    ratios = [fewer(row, row.traffic.down) for row in rows.values()]
    assert ratios[2] == 1 < 1.9 < ratios[0] < 2.4 < ratios[1] < 3  # of three rounds the first brings the model
    page = report_html(found)
    assert all(f'<td class="text">{label}</td>' in page for label in ("int8", "top 5 % int8", "float32"))
    exported = {row["configuration"]: row for row in summary_rows(found)}["top 5 % int8 down"]
    assert exported["bytes_down_by_client_largest"] == whole and exported["bytes_in_all"] == sparse.total.value
    export_json(found, tmp_path / "out.json")
    trainings = json.loads((tmp_path / "out.json").read_text("utf-8"))["trainings"]
    assert [each["history"] for each in trainings] == [run.history for run in found.runs]


def test_a_study_without_a_codec_says_nothing_of_the_network(tmp_path):
    assert 'id="traffic"' not in report_html(results_of(tmp_path, SMALLEST))
