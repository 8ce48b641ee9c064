import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from builder import BOTH, CONSTANT, DP, MADE, PLAIN, build

from trilemma.errors import Failure
from trilemma.report.configurations import configuration_rows, headline
from trilemma.report.html import report_html, write_report
from trilemma.report.markup import render, tag
from trilemma.report.pareto import pareto_rows

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&\'"\x00\x1b[31m${7*7}%{x}'
EMPTY = {"meta", "img", "br", "hr", "col", "link", "input"}


class Page(HTMLParser):
    """Checks that elements nest, and keeps what the tests ask for."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text, self.scripts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, name, attributes):
        assert len({key for key, _ in attributes}) == len(attributes), f"an attribute twice in {name}"
        self.elements.append((name, dict(attributes)))
        if name == "script":
            self.scripts.append("")
        if name not in EMPTY:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open, f"</{name}> closes nothing"
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    def of(self, name):
        return [attributes for its_name, attributes in self.elements if its_name == name]


@pytest.fixture(scope="module")
def text():
    return report_html(build(synthetic=True))


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_sections_stand_in_reading_order(page):
    assert [a["id"] for a in page.of("section")] == [
        "answer", "configurations", "robustness", "diagnostics", "poisoning", "transfer", "cost", "training", "clients",
        "examples", "guarantees", "data", "reproduce", "missing",
    ]  # fmt: skip
    assert len(page.of("h1")) == 1
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False)), "a level is skipped"


def test_transfer_between_files_of_one_training_carries_a_dagger(text):
    section = re.search('<section id="transfer">(.*?)</section>', text, re.S).group(1)
    cells = re.findall("<td[^>]*>(.*?)</td>", section, re.S)
    daggers = [cell for cell in cells if "†" in cell]
    assert 0 < len(daggers) < len(cells)
    assert all("<em>" in cell for cell in daggers)
    assert "worst over sources" in section


def test_nothing_is_fetched(text, page):
    for name, attributes in page.elements:
        for key, value in attributes.items():
            if key in {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}:
                assert value.startswith("data:image/png;base64,") if name != "a" else value.startswith("#")
    assert not page.of("link")
    style = re.search("<style>(.*?)</style>", text, re.S).group(1)
    assert "url(" not in style
    assert "@import" not in style


def test_the_content_policy_admits_only_the_two_scripts(page):
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    run = [s for s, a in zip(page.scripts, page.of("script"), strict=True) if a.get("type") != "application/json"]
    assert len(run) == 2
    for script in run:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_ids_are_unique_and_every_link_leads_somewhere(page):
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.of("a")} <= set(ids)


def test_it_can_be_read_without_eyes_and_without_scripts(page):
    assert page.of("html")[0]["lang"] == "en"
    assert all(a.get("alt") for a in page.of("img"))
    assert len(page.of("caption")) == len(page.of("table"))
    assert all(a.get("scope") for a in page.of("th"))
    assert all(a.get("aria-label") for a in page.of("div") if a.get("class") == "plot")
    assert len(page.of("noscript")) == len([a for a in page.of("script") if "data-figure" in a])


def test_figures_hold_valid_json_for_a_place_on_the_page(page):
    places = {a["id"] for a in page.of("div") if a.get("class") == "plot"}
    for script, attributes in zip(page.scripts, page.of("script"), strict=True):
        if attributes.get("type") == "application/json":
            assert attributes["data-figure"] in places
            figure = json.loads(script)
            assert figure["data"]
            places.remove(attributes["data-figure"])
    assert not places


def test_the_majority_class_is_drawn_dashed(page):
    figures = [json.loads(s) for s, a in zip(page.scripts, page.of("script"), strict=True) if "data-figure" in a]
    dashed = [trace for trace in figures[0]["data"] if "most frequent answer" in trace["name"]]
    assert [trace["line"]["dash"] for trace in dashed] == ["dash"]
    assert set(dashed[0]["y"]) == {0.625}


def test_every_number_of_the_main_table_is_the_results(text):
    results = build(synthetic=True)
    rows = configuration_rows(results)
    by = headline(rows)
    table = re.search('<table id="configurations-table">(.*?)</table>', text, re.S).group(1)
    written = re.findall("<tr[^>]*>(.*?)</tr>", table.split("<tbody>")[1], re.S)
    assert len(written) == len(rows)
    for row, best, cells in zip(rows, pareto_rows(rows, by), written, strict=True):
        expected = [
            row.metric("auroc").value,
            row.metric("accuracy").value,
            row.client("worst", "accuracy").value,
            row.epsilon,
            row.under(by.evaluation, by.radius).robust.value,
            row.file_bytes.value,
            row.latency_1.value,
            row.bytes_per_round.value,
            row.training_seconds.value,
        ]
        found = [float(value) for value in re.findall(r'<data value="([^"]+)"', cells)]
        assert found == [value for value in expected if value is not None]
        assert ("no guarantee" in cells) == (row.epsilon is None)
        assert ("Pareto-optimal" in cells) == best


def test_the_main_table_says_what_epsilon_is_about(text):
    def caption(text):
        return re.search('<table id="configurations-table"><caption>(.*?)</caption>', text, re.S).group(1)

    assert "ε is for any one image, δ\u00a00.0001, local noise (seeded), the largest over" in caption(text)
    patient = {label: replace(MADE[label], unit="patient") for label in (PLAIN, DP)}
    text = report_html(build(patient))
    assert "ε is for any one patient" in caption(text)
    assert "any one image" not in text
    text = report_html(build({DP: MADE[DP], BOTH: replace(MADE[BOTH], unit="patient")}))
    assert "compared only where unit, δ and noise are the same" in caption(text)
    for words in ("any one image", "any one patient"):
        assert text.count(f'<span class="range">{words}, δ\u00a00.0001, local noise (seeded)</span>') == 2
    assert "ε" not in caption(report_html(build({PLAIN: MADE[PLAIN]}))).replace("usefulness, ε, robustness", "")


def test_missing_is_shown_as_missing_with_its_reason():
    results = build()
    evaluated = tuple(e for e in results.evaluated if e.kind not in ("cost", "all_at_once", "pgd"))
    text = report_html(replace(results, evaluated=evaluated))
    assert "–<sup>" in text
    assert "not measured</li>" in text
    assert "<li>label flip, seed 1, int8: PGD-20 Linf</li>" in text
    assert ">0 ms<" not in text


def test_constants_and_synthetic_images_are_labelled(text):
    assert "answers “pneumonia” for everything" in text
    assert text.count("synthetic image</span>") == 3
    assert "synthetic image</span>" not in report_html(build())


def hostile(results):
    name = HOSTILE
    facts = replace(results.data[0], name=name, source=name, classes=(name, "b"), positive_class=name, warnings=(name,))
    runs = tuple(replace(run, configuration=name, provenance={name: name}) for run in results.runs)
    artefacts = tuple(replace(a, compression=name, guarantee=a.guarantee.voided(name)) for a in results.artefacts)
    evaluated = tuple(replace(e, evaluation=name) for e in results.evaluated)
    examples = tuple(replace(e, title=name, truth=name, clean_prediction=(name, 1.0)) for e in results.examples)
    return replace(
        results, name=name, question=name, study_toml=name, command=name, data=(facts,), runs=runs, artefacts=artefacts,
        evaluated=evaluated, examples=examples, missing=(name,), environment={name: name},
    )  # fmt: skip


def test_hostile_names_stay_text():
    text = report_html(hostile(build({PLAIN: MADE[PLAIN], CONSTANT: MADE[CONSTANT]})))
    page = Page(text)
    assert len([a for a in page.of("script") if a.get("type") != "application/json"]) == 2
    assert all(a["src"].startswith("data:image/png") for a in page.of("img"))
    assert not any(key.startswith("on") for _, a in page.elements for key in a)
    assert "\x00" not in text
    assert "\x1b" not in text
    assert "</script><script>alert(1)" in "".join(page.text), "it is shown as it is written"
    for script, attributes in zip(page.scripts, page.of("script"), strict=True):
        if "data-figure" in attributes:
            names = [trace.get("name", "") for trace in json.loads(script)["data"]]
            assert not any("<" in name for name in names), "plotly reads a little markup of its own"


def test_equal_results_give_equal_bytes(text):
    assert text == report_html(build(synthetic=True))


def test_an_empty_study_has_a_report_too():
    page = Page(report_html(build(runs=(), artefacts=(), evaluated=(), examples=(), data=())))
    assert "Nothing has been measured." in page.text


def test_writing_is_whole_or_not_at_all(tmp_path, text):
    path = tmp_path / "new" / "report.html"
    write_report(build(synthetic=True), path)
    assert path.read_text(encoding="utf-8") == text
    assert list(path.parent.iterdir()) == [path]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(Failure, match="could not be written"):
        write_report(build({PLAIN: MADE[PLAIN]}), blocked / "report.html")
    path.unlink()
    path.mkdir()
    with pytest.raises(Failure, match="could not be written"):
        write_report(build({PLAIN: MADE[PLAIN]}), path)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"], "no half-written file stays"


def test_markup_escapes_what_is_not_markup():
    assert tag("p", "<b>", tag("i", "&"), title='"') == '<p title="&quot;">&lt;b&gt;<i>&amp;</i></p>'
    assert tag("img", alt="x") == '<img alt="x">'
    assert render(["a", None, ["<"]]) == "a&lt;"


def cost_table(text):
    return re.search("<caption>The exported file, the multiply-adds(.*?)</table>", text, re.S).group(1)


def test_multiply_adds_stand_beside_size_and_latency_or_are_missing():
    results = build()
    table = cost_table(report_html(results))
    assert "multiply-adds</th>" in table
    assert table.count('<data value="4321000.0">4.32\u00a0million</data>') == len(configuration_rows(results))
    older = tuple(
        replace(e, measurements=tuple(m for m in e.measurements if m.metric != "multiply_adds"))
        for e in results.evaluated
    )
    table = cost_table(report_html(replace(results, evaluated=older)))
    assert table.count('title="not measured">–<sup>') == len(configuration_rows(results))
