"""Choosing settings: a study measures on its validation images and leaves the test images alone."""

import numpy as np
import pytest

from helpers.tiny_study import SMALLEST, plan_of, rows_of, run_plan, write_study
from trilemma.data.records import Dataset
from trilemma.data.specs import Phantom
from trilemma.evaluation.specs import Clean
from trilemma.study.files import StoreFiles, load_tensors, open_model
from trilemma.study.keys import evaluation_key
from trilemma.study.store import Store

EVALUATIONS = """
[[evaluations]]
kind = "clean"
[[evaluations]]
kind = "all_at_once"
attacks = [{ kind = "fgsm", radius = "4/255" }, { kind = "pgd", radius = "4/255", steps = 1 }]
"""


@pytest.fixture(scope="module")
def studies(tmp_path_factory, roots):
    """ "test" and "val" -> plan and store of a study that measures there."""
    made = {}
    for split in ("test", "val"):
        folder = tmp_path_factory.mktemp(split)
        plan = plan_of(write_study(folder, SMALLEST + EVALUATIONS), f"base.data.evaluate_on={split}")
        run_plan(plan, folder / "store", roots)
        made[split] = plan, folder / "store"
    return made


def test_the_model_is_the_same_and_the_images_are_the_validation_ones(studies, roots):
    plan, folder = studies["val"]
    cell, given = plan.cells[0], plan.trainings[0].spec.data
    data = Phantom.model_validate({**given.model_dump(), "evaluate_on": "test"}).load(roots)
    files = {split: StoreFiles(store).weights(its.trainings[0].key) for split, (its, store) in studies.items()}
    weights = {split: load_tensors(path)[0]["params"] for split, path in files.items()}
    assert weights["val"].equal(weights["test"])
    with Store(folder) as store:
        (outcome,) = store.outcomes(evaluation_key(cell.key, Clean()))
    expected_NK = open_model(StoreFiles(folder).model(cell.key), 1).predict(data.val.x())
    assert np.allclose(outcome.logits_NK, expected_NK, atol=1e-6) and len(expected_NK) == 8


@pytest.mark.parametrize("split", ["test", "val"])
def test_every_number_says_on_which_images_it_was_measured(studies, split):
    measured = rows_of(studies[split][1])["measurements"]
    assert {row["split"] for row in measured} == {split}
    assert {row["n"] for row in measured if row["metric"] == "accuracy"} >= {{"test": 12, "val": 8}[split]}


def test_the_test_images_are_not_handed_out(roots):
    given = {"size": 16, "train": 24, "val": 8, "test": 12, "sites": 2, "classes": 2}
    usual, chosen = (Phantom(**given, evaluate_on=split).load(roots) for split in ("test", "val"))
    assert isinstance(chosen, Dataset) and chosen.test is chosen.val
    assert np.array_equal(chosen.val.images_NCHW, usual.val.images_NCHW)
    assert np.array_equal(chosen.train.images_NCHW, usual.train.images_NCHW)
    assert chosen.name == f"{usual.name}, measured on validation"
    assert set(chosen.warnings) - set(usual.warnings) == {
        "Measured on the validation images, which are called test here; other notes on test are about images not used."
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            'base.pretraining={ data = { kind = "phantom", size = 16, evaluate_on = "val" } }',
            "nothing is measured here",
        ),
        ('compressions=[{ kind = "int8", calibration = "val" }]', "the very images that evaluate_on = 'val' measures"),
    ],
)
def test_what_makes_no_sense_with_it_is_refused(trilemma, tmp_path, wrong, message):
    study = write_study(tmp_path, SMALLEST)
    chosen = ("--set", "base.data.evaluate_on=val")
    assert trilemma("check", study, *chosen)[0] == 0
    code, _, err = trilemma("check", study, *chosen, "--set", wrong)
    assert code == 2 and message in " ".join(err.split())


def test_what_cannot_be_measured_says_so_of_the_same_images(trilemma, tmp_path):
    transfer = '[[evaluations]]\nkind = "transfer"\nradius = "4/255"\nsteps = 1\n'
    study = write_study(
        tmp_path, SMALLEST.replace('kind = "phantom"', 'kind = "phantom", evaluate_on = "val"') + transfer
    )
    where = ("--store", tmp_path / "store")
    assert trilemma("run", study, *where, "--quiet")[0] == 0
    assert trilemma("export", study, tmp_path / "out.csv", *where)[0] == 0
    (row,) = [line for line in (tmp_path / "out.csv").read_text().splitlines() if "undefined" in line]
    assert ",val,undefined," in row


def test_the_report_and_check_say_so(trilemma, tmp_path):
    study = write_study(tmp_path, SMALLEST.replace('kind = "phantom"', 'kind = "phantom", evaluate_on = "val"'))
    code, out, _ = trilemma("check", study)
    assert code == 0 and "measured on validation" in out and "which are called test here" in " ".join(out.split())
    assert trilemma("run", study, "--store", tmp_path / "store", "--quiet")[0] == 0
    where = tmp_path / "table.md"
    assert trilemma("export", study, where, "--store", tmp_path / "store")[0] == 0
    assert "measured on validation" in where.read_text(encoding="utf-8")
