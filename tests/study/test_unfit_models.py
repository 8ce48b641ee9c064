"""A model that answers with no numbers is a result like any other, and what cannot be kept of it stops nothing else."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.tiny_study import SMALLEST, plan_of, run_plan, write_study
from trilemma.errors import Failure
from trilemma.evaluation.specs import Clean
from trilemma.study import evaluate_job
from trilemma.study.assemble import assemble
from trilemma.study.engine import attacks_to_make
from trilemma.study.evaluate_job import NUM_EXAMPLES, open_target
from trilemma.study.keys import evaluation_key
from trilemma.study.store import Refused, Store
from trilemma.study.workplace import Workplace

#: The first model's weights are so large that its answers overflow; a federation's server would not let them in.
TWO = f"""{SMALLEST.replace('"resnet9"', '"resnet9", norm = "none"')}
base.algorithm = {{ kind = "centralised" }}
[[grid.training]]
name = "bad"
local = {{ batch_size = 8, steps = 1, learning_rate = 1e6 }}
[[grid.training]]
name = "good"
local = {{ batch_size = 8, steps = 1 }}

[[evaluations]]
kind = "clean"
[[evaluations]]
kind = "pgd"
radius = "4/255"
steps = 1
[[evaluations]]
kind = "cost"
repeats = 5
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_of(write_study(tmp_path_factory.mktemp("study"), TWO))


@pytest.fixture(scope="module")
def stored(plan, roots, tmp_path_factory):
    """The folder of a store that holds both models; do not write to it."""
    folder = tmp_path_factory.mktemp("two")
    run_plan(plan, folder, roots)
    return folder


def robust_accuracy(store, plan, cell) -> float | None:
    row = store.evaluation(evaluation_key(cell.key, plan.evaluations[1]))
    return next(m.value for m in row.measurements if m.metric == "robust_accuracy") if row else None


def test_a_model_without_finite_answers_is_wrong_and_stops_nothing(plan, stored):
    bad, good = plan.cells
    with Store(stored) as store:
        assert not assemble(plan, store, "", "").missing
        assert np.isnan(store.outcomes(evaluation_key(bad.key, Clean()))[0].logits_NK).all()
        assert robust_accuracy(store, plan, bad) == 0.0 and robust_accuracy(store, plan, good) is not None
        shown = [store.evaluation(evaluation_key(cell.key, plan.evaluations[1])).examples for cell in plan.cells]
    assert len(shown[0]) == 0 < len(shown[1])  # even a constant is right on one class


def test_images_are_shown_only_of_finite_answers(plan, stored, roots):
    place = Workplace(stored, roots, "cpu", 1, os.getpid())
    good = plan.cells[1]
    dataset, source = place.dataset(good.training.spec.data), open_target(place, good)
    attack = next(a for a in attacks_to_make(plan, set(), {good.key}))
    right_NK = np.eye(2, dtype=np.float32)[dataset.test.labels_N]
    infinite_NK = np.where(dataset.test.labels_N[:, None] == 0, np.inf * (right_NK - 0.5), right_NK).astype(np.float32)

    def shown(clean_NK, predict):
        found = replace(attack, clean={good.key: clean_NK})
        return [e.truth for e in evaluate_job._examples(place, found, replace(source, predict=predict), dataset)]

    def answer(value):
        return lambda x_BCHW: torch.tensor([[0.0, value]]).repeat(len(x_BCHW), 1)

    assert NUM_EXAMPLES >= 2 and shown(right_NK, answer(1.0)) == list(dataset.classes)
    assert shown(infinite_NK, answer(1.0)) == [dataset.classes[1]]
    assert shown(right_NK, answer(float("nan"))) == []


@pytest.mark.parametrize("spoilt", ["attack", "training"])
def test_what_cannot_be_kept_of_one_job_stops_no_other(plan, roots, tmp_path, monkeypatch, spoilt):
    add_run, add_evaluations = Store.add_run, Store.add_evaluations
    bad, good = plan.cells

    def spoil_run(store, row):
        number = float("nan") if row.key == bad.training.key else 0.5
        add_run(store, replace(row, history=[{**row.history[0], "loss": number}]))

    def spoil_rows(store, rows):
        spoil = rows[0].artefact_key == bad.key and rows[0].spec["kind"] == "pgd"
        add_evaluations(store, [replace(row, seconds=None) if spoil else row for row in rows])

    if spoilt == "training":
        monkeypatch.setattr(Store, "add_run", spoil_run)
    else:
        monkeypatch.setattr(Store, "add_evaluations", spoil_rows)
    with pytest.raises(Refused, match="cannot be stored") as caught:
        run_plan(plan, tmp_path / "store", roots)
    assert caught.value.where.startswith("train: bad" if spoilt == "training" else "attack with PGD-1 Linf: bad")
    monkeypatch.undo()
    with Store(tmp_path / "store") as store:
        assert robust_accuracy(store, plan, good) is not None
        missing = assemble(plan, store, "", "").missing
    lost = ("PGD-1 Linf of bad, seed 0, fp32", "diagnostics Linf 4/255 of bad, seed 0, fp32")  # which looks at PGD's
    assert missing == (("training bad, seed 0",) if spoilt == "training" else lost)
    run_plan(plan, tmp_path / "store", roots)
    with Store(tmp_path / "store") as store:
        assert not assemble(plan, store, "", "").missing


def test_a_full_disk_ends_the_run(plan, roots, tmp_path, monkeypatch):
    asked = []

    def full(_, rows):
        asked.append(rows)
        raise Failure("store.db", "the store cannot be used (database or disk is full)", "Free some space")

    monkeypatch.setattr(Store, "add_evaluations", full)
    with pytest.raises(Failure, match="disk is full"):
        run_plan(plan, tmp_path / "store", roots)
    assert len(asked) == 1
