"""Studies of every kind of compression, from training to what ships."""

import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from helpers.tiny_study import PRIVATE, SMALLEST, plan_of, run_plan, write_study
from trilemma.compression.multiply_adds import multiply_adds
from trilemma.compression.packing import is_packed
from trilemma.compression.shipping import properties_of
from trilemma.compression.step import Looks
from trilemma.data.specs import Phantom
from trilemma.errors import Failure, UserError
from trilemma.evaluation.specs import Clean, Cost
from trilemma.privacy.guarantee import Guarantee
from trilemma.report.html import report_html
from trilemma.report.summary import summary_rows
from trilemma.study.assemble import assemble
from trilemma.study.compress_job import SPARSE, compress_job, material
from trilemma.study.evaluate_job import clean_job, cost_job
from trilemma.study.files import open_model, read_model
from trilemma.study.keys import evaluation_key
from trilemma.study.store import Store
from trilemma.study.work import Failed, Job, run_jobs
from trilemma.study.workplace import Workplace

STUDY = (
    SMALLEST
    + """
compressions = [
    { kind = "none" },
    { kind = "channels", multiply_adds = 0.6 },
    { kind = "int4" },
    { kind = "mixed", num_calibration = 4, budget = 0.3 },
    { kind = "chain", steps = [
        { kind = "prune", sparsity = 0.8 },
        { kind = "distil", num_images = 16, epochs = 1, images = "synthetic" },
        { kind = "int8", num_calibration = 8 },
    ] },
]
[[evaluations]]
kind = "clean"
[[evaluations]]
kind = "pgd"
radius = "8/255"
steps = 2
[[evaluations]]
kind = "cost"
repeats = 5
"""
)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_of(write_study(tmp_path_factory.mktemp("study"), STUDY))


@pytest.fixture(scope="module")
def stored(plan, roots, tmp_path_factory):
    """The folder of a store that holds the study without its diagnostics, which take most of the time.

    Do not write to it.
    """
    folder = tmp_path_factory.mktemp("compressed") / "store"
    run_plan(asked(plan), folder, roots)
    return folder


@pytest.fixture
def place(stored, roots, tmp_path):
    """Where jobs may write: a copy of the store."""
    return Workplace(shutil.copytree(stored, tmp_path / "store"), roots, "cpu", 1, os.getpid())


def asked(plan):
    return replace(plan, evaluations=plan.study.evaluations)


def cell_of(plan, kind):
    return next(cell for cell in plan.cells if cell.compression.kind == kind)


def test_everything_is_compressed_attacked_and_reported(plan, stored):
    with Store(stored) as store:
        results = assemble(plan, store, "", "")
        assert len(results.artefacts) == len(results.missing) == 5
        assert all("diagnostics" in each for each in results.missing)
        for cell in plan.cells:
            assert all(store.evaluation(evaluation_key(cell.key, spec)) for spec in plan.study.evaluations)
            (attacked,) = store.outcomes(evaluation_key(cell.key, plan.evaluations[1]))
            assert np.isfinite(attacked.logits_NK).all() and attacked.logits_NK.shape == (12, 2)
            found = {m.metric: m for m in store.evaluation(evaluation_key(cell.key, Clean())).measurements}
            assert found["twin_agreement"].value == 1.0 and found["twin_logit_difference"].value < 0.1
    text = report_html(results)
    assert all(cell.compression.label in text for cell in plan.cells)


def test_multiply_adds_are_those_of_the_twin(plan, place):
    counted = {}
    with Store(place.folder) as store:
        rows = {row["compression"]: row for row in summary_rows(assemble(plan, store, "", ""))}
        for cell in plan.cells:
            cost = store.evaluation(evaluation_key(cell.key, plan.evaluations[2]))
            (m,) = [m for m in cost.measurements if m.metric == "multiply_adds"]
            assert m.value == multiply_adds(place.twin(cell), (1, 16, 16))
            assert m.value == rows[cell.compression.label]["multiply_adds"]
            counted[cell.compression.kind] = m.value
    assert counted["channels"] <= 0.6 * counted["none"]
    assert counted["none"] == counted["int4"] == counted["mixed"] == counted["chain"] > 0


def test_a_sparse_artefact_is_packed_in_the_store_and_its_size_is_that(plan, stored, place):
    sizes = {}
    with Store(stored) as store:
        for cell in plan.cells:
            row, path = store.artefact(cell.key), store.files.model(cell.key)
            assert row.file_bytes == path.stat().st_size
            assert is_packed(path.read_bytes()) == (row.sparsity >= SPARSE) == (cell.compression.kind == "chain")
            model = read_model(path)
            onnx.checker.check_model(onnx.load_from_string(model))
            assert properties_of(model)["trilemma.key"] == cell.key
            sizes[cell.compression.kind] = row.file_bytes
            cost = store.evaluation(evaluation_key(cell.key, plan.evaluations[2]))
            assert cost.measurements[0][:2] == ("file_bytes", row.file_bytes)
            assert (len(model) > row.file_bytes) == (cell.compression.kind == "chain")
    assert sizes["chain"] < sizes["int4"] < sizes["mixed"] < sizes["channels"] < sizes["none"]


def test_a_second_run_does_nothing_and_a_second_store_is_the_same(plan, stored, roots, tmp_path):
    assert run_plan(asked(plan), shutil.copytree(stored, tmp_path / "store"), roots) == ""
    place = Workplace(shutil.copytree(stored, tmp_path / "again"), roots, "cpu", 1, os.getpid())
    for cell in plan.cells:
        with Store(stored) as store:
            row, run = store.artefact(cell.key), store.run(cell.training.key)
        again = compress_job(place, cell, run.guarantee)
        assert (again.file_bytes, again.sparsity, again.guarantee) == (row.file_bytes, row.sparsity, row.guarantee)
        assert (
            place.files.model(cell.key).read_bytes()
            == (stored / "artefacts" / place.files.model(cell.key).name).read_bytes()
        )


@pytest.mark.parametrize("kind", ["chain", "int4", "mixed", "channels"])
def test_it_is_exported_to_stand_alone(plan, stored, kind, trilemma, tmp_path):
    key = cell_of(plan, kind).key
    code, out, err = trilemma("export-model", key, "--to", tmp_path / "out", "--store", stored)
    assert (code, err) == (0, ""), err
    assert not is_packed((tmp_path / "out" / "model.onnx").read_bytes())
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert re.search(r"\| multiply-adds for 1 image \| [\d.]+\s(thousand|million) \|", card)
    looked = {
        "chain": "it looked at up to 16 images: made from the model alone, and at up to 8 images: public phantoms",
        "mixed": "it looked at up to 4 images: public phantoms",
    }
    assert looked.get(kind, "no image was read for it") in card.replace("\\", "")


@pytest.mark.parametrize("spoil", ["changed", "cut", "empty", "other"])
def test_a_damaged_packed_file_is_a_failure_that_names_it(plan, place, trilemma, spoil, tmp_path):
    cell = cell_of(plan, "chain")
    path = place.files.model(cell.key)
    whole = path.read_bytes()
    changed = whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]
    path.write_bytes({"changed": changed, "cut": whole[:-9], "empty": b"", "other": b"TRIP" + 60 * b"\0"}[spoil])
    with pytest.raises(Failure) as error:
        open_model(path, 1)
    assert error.value.where == str(path) and "cannot be read" in error.value.problem
    for job, arguments in ((clean_job, (cell,)), (cost_job, (cell, Cost(repeats=5)))):
        ((_, result),) = run_jobs([Job("measure", cell.key, job, arguments)], place, 1)
        assert isinstance(result, Failed) and isinstance(result.error, Failure) and str(path) in str(result.error)
        assert not place.files.log(cell.key).exists(), "no defect"
    code, _, err = trilemma("export-model", cell.key, "--to", tmp_path / "out", "--store", place.folder)
    assert code == 1 and str(path) in err and "Traceback" not in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("compression", "said"),
    [
        ('{ kind = "mixed", budget = 0.01 }', r"take \d+ bytes, and the budget is \d+\."),
        ('{ kind = "channels", multiply_adds = 0.001 }', "cannot be reached"),
    ],
)
def test_what_cannot_be_done_is_said(compression, said, place, tmp_path):
    (cell,) = plan_of(write_study(tmp_path, STUDY), f"compressions=[{compression}]").cells
    with pytest.raises(UserError, match=said) as error:
        compress_job(place, cell, Guarantee(void=("no privacy",)))
    assert error.value.where == f"compressions, {cell.compression.label}"


def test_two_compressions_of_one_name_are_refused(tmp_path):
    study = write_study(tmp_path, STUDY)
    with pytest.raises(UserError, match="two compressions are called “int8”"):
        plan_of(study, 'compressions=[{kind="int8",num_calibration=8},{kind="int8",num_calibration=16}]')
    assert len(plan_of(study, 'compressions=[{kind="distil"},{kind="distil",epochs=3}]').cells) == 2


PUBLIC = 'compressions=[{{kind="none"}},{{kind="int8",num_calibration=6,data={{kind="phantom",{}}}}}]'
FITS = "size=16,train=24,val=8,test=12,sites=2,classes=2"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("size=20,train=24", "20 pixels a side"),
        (FITS, "24 training images of .* are train images of .* too"),
    ],
)
def test_images_that_are_not_public_or_do_not_fit_are_refused_before_anything_is_trained(data, said, roots, tmp_path):
    plan = plan_of(write_study(tmp_path, SMALLEST), PUBLIC.format(data))
    with pytest.raises(UserError, match=said) as error:
        run_plan(plan, tmp_path / "store", roots)
    assert error.value.where == "compressions.data"
    with Store(tmp_path / "store") as store:
        assert not store.keys("runs")
    place = Workplace(tmp_path / "store", roots, "cpu", 1, os.getpid())
    dataset = place.dataset(plan.trainings[0].spec.data)
    looks = plan.cells[1].compression.looks[0]
    with pytest.raises(UserError, match=said):  # and again where the images are taken
        material(place, SimpleNamespace(), dataset, 0).images(looks)


def test_named_public_images_are_looked_at_noted_and_keep_the_guarantee(roots, tmp_path, capsys):
    named = PUBLIC.format(FITS + ",seed=5")
    plan = plan_of(write_study(tmp_path, PRIVATE), named, "base.rounds=1")
    run_plan(plan, tmp_path / "store", roots)
    public = Phantom(size=16, train=24, val=8, test=12, sites=2, classes=2, seed=5)
    with Store(tmp_path / "store") as store:
        first, second = (store.artefact(cell.key).guarantee for cell in plan.cells)
        assert first == second and first.epsilon is not None
        noted = assemble(plan, store, "", "").public
        assert [facts.name for facts in noted] == [f"{public.load(roots).name}, for compression"]
    place = Workplace(tmp_path / "store", roots, "cpu", 1, os.getpid())
    images = material(place, SimpleNamespace(), place.dataset(plan.trainings[0].spec.data), 0).images
    x = images(Looks("public", 6, public))
    held = {each.numpy().tobytes() for each in public.load(roots).train.x()}
    assert len(x) == 6 and len({each.numpy().tobytes() for each in x} & held) == 6
    assert torch.equal(x, images(Looks("public", 6, public)))


def test_looking_at_validation_images_that_are_measured_is_refused(roots, tmp_path):
    data, last = "base.data.evaluate_on=val", '{kind="mixed",calibration="val"}'
    for compression in ('{kind="distil",images="val"}', f'{{kind="chain",steps=[{{kind="prune"}},{last}]}}'):
        plan = plan_of(write_study(tmp_path, SMALLEST), data, f"compressions=[{compression}]")
        with pytest.raises(UserError, match="the very images that evaluate_on = 'val' measures") as error:
            run_plan(plan, tmp_path / "store", roots)
        assert error.value.where == f"compressions, {plan.cells[0].compression.label}"
