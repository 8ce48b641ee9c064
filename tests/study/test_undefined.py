"""What a study asks for and cannot have: it is said, and nothing else is stored under its name."""

import io
import shutil
from dataclasses import replace

import pytest
from rich.console import Console

from helpers.tiny_study import TINY, plan_of, run_plan, write_study
from trilemma.attacks.evasion.specs import Pgd
from trilemma.evaluation.specs import AllAtOnce, Transfer
from trilemma.report.configurations import configuration_rows, headline
from trilemma.study.assemble import assemble
from trilemma.study.check import check_study
from trilemma.study.combine import combined_key, pair_keys, undefined_evaluations
from trilemma.study.keys import evaluation_key
from trilemma.study.store import Store

#: One training: nothing to transfer from but its own other artefact.
ALONE = 'grid.defence=[{kind="none"}]'
REASON = "no other training of this data and seed"


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_of(write_study(tmp_path_factory.mktemp("study"), TINY), ALONE)


@pytest.fixture(scope="module")
def stored(plan, roots, tmp_path_factory):
    """The folder of a store that holds the study, and what the user saw; do not write to it."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, run_plan(plan, folder, roots)


def specs_of(plan) -> tuple[Pgd, Transfer, AllAtOnce]:
    return plan.evaluations[1], plan.evaluations[2], plan.evaluations[3]


def test_nothing_stands_under_a_name_that_promises_more(plan, stored):
    pgd, transfer, together = specs_of(plan)
    folder, seen = stored
    with Store(folder) as store:
        keys = store.keys("evaluations")
    for cell in plan.cells:
        assert evaluation_key(cell.key, pgd) in keys and set(pair_keys(plan, cell, transfer)) <= keys
        assert not {combined_key(plan, cell, spec) for spec in (transfer, together)} & keys
    for spec in (transfer, together):
        assert seen.count(f"cannot be measured: {spec.label} of plain: ") == 1
    assert seen.count(REASON) == 2


def test_a_check_tells(plan, roots, tmp_path):
    shown = io.StringIO()
    check_study(plan, tmp_path, roots, Console(file=shown, width=200))
    pgd, transfer, together = specs_of(plan)
    title, *phrases = shown.getvalue().partition("Cannot be measured:")[1:]
    lines = [line for line in phrases[0].splitlines() if REASON in line]
    assert [line.strip().partition(" of plain: ")[0] for line in lines] == [transfer.label, together.label]
    assert pgd.label not in phrases[0].partition("No guarantee")[0].replace(transfer.label, "")
    assert f"│ {'evaluations':<11} │ {8:>9} │" in shown.getvalue()  # clean, PGD, cost and diagnostics of two artefacts


def test_a_report_has_the_reason_and_judges_by_what_there_is(plan, stored):
    pgd, transfer, together = specs_of(plan)
    with Store(stored[0]) as store:
        results = assemble(plan, store, "", "")
    assert not results.missing
    for spec in (transfer, together):
        of_all = [m for e in results.evaluated if e.evaluation == spec.label for m in e.measurements if not m.source]
        assert [m.radius for m in of_all] == list(spec.radii) * 2
        assert all(m.value is None and m.status == "undefined" and REASON in m.reason for m in of_all)
    assert any(m.source for e in results.evaluated if e.kind == "transfer" for m in e.measurements)
    rows = configuration_rows(results)
    assert headline(rows).evaluation == pgd.label
    assert all(REASON in row.under(together.label, together.radii[0]).robust.reason for row in rows)


def test_what_an_older_version_stored_under_the_name_is_not_shown(plan, stored, tmp_path):
    pgd, _, together = specs_of(plan)
    folder, cell = shutil.copytree(stored[0], tmp_path / "store"), plan.cells[0]
    with Store(folder, write=True) as store:
        row = store.evaluation(evaluation_key(cell.key, pgd))
        store.add_evaluations([replace(row, key=combined_key(plan, cell, together), examples=())])
        results = assemble(plan, store, "", "")
    found = [m for e in results.evaluated if e.evaluation == together.label for m in e.measurements]
    assert found and all(m.value is None for m in found)


def test_with_another_training_all_of_it_is_defined(tiny_plan):
    assert undefined_evaluations(tiny_plan) == []
