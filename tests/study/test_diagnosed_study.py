"""Robustness is looked at before it is reported: with the study's own evidence, for each artefact and norm."""

import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from helpers.tiny_study import SMALLEST, plan_of, run_plan, write_study
from trilemma.errors import Failure
from trilemma.evaluation.measurement import Measurement
from trilemma.evaluation.specs import AllAtOnce, Clean, Diagnostics, Transfer
from trilemma.report.configurations import configuration_rows
from trilemma.study import diagnose_job as diagnosing
from trilemma.study import engine
from trilemma.study.assemble import NOT_DIAGNOSED, assemble
from trilemma.study.combine import diagnostics_key, evidence_keys, key_of, pair_keys
from trilemma.study.diagnose_job import Tried, diagnose_job
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


def attacked(results, cell, norm: str) -> list[Measurement]:
    """Everything that attacks in a norm measured of an artefact."""
    kinds = {"pgd", "fgsm", "square", "transfer", "all_at_once"}
    mine = [e for e in results.evaluated if e.artefact_key == cell.key and e.kind in kinds]
    found = [m for e in mine if ("L2" in e.evaluation) == (norm == "l2") for m in e.measurements]
    assert {m.metric for m in found} >= {"robust_accuracy", "attack_success_rate", "sensitivity", "above_majority"}
    return found


def others(results) -> list[Measurement]:
    return [m for e in results.evaluated if e.kind in ("clean", "cost") for m in e.measurements]


def stored(store, plan, cell, norm: str) -> list[Measurement]:
    """The same, as it lies in the store."""
    found = []
    for spec in plan.evaluations:
        if getattr(spec, "norm", "") == norm and not isinstance(spec, Diagnostics):
            keys = [key_of(plan, cell, spec), *(pair_keys(plan, cell, spec) if isinstance(spec, Transfer) else [])]
            found += [m for key in keys for m in store.evaluation(key).measurements]
    return found


def test_a_flag_withholds_every_number_of_its_norm_and_artefact_and_no_other(plan, folder):
    linf, l2 = specs_of(plan)
    first, second = plan.cells
    assert (linf.norm, l2.norm) == ("linf", "l2")
    rows = [planted(plan, first, linf, FLAG, "flag_randomised"), planted(plan, first, l2)]
    rows += [planted(plan, second, linf), planted(plan, second, l2, FLAG)]
    with Store(folder, write=True) as store:
        store.add_evaluations(rows)
        results = assemble(plan, store, "", "")
        for cell, norm in ((first, "linf"), (second, "l2")):
            hidden, known = attacked(results, cell, norm), stored(store, plan, cell, norm)
            assert len(hidden) == len(known) and any(m.value is not None for m in known)
            for shown, was in zip(hidden, known, strict=True):
                assert shown[:1] + shown[4:6] == was[:1] + was[4:6] and (shown.radius, shown.source) == (
                    was.radius,
                    was.source,
                )
                if was.value is None:  # what does not exist is not withheld
                    assert shown == was
                    continue
                assert (shown.value, shown.low, shown.high, shown.status) == (None, None, None, "withheld")
                assert f"zero_gradient: {EVIDENCE}" in shown.reason and "constant" not in shown.reason
                assert ("randomised" in shown.reason) == (cell is first)
        for cell, norm in ((first, "l2"), (second, "linf")):
            assert attacked(results, cell, norm) == stored(store, plan, cell, norm)
            assert all(m.status != "withheld" for m in attacked(results, cell, norm))
    assert not results.missing and all(m.status == "ok" for m in others(results) if m.value is not None)
    assert [m for m in attacked(results, first, "linf") if m.metric == "robust_auroc"]
    for row in configuration_rows(results):
        assert any(a.robust.withheld for a in row.attacked) and not all(a.robust.withheld for a in row.attacked)


def test_without_diagnostics_everything_is_withheld_and_they_are_missing(plan, folder):
    linf, _ = specs_of(plan)
    first, second = plan.cells
    with Store(folder, write=True) as store:
        results = assemble(plan, store, "", "")
        assert sorted(results.missing) == sorted(
            f"{spec.label} of {cell.training.configuration}, seed 0, fp32"
            for cell in plan.cells
            for spec in specs_of(plan)
        )
        for cell in plan.cells:
            for norm in ("linf", "l2"):
                values = [
                    (m.value, m.status, m.reason) for m in attacked(results, cell, norm) if m.status != "undefined"
                ]
                assert set(values) == {(None, "withheld", NOT_DIAGNOSED)}
        assert others(results) and all(m.status == "ok" for m in others(results) if m.value is not None)
        # Made for one artefact and norm, they speak of that one.
        store.add_evaluations([planted(plan, first, linf)])
        results = assemble(plan, store, "", "")
    assert all(m.status != "withheld" for m in attacked(results, first, "linf"))
    for cell, norm in ((first, "l2"), (second, "linf"), (second, "l2")):
        assert any(m.reason == NOT_DIAGNOSED for m in attacked(results, cell, norm))


def test_a_diagnosis_of_other_evidence_does_not_count(plan, folder, tmp_path):
    """It was made before the study got another attack at that radius; that might tell more."""
    linf, _ = specs_of(plan)
    cell = plan.cells[0]
    more = plan_of(write_study(tmp_path, STUDY + '[[evaluations]]\nkind = "fgsm"\nradius = "8/255"\n'))
    with Store(folder, write=True) as store:
        store.add_evaluations([planted(plan, cell, linf)])
        before, after = (assemble(p, store, "", "") for p in (plan, more))
    assert not [m for m in attacked(before, cell, "linf") if m.status == "withheld"]
    assert {m.reason for m in attacked(after, cell, "linf") if m.status == "withheld"} == {NOT_DIAGNOSED}


def test_a_diagnosis_has_the_studys_own_evidence(plan, folder, roots, monkeypatch):
    """Clean answers, those under every white box at the radius, and those on other trainings' images at it."""
    seen = {}

    def watched(place, cell, spec, key, tried):
        seen[cell.key, spec] = tried
        return planted(plan, cell, spec)

    monkeypatch.setattr(engine, "diagnose_job", watched)
    assert "diagnosing: 4 jobs" in run_plan(plan, folder, roots)
    pgd, transfer = plan.evaluations[1], plan.evaluations[4]
    l2 = next(spec for spec in plan.evaluations if spec.kind == "pgd" and spec.norm == "l2")
    with Store(folder) as store:

        def at(key, radius):
            (logits_NK,) = (o.logits_NK for o in store.outcomes(key) if o.radius == radius)
            return logits_NK

        for cell, other in (plan.cells, plan.cells[::-1]):
            by_norm = {spec.norm: tried for (key, spec), tried in seen.items() if key == cell.key}
            white = at(evaluation_key(cell.key, pgd), 8 / 255)
            transferred = at(evaluation_key(cell.key, transfer, (other.key,)), 8 / 255)
            assert np.array_equal(by_norm["linf"].clean_NK, at(evaluation_key(cell.key, Clean()), None))
            assert len(by_norm["linf"].white) == len(by_norm["linf"].transferred) == 1
            assert np.array_equal(by_norm["linf"].white[0], white) and not np.array_equal(
                white, at(evaluation_key(cell.key, pgd), 4 / 255)
            )
            assert np.array_equal(by_norm["linf"].transferred[0], transferred)
            assert by_norm["l2"].transferred == ()
            assert np.array_equal(by_norm["l2"].white[0], at(evaluation_key(cell.key, l2), 0.5))
    seen.clear()
    assert run_plan(plan, folder, roots) == "" and not seen  # they are stored under the key that is looked for


def test_a_diagnosis_waits_for_its_evidence(plan, folder, roots, monkeypatch):
    """An attack that failed is no attack that found nothing."""
    linf, l2 = specs_of(plan)
    first, second = plan.cells
    made = []

    def watched(place, cell, spec, key, tried):
        made.append((cell.key, spec))
        return planted(plan, cell, spec)

    def fails(*_):
        raise Failure("the machine", "lost its power", "Wait")

    _, (transferred,) = evidence_keys(plan, first, linf)
    with closing(sqlite3.connect(folder / "store.db")) as db, db:
        for table, column in (
            ("measurements", "evaluation_key"),
            ("outcomes", "evaluation_key"),
            ("evaluations", "key"),
        ):
            assert db.execute(f"DELETE FROM {table} WHERE {column} = ?", (transferred,)).rowcount
    monkeypatch.setattr(engine, "diagnose_job", watched)
    with monkeypatch.context() as patched:
        patched.setattr(engine, "attack_job", fails)
        with pytest.raises(Failure, match="lost its power"):
            run_plan(plan, folder, roots)
    assert set(made) == {(first.key, l2), (second.key, linf), (second.key, l2)}
    run_plan(plan, folder, roots)
    assert made[3:] == [(first.key, linf)]


@pytest.fixture
def place(undiagnosed, roots):
    return Workplace(undiagnosed, roots, "cpu", 1, os.getpid())


def test_what_transfers_better_than_the_white_box_is_flagged(plan, place, undiagnosed, roots, monkeypatch):
    """On planted logits; the white box is image by image the worst of all, and so are the transfers."""
    monkeypatch.setattr(diagnosing, "diagnose", lambda *_, **__: [])
    cell, (linf, _) = plan.cells[0], specs_of(plan)
    labels_N = plan.trainings[0].spec.data.load(roots).test.labels_N
    right_NK = np.eye(2, dtype=np.float32)[labels_N]
    wrong_NK, half_NK, rest_NK = 1 - right_NK, right_NK.copy(), right_NK.copy()
    half_NK[:6], rest_NK[6:] = wrong_NK[:6], wrong_NK[6:]

    def flag(white, transferred):
        row = diagnose_job(place, cell, linf, "key", Tried(right_NK, white, transferred))
        assert row.key == "key" and row.artefact_key == cell.key and row.spec["label"] == linf.label
        return {m.metric: m.value for m in row.measurements}

    name = "flag_transfer_beats_white_box"
    assert flag((right_NK,), (wrong_NK,)) == {name: 1.0}
    assert flag((right_NK,), (right_NK, half_NK)) == {name: 1.0}
    assert flag((half_NK, rest_NK), (wrong_NK,)) == {name: 0.0}  # together they broke all of it
    assert flag((half_NK,), (right_NK, half_NK)) == {name: 0.0}
    assert flag((wrong_NK,), (right_NK,)) == {name: 0.0}
    assert flag((), (wrong_NK,)) == flag((right_NK,), ()) == {}


def test_a_diagnosis_looks_at_the_model_in_earnest(plan, place):
    """Without a planted part: all flags of one artefact, with evidence, at the radius and on the test images."""
    cell, (linf, _) = plan.cells[0], specs_of(plan)
    row = diagnose_job(place, cell, linf, diagnostics_key(plan, cell, linf), Tried(np.zeros((12, 2)), (), ()))
    names = [m.metric for m in row.measurements]
    assert len(names) == len(set(names)) == 10 and all(name.startswith("flag_") for name in names)
    assert all(m.reason and m.value in (0.0, 1.0) and m.radius == linf.radius == 8 / 255 for m in row.measurements)
    assert all(0 < m.n <= 12 for m in row.measurements) and not row.outcomes
    again = diagnose_job(place, cell, linf, row.key, Tried(np.zeros((12, 2)), (), ()))
    assert again.measurements == row.measurements


def test_what_is_diagnosed_is_listed_like_any_other_evaluation(plan, folder):
    linf, l2 = specs_of(plan)
    with Store(folder, write=True) as store:
        store.add_evaluations([planted(plan, cell, spec) for cell in plan.cells for spec in (linf, l2)])
        results = assemble(plan, store, "", "")
    shown = [e for e in results.evaluated if e.kind == "diagnostics"]
    assert [e.evaluation for e in shown] == [linf.label, l2.label] * 2
    assert all(m.metric == "flag_constant" and m.value == 0 for e in shown for m in e.measurements)
    assert {type(spec) for spec in plan.evaluations} >= {Diagnostics, AllAtOnce}
