"""A study of codecs from its file to its report: what was sent, and how long it takes."""

import re

import pytest

from helpers.tiny_study import SMALLEST, plan_of, roots_below, run_plan, write_study
from trilemma.report.configurations import configuration_rows
from trilemma.report.html import report_html
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
    plain, sparse, thin = rows
    assert 1 <= fewer(plain) < 1.5 and fewer(sparse) > 20 and fewer(thin) > 3
    runs = {run.configuration: run for run in results.runs}
    sent = [round_["bytes_up"] / 2 for round_ in runs["top 5 % int8"].history]
    assert sparse.sent_up.value == pytest.approx(sum(sent) / 2)
    assert seconds(sparse, 1e9) == pytest.approx(8e-9 * (sparse.sent_up.value + sparse.sent_down.value))


def test_the_report_shows_them(results):
    page = report_html(results)
    section = re.search('<section id="traffic".*?</section>', page, re.S).group(0)
    for title in ("times fewer", "10 Mbit/s", "1 Gbit/s", "top 5 % int8", "PowerSGD 1 float32"):
        assert title in section
    assert "in one place" not in section


def test_a_study_without_a_codec_says_nothing_of_the_network(tmp_path):
    assert 'id="traffic"' not in report_html(results_of(tmp_path, SMALLEST))
