"""Robustness is looked at before it is reported: with the study's own evidence, for each artefact and budget."""

import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from helpers.tiny_study import SMALLEST, plan_of, run_plan, write_study
from trilemma.attacks.budget import Budget
from trilemma.errors import Failure
from trilemma.evaluation.diagnostics import Tried
from trilemma.evaluation.measurement import Measurement
from trilemma.evaluation.specs import Diagnostics, Transfer
from trilemma.report.configurations import configuration_rows
from trilemma.study import engine
from trilemma.study.assemble import assemble
from trilemma.study.combine import diagnostics_key, evidence_keys, key_of, pair_keys
from trilemma.study.diagnose_job import diagnose_job
from trilemma.study.judgement import NOT_DIAGNOSED
from trilemma.study.keys import evaluation_key
from trilemma.study.rows import EvaluationRow
from trilemma.study.store import Store
from trilemma.study.workplace import Workplace

#: Attacks in both norms, of which some are evidence at the diagnosed radius and some are not.
STUDY = f"""{SMALLEST}
[grid]
defence = [{{ kind = "none" }}, {{ kind = "fgsm", radius = "4/255" }}]
[[evaluations]]
kind = "clean"
[[evaluations]]
kind = "pgd"
radii = ["4/255", "8/255"]
steps = 2
loss = "margin"
[[evaluations]]
kind = "fgsm"
radius = "4/255"
[[evaluations]]
kind = "square"
radius = "8/255"
queries = 10
[[evaluations]]
kind = "transfer"
attack = {{ kind = "mifgsm", radii = ["4/255", "8/255"], steps = 2 }}
[[evaluations]]
kind = "all_at_once"
attacks = [
    {{ kind = "pgd", radii = ["4/255", "8/255"], steps = 2, loss = "margin" }},
    {{ kind = "transfer", attack = {{ kind = "mifgsm", radii = ["4/255", "8/255"], steps = 2 }} }},
]
[[evaluations]]
kind = "pgd"
norm = "l2"
radius = 0.5
steps = 2
[[evaluations]]
kind = "cost"
repeats = 5
"""
FLAG = "flag_zero_gradient"
EVIDENCE = "on 12 of 12 images the gradient is zero"


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_of(write_study(tmp_path_factory.mktemp("study"), STUDY))


@pytest.fixture(scope="module")
def undiagnosed(plan, roots, tmp_path_factory):
    """The folder of a store that holds all but the diagnostics; do not write to it."""
    folder = tmp_path_factory.mktemp("undiagnosed")
    run_plan(replace(plan, evaluations=tuple(s for s in plan.evaluations if s not in specs_of(plan))), folder, roots)
    return folder


@pytest.fixture
def folder(undiagnosed, tmp_path):
    return shutil.copytree(undiagnosed, tmp_path / "store")


def specs_of(plan) -> list[Diagnostics]:
    return [spec for spec in plan.evaluations if isinstance(spec, Diagnostics)]


def planted(plan, cell, spec, *raised: str) -> EvaluationRow:
    """A diagnosis that raised some flags and did not raise another."""
    flags = [Measurement(name, 1.0, n=12, unit="count", reason=EVIDENCE, radius=spec.radius) for name in raised]
    calm = Measurement("flag_constant", 0.0, n=12, unit="count", reason="3 have another answer", radius=spec.radius)
    fields = {**spec.model_dump(mode="json"), "label": spec.label}
    return EvaluationRow(diagnostics_key(plan, cell, spec), cell.key, fields, {}, 0.1, (*flags, calm))


def attacked(results, cell, budget: Budget) -> list[Measurement]:
    """Everything that attacks within a budget measured of an artefact."""
    kinds = {"pgd", "fgsm", "square", "transfer", "all_at_once"}
    mine = [e for e in results.evaluated if e.artefact_key == cell.key and e.kind in kinds]
    in_norm = [m for e in mine if ("L2" in e.evaluation) == (budget.norm == "l2") for m in e.measurements]
    found = [m for m in in_norm if m.radius == budget.radius]
    assert {m.metric for m in found} >= {"robust_accuracy", "attack_success_rate", "sensitivity", "above_majority"}
    return found


def others(results) -> list[Measurement]:
    return [m for e in results.evaluated if e.kind in ("clean", "cost") for m in e.measurements]


def stored(store, plan, cell, budget: Budget) -> list[Measurement]:
    """The same, as it lies in the store."""
    found = []
    for spec in plan.evaluations:
        if getattr(spec, "norm", "") == budget.norm and not isinstance(spec, Diagnostics):
            keys = [key_of(plan, cell, spec), *(pair_keys(plan, cell, spec) if isinstance(spec, Transfer) else [])]
            found += [m for key in keys for m in store.evaluation(key).measurements if m.radius == budget.radius]
    return found


def _unmarked(found: list[Measurement]) -> list[Measurement]:
    """Numbers of which something else shows that they are too high, without that remark."""
    return [
        m._replace(status="ok", reason="") if m.status == "bound" else m
        for m in found
        if m.metric != "robust_accuracy_known"
    ]


NOTHING = {"value": None, "low": None, "high": None, "status": "", "reason": ""}


def test_a_flag_withholds_every_number_of_its_norm_or_its_radius_and_no_other(plan, folder):
    low, high, l2 = specs_of(plan)
    first, second = plan.cells
    assert [spec.budget for spec in (low, high, l2)] == [
        Budget("linf", 4 / 255), Budget("linf", 8 / 255), Budget("l2", 0.5),
    ]  # fmt: skip
    raised = {(first.key, high): ("flag_not_converged",), (second.key, low): (FLAG, "flag_randomised")}
    rows = [planted(plan, c, spec, *raised.get((c.key, spec), ())) for c in plan.cells for spec in (low, high, l2)]
    both = f"zero_gradient: {EVIDENCE}; randomised: {EVIDENCE}"
    reasons = {
        (first.key, high): f"not_converged: {EVIDENCE}",  # which speaks of one radius
        (second.key, low): both,
        (second.key, high): f"within another radius of this norm {both}",
    }
    with Store(folder, write=True) as store:
        store.add_evaluations(rows)
        results = assemble(plan, store, "", "")
        for cell in plan.cells:
            for spec in (low, high, l2):
                shown_all, known = attacked(results, cell, spec.budget), stored(store, plan, cell, spec.budget)
                assert any(m.value is not None for m in known)
                if (cell.key, spec) not in reasons:
                    assert _unmarked(shown_all) == known
                    continue
                shown_all = [m for m in shown_all if m.metric != "robust_accuracy_known"]
                for shown, was in zip(shown_all, known, strict=True):
                    assert shown._replace(**NOTHING) == was._replace(**NOTHING)
                    if was.value is None:  # what does not exist is not withheld
                        assert shown == was
                        continue
                    assert (shown.value, shown.low, shown.high, shown.status) == (None, None, None, "withheld")
                    assert shown.reason == reasons[cell.key, spec]
    assert not results.missing and all(m.status == "ok" for m in others(results) if m.value is not None)
    withheld = [m for m in attacked(results, first, high.budget) if m.status == "withheld"]
    assert {m.metric for m in withheld} >= {"robust_auroc", "robust_accuracy"}
    assert any(m.source for m in withheld)  # each transfer and the worst of them alike
    for row in configuration_rows(results):
        assert any(a.robust.withheld for a in row.attacked) and not all(a.robust.withheld for a in row.attacked)


def test_without_diagnostics_everything_is_withheld_and_they_are_missing(plan, folder):
    specs = specs_of(plan)
    first, second = plan.cells
    with Store(folder, write=True) as store:
        results = assemble(plan, store, "", "")
        assert sorted(results.missing) == sorted(
            f"{spec.label} of {cell.training.configuration}, seed 0, fp32" for cell in plan.cells for spec in specs
        )
        for cell in plan.cells:
            for spec in specs:
                known = [m for m in attacked(results, cell, spec.budget) if m.status != "undefined"]
                assert {(m.value, m.status, m.reason) for m in known} == {(None, "withheld", NOT_DIAGNOSED)}
        assert others(results) and all(m.status == "ok" for m in others(results) if m.value is not None)
        # Made for one artefact and budget, they speak of that one.
        store.add_evaluations([planted(plan, first, specs[1])])
        results = assemble(plan, store, "", "")
    for cell in (first, second):
        for spec in specs:
            doubted = any(m.reason == NOT_DIAGNOSED for m in attacked(results, cell, spec.budget))
            assert doubted == ((cell, spec) != (first, specs[1]))


def test_a_diagnosis_of_other_evidence_does_not_count(plan, folder, tmp_path):
    """It was made before the study got another attack within that budget, which might tell more."""
    _, high, _ = specs_of(plan)
    cell = plan.cells[0]
    more = plan_of(
        write_study(tmp_path, STUDY + '[[evaluations]]\nkind = "fgsm"\nrandom_start = true\nradius = "8/255"\n')
    )
    with Store(folder, write=True) as store:
        store.add_evaluations([planted(plan, cell, high)])
        before, after = (assemble(p, store, "", "") for p in (plan, more))
    assert not [m for m in attacked(before, cell, high.budget) if m.status == "withheld"]
    assert {m.reason for m in attacked(after, cell, high.budget) if m.status == "withheld"} == {NOT_DIAGNOSED}


def test_a_diagnosis_has_the_studys_own_evidence(plan, folder, roots, monkeypatch):
    """The answers under each attack with gradients within the budget, and those under all others within it."""
    seen = {}

    def watched(place, cell, spec, key, tried):
        seen[cell.key, spec] = tried
        return planted(plan, cell, spec)

    monkeypatch.setattr(engine, "diagnose_job", watched)
    assert "diagnosing: 6 jobs" in run_plan(plan, folder, roots)
    low, high, l2 = specs_of(plan)
    _, pgd, fgsm, square, transfer, _, pgd_l2, *_ = plan.evaluations
    assert [spec.kind for spec in (pgd, fgsm, square, transfer, pgd_l2)] == ["pgd", "fgsm", "square", "transfer", "pgd"]
    with Store(folder) as store:

        def at(key, spec):
            (logits_NK,) = (o.logits_NK for o in store.outcomes(key) if o.radius == spec.radius)
            return logits_NK

        for cell, other in (plan.cells, plan.cells[::-1]):
            own = {spec: evaluation_key(cell.key, spec) for spec in (pgd, fgsm, square, pgd_l2)}
            from_other = evaluation_key(cell.key, transfer, (other.key,))
            expected = {
                low: ([own[pgd], own[fgsm]], [from_other]),
                high: ([own[pgd]], [own[square], from_other]),
                l2: ([own[pgd_l2]], []),
            }
            for spec, keys in expected.items():
                for found, wanted in zip(seen[cell.key, spec], keys, strict=True):
                    assert list(found) == wanted
                    assert all(np.array_equal(logits_NK, at(key, spec)) for key, logits_NK in found.items())
            assert not np.array_equal(at(own[pgd], low), at(own[pgd], high))  # so that a mix-up shows
            assert not np.array_equal(at(own[square], high), at(from_other, high))
    seen.clear()
    assert run_plan(plan, folder, roots) == "" and not seen  # they are stored under the key that is looked for


@pytest.mark.parametrize("lost", ["transfer", "square"])
def test_a_diagnosis_waits_for_its_evidence(plan, folder, roots, monkeypatch, lost):
    """An attack that failed is no attack that found nothing."""
    low, high, l2 = specs_of(plan)
    first, second = plan.cells
    made = []

    def watched(place, cell, spec, key, tried):
        made.append((cell.key, spec))
        return planted(plan, cell, spec)

    def fails(*_):
        raise Failure("the machine", "lost its power", "Wait")

    black, from_other = evidence_keys(plan, first, high)[1]
    with closing(sqlite3.connect(folder / "store.db")) as db, db:
        key = from_other if lost == "transfer" else black
        for table in ("measurements", "outcomes", "examples"):
            db.execute(f"DELETE FROM {table} WHERE evaluation_key = ?", (key,))
        assert db.execute("DELETE FROM evaluations WHERE key = ?", (key,)).rowcount == 1
    monkeypatch.setattr(engine, "diagnose_job", watched)
    with monkeypatch.context() as patched:
        patched.setattr(engine, "attack_job", fails)
        with pytest.raises(Failure, match="lost its power"):
            run_plan(plan, folder, roots)
    waiting = {(first.key, spec) for spec in ((low, high) if lost == "transfer" else (high,))}
    assert set(made) == {(cell.key, spec) for cell in (first, second) for spec in (low, high, l2)} - waiting
    before = len(made)
    run_plan(plan, folder, roots)
    assert set(made[before:]) == waiting


@pytest.fixture
def place(undiagnosed, roots):
    return Workplace(undiagnosed, roots, "cpu", 1, os.getpid())


def test_a_diagnosis_in_earnest_counts_what_the_study_has_tried(plan, place, roots):
    """All flags of an artefact, on its test images; planted logits break what the model's own gradients do not."""
    low, _, _ = specs_of(plan)
    cell = plan.cells[0]
    small = low.model_copy(update={"radius": 1e-6})  # within which nothing else breaks anything
    labels_N = plan.trainings[0].spec.data.load(roots).test.labels_N
    right_NK = np.eye(2, dtype=np.float32)[labels_N]
    wrong_NK = 1 - right_NK

    def flags(white, elsewhere):
        """With the same under each attack that is named."""
        row = diagnose_job(place, cell, small, "key", Tried(white, elsewhere))
        assert (row.key, row.artefact_key, row.spec["label"]) == ("key", cell.key, small.label) and not row.outcomes
        flags, bound, each = row.measurements[:10], row.measurements[10], row.measurements[11:]
        assert all(m.reason and m.value in (0.0, 1.0) and m.radius == small.radius for m in flags)
        assert all(0 < m.n <= 12 for m in row.measurements)
        both = {**white, **elsewhere}
        wrong = {name for name, logits_NK in both.items() if (logits_NK == wrong_NK).all()}
        clean = place.twin(cell)(plan.trainings[0].spec.data.load(roots).test.x()).argmax(1).numpy() == labels_N
        assert bound.metric == "robust_accuracy_bound"
        assert bound.value == pytest.approx(0.0 if wrong else clean.mean())
        assert {m.source: m.value for m in each} == pytest.approx(
            {name: 0.0 if name in wrong else clean.mean() for name in both}
        )
        return {m.metric: m.value for m in flags}

    black_box, converged = "flag_black_box_beats_white_box", "flag_not_converged"
    alone = flags({"a": right_NK}, {"b": right_NK})
    assert len(alone) == 10 and all(metric.startswith("flag_") for metric in alone)
    assert alone[black_box] == alone[converged] == 0
    assert flags({"a": right_NK}, {"b": right_NK, "c": wrong_NK}) == {**alone, black_box: 1}
    # What the study's white box broke too is no black box's merit; but the diagnostics' own has missed it.
    assert flags({"a": wrong_NK}, {"b": wrong_NK}) == {**alone, converged: 1}


def test_what_is_diagnosed_is_listed_like_any_other_evaluation(plan, folder):
    specs = specs_of(plan)
    with Store(folder, write=True) as store:
        store.add_evaluations([planted(plan, cell, spec) for cell in plan.cells for spec in specs])
        results = assemble(plan, store, "", "")
    shown = [e for e in results.evaluated if e.kind == "diagnostics"]
    assert [e.evaluation for e in shown] == [spec.label for spec in specs] * 2
    assert all(m.metric == "flag_constant" and m.value == 0 for e in shown for m in e.measurements)
