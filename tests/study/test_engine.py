"""The engine does what is missing, once, in any number of processes, with the same numbers."""

import os
import shutil
import sqlite3
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.pictures import write_image, write_images
from helpers.tiny_study import SMALLEST, TINY, plan_of, rows_of, run_plan, write_study
from trilemma.errors import Failure
from trilemma.evaluation.specs import AllAtOnce, Clean, Cost, Transfer
from trilemma.study.assemble import assemble
from trilemma.study.combine import combined_key, diagnostics_key, pair_keys, part_keys
from trilemma.study.engine import attacks_to_make
from trilemma.study.evaluate_job import attack_job
from trilemma.study.files import StoreFiles
from trilemma.study.keys import evaluation_key
from trilemma.study.store import Store
from trilemma.study.workplace import Workplace


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "store")


def test_everything_asked_for_is_stored_and_nothing_else(finished, tiny_plan):
    cells = tiny_plan.cells
    assert len(tiny_plan.trainings) == 2 and len(cells) == 4
    pgd, transfer, together = (tiny_plan.evaluations[i] for i in (1, 2, 3))
    clean, cost, diagnostics = (tiny_plan.evaluations[i] for i in (0, 4, 5))
    wanted = {evaluation_key(cell.key, spec) for cell in cells for spec in (clean, pgd, cost)}
    wanted |= {combined_key(tiny_plan, cell, spec) for cell in cells for spec in (transfer, together)}
    wanted |= {key for cell in cells for key in pair_keys(tiny_plan, cell, transfer)}
    wanted |= {diagnostics_key(tiny_plan, cell, diagnostics) for cell in cells}
    with Store(finished) as store:
        assert store.keys("runs") == {training.key for training in tiny_plan.trainings}
        assert store.keys("artefacts") == {cell.key for cell in cells}
        assert store.keys("evaluations") == wanted
        assert len(wanted) == 4 * 3 + 4 * 2 + 4 * 3 + 4
        assert not assemble(tiny_plan, store, "", "").missing
    files = StoreFiles(finished)
    assert all(files.weights(training.key).is_file() for training in tiny_plan.trainings)
    assert all(files.model(cell.key).is_file() and files.twin(cell.key).is_file() for cell in cells)
    assert not list((finished / "checkpoints").iterdir())
    assert not (finished / "logs").exists()
    assert not list(finished.rglob("*.part"))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_second_run_does_nothing(finished, tiny_plan, roots, tmp_path, jobs):
    folder = copied(finished, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".safetensors", ".onnx")}
    assert run_plan(tiny_plan, folder, roots, jobs) == ""  # no stage has a job
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert rows_of(folder) == rows_of(finished)


def test_a_new_evaluation_trains_nothing(finished, roots, tmp_path):
    folder = copied(finished, tmp_path)
    more = write_study(tmp_path, TINY + '\n[[evaluations]]\nkind = "fgsm"\nradius = "64/255"\n')
    shown = run_plan(plan_of(more), folder, roots)
    assert "attacking: 4 jobs" in shown and "diagnosing: 4 jobs" in shown
    assert not any(stage in shown for stage in ("training:", "compressing:", "clean metrics:", "latency:"))
    before, after = rows_of(finished), rows_of(folder)
    assert len(after["evaluations"]) == len(before["evaluations"]) + 4 + 4
    assert [row for row in after["measurements"] if row in before["measurements"]] == before["measurements"]


def test_two_processes_give_the_numbers_of_one(finished, tiny_plan, roots, tmp_path):
    run_plan(tiny_plan, tmp_path / "two", roots, jobs=2)
    assert rows_of(tmp_path / "two") == rows_of(finished)


def test_a_fresh_store_gets_the_same_numbers_and_another_seed_others(roots, tmp_path):
    study = write_study(tmp_path, SMALLEST)
    for name, overrides in (("a", ()), ("b", ()), ("c", ("seeds=[1]",))):
        run_plan(plan_of(study, *overrides), tmp_path / name, roots)
    a, b, c = (rows_of(tmp_path / name) for name in "abc")
    assert a == b
    assert a["outcomes"][0]["logits"] != c["outcomes"][0]["logits"]


def test_the_worst_transfer_is_the_worst_of_its_parts(finished, tiny_plan):
    transfer = next(spec for spec in tiny_plan.evaluations if isinstance(spec, Transfer))
    cell = tiny_plan.cells[0]
    with Store(finished) as store:
        worst = _robust(store.evaluation(combined_key(tiny_plan, cell, transfer)))
        parts = [_robust(store.evaluation(key)) for key in part_keys(tiny_plan, cell, transfer)]
        together = next(spec for spec in tiny_plan.evaluations if isinstance(spec, AllAtOnce))
        all_at_once = _robust(store.evaluation(combined_key(tiny_plan, cell, together)))
        white_box = _robust(store.evaluation(evaluation_key(cell.key, together.attacks[0])))
    # The same training's other compression is in the matrix, and not among what a black-box attacker could have.
    own = evaluation_key(cell.key, transfer, (tiny_plan.cells[1].key,))
    assert own in pair_keys(tiny_plan, cell, transfer) and own not in part_keys(tiny_plan, cell, transfer)
    assert len(parts) == 2 and set(worst) == set(transfer.radii)
    for radius in transfer.radii:
        assert worst[radius] <= min(part[radius] for part in parts)
        assert all_at_once[radius] <= min(worst[radius], white_box[radius])


def _robust(evaluation):
    found = [m for m in evaluation.measurements if m.metric == "robust_accuracy" and m.client is None]
    return {m.radius: m.value for m in found}


def test_transfers_stay_within_a_seed(tmp_path):
    plan = plan_of(write_study(tmp_path), "seeds=[0,1]")
    for cell in plan.cells:
        sources = plan.sources(cell)
        assert len(sources) == 3 and cell not in sources
        assert {source.training.spec.seed for source in sources} == {cell.training.spec.seed}


def test_a_failed_job_leaves_the_others_done(roots, tmp_path):
    """One model's training cannot even start: its checkpoint is damaged."""
    plan = plan_of(write_study(tmp_path))
    broken, sound = plan.trainings
    folder = tmp_path / "store"
    checkpoint = StoreFiles(folder).checkpoint(broken.key)
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"no tensors")
    with pytest.raises(Failure, match="Delete this file") as caught:
        run_plan(plan, folder, roots)
    assert str(checkpoint) in caught.value.where and caught.value.exit_code == 1
    with Store(folder) as store:
        assert store.keys("runs") == {sound.key}
        assert len(store.keys("artefacts")) == 2
        # clean, PGD, cost, one transfer each with its worst; and all of these at once
        results = assemble(plan, store, "", "")
    assert {found.kind for found in results.evaluated} == {"clean", "pgd", "cost", "transfer"}
    assert [phrase for phrase in results.missing if phrase.startswith("training")] == ["training plain, seed 0"]
    checkpoint.unlink()
    run_plan(plan, folder, roots)
    with Store(folder) as store:
        assert not assemble(plan, store, "", "").missing


def test_a_defect_in_a_job_leaves_a_log_and_no_traceback(roots, tmp_path, monkeypatch):
    plan = plan_of(write_study(tmp_path, SMALLEST))
    monkeypatch.setattr("trilemma.study.compress_job.export_onnx", lambda *_: 1 / 0)
    with pytest.raises(Failure, match="ZeroDivisionError") as caught:
        run_plan(plan, tmp_path / "store", roots)
    log = StoreFiles(tmp_path / "store").log(plan.cells[0].key)
    assert str(log) in caught.value.remedy and "Traceback" in log.read_text()


@pytest.mark.parametrize("lost", ["model", "twin", "weights"])
def test_a_lost_file_is_named(finished, roots, tmp_path, lost):
    folder = copied(finished, tmp_path)
    more = TINY + '\n[[evaluations]]\nkind = "fgsm"\nradius = "64/255"\n'
    if lost == "weights":
        more += '[[compressions]]\nkind = "prune"\n'
    plan = plan_of(write_study(tmp_path, more))
    files, cell = StoreFiles(folder), plan.cells[0]
    path = files.weights(cell.training.key) if lost == "weights" else getattr(files, lost)(cell.key)
    path.unlink()
    before = rows_of(folder)
    with pytest.raises(Failure) as caught:
        run_plan(plan, folder, roots)
    assert str(path) in str(caught.value) and "is missing" in str(caught.value)
    after = rows_of(folder)
    assert all(row in after[table] for table in before for row in before[table])


def test_a_damaged_model_is_named(finished, roots, tmp_path):
    folder = copied(finished, tmp_path)
    plan = plan_of(write_study(tmp_path, TINY.replace("repeats = 5", "repeats = 6")))
    path = StoreFiles(folder).model(plan.cells[0].key)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(Failure) as caught:
        run_plan(plan, folder, roots)
    assert str(path) in str(caught.value)
    with Store(folder) as store:  # the other three were timed
        cost = next(spec for spec in plan.evaluations if isinstance(spec, Cost))
        assert sum(evaluation_key(cell.key, cost) in store.keys("evaluations") for cell in plan.cells) == 3


def test_changed_images_are_refused(roots, tmp_path, monkeypatch):
    """The same study file, and one image that is not what it was."""
    names = [f"{split}/{kind}/{i}.png" for split in ("train", "test") for kind in ("a", "b") for i in range(12)]
    write_images(tmp_path / "images", names)
    data = f'base.data={{kind="folder", path="{tmp_path}/images", size=16}}'
    plan = plan_of(
        write_study(tmp_path, SMALLEST.replace('"by_site"', '"iid"')), data, 'evaluations=[{kind="cost",repeats=5}]'
    )
    run_plan(plan, tmp_path / "store", roots)
    before = rows_of(tmp_path / "store")
    write_image(tmp_path / "images" / names[0], seed=999)
    monkeypatch.setattr("trilemma.study.workplace._LOADED", {})  # as in a new process
    with pytest.raises(Failure, match="have changed") as caught:
        run_plan(plan, tmp_path / "store", roots)
    assert "--store" in caught.value.remedy
    assert rows_of(tmp_path / "store") == before


DP = """
[[grid.training]]
name = "DP"
privacy = { kind = "dp_sgd", epsilon = 8.0, delta = 1e-2, clip = 1.0 }
[[compressions]]
kind = "int8"
num_calibration = 8
[[compressions]]
kind = "int8"
calibration = "train"
num_calibration = 8
"""


def test_dp_gives_a_guarantee_and_private_calibration_voids_it(roots, tmp_path):
    plan = plan_of(write_study(tmp_path, SMALLEST + DP))
    run_plan(plan, tmp_path / "store", roots)
    public, private = plan.cells
    with Store(tmp_path / "store") as store:
        guarantee = store.run(plan.trainings[0].key).guarantee
        assert set(guarantee.epsilon_by_client) == {"hospital 1", "hospital 2"}
        assert all(0 < epsilon <= 8.01 for epsilon in guarantee.epsilon_by_client.values())
        # 12 records in batches of 8: two steps, in one round
        assert all(events[0].steps == 2 for events in guarantee.events_by_client.values())
        assert store.artefact(public.key).guarantee == guarantee
        void = store.artefact(private.key).guarantee
    assert void.epsilon is None and "training images" in void.in_words()


def test_local_only_trains_every_hospital(roots, tmp_path):
    plan = plan_of(write_study(tmp_path, SMALLEST), 'baselines=[{algorithm={kind="local_only"}}]')
    run_plan(plan, tmp_path / "store", roots)
    with Store(tmp_path / "store") as store:
        results = assemble(plan, store, "", "")
    assert [run.configuration for run in results.runs] == ["plain", "local only", "local only"]
    assert [run.history[0]["clients"] for run in results.runs[1:]] == [["hospital 1"], ["hospital 2"]]


def test_the_provenance_of_a_run(finished, tiny_plan):
    with Store(finished) as store:
        run = store.run(tiny_plan.trainings[0].key)
    versions = run.provenance["versions"]
    assert versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # "+cpu", "+cu130": the build
    assert versions["numpy"] == np.__version__
    assert run.provenance["device"] == "cpu" and run.provenance["threads"] == 1
    assert run.seconds > 0 and run.peak_memory_bytes > 2**20
    assert [row["round"] for row in run.history] == [1, 2]
    # the model both ways for two clients: float32 parameters (no buffers with group normalisation)
    assert all(row["bytes_up"] == row["bytes_down"] == 2 * 4 * run.num_parameters for row in run.history)


def test_latency_is_measured_alone(finished):
    """Everything of the cost evaluation came after everything else."""
    db = sqlite3.connect(finished / "store.db")
    kinds = [kind for (kind,) in db.execute("SELECT json_extract(spec, '$.kind') FROM evaluations ORDER BY rowid")]
    db.close()
    assert kinds[-4:] == ["cost"] * 4 and "cost" not in kinds[:-4]


def test_the_seconds_of_an_attack_are_counted_once(finished, tiny_plan, roots):
    """A job that judges one attack on several artefacts gives each row its share, so that rows add up to the job."""
    place = Workplace(finished, roots, "cpu", 1, os.getpid())
    with Store(finished) as store:
        clean = {c.key: store.outcomes(evaluation_key(c.key, Clean()))[0].logits_NK for c in tiny_plan.cells}
    attack = replace(attacks_to_make(tiny_plan, set(), set(clean))[0], clean=clean)
    started = time.perf_counter()
    rows = attack_job(place, attack)
    assert len(rows) == 4 and 0 < sum(row.seconds for row in rows) <= time.perf_counter() - started
