"""What the jobs hand to the rooms below: the right images, model, patients, seed and threads."""

import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.pictures import write_image, write_images
from helpers.tiny_study import SMALLEST, plan_of, run_plan, write_study
from trilemma.attacks.evasion.specs import Fgsm, Pgd
from trilemma.compression import quantisation_specs as compressions
from trilemma.compression.fake_quantisation import quantise
from trilemma.compression.specs import Int8
from trilemma.data.specs import Phantom
from trilemma.errors import Failure
from trilemma.evaluation.clean import clean_measurements
from trilemma.evaluation.cost import cost_measurements
from trilemma.evaluation.intervals import share_interval
from trilemma.evaluation.robustness import robust_measurements
from trilemma.evaluation.specs import Clean, Cost, Transfer
from trilemma.federation.round import run_round
from trilemma.privacy.guarantee import Guarantee
from trilemma.study import engine, evaluate_job, train_job
from trilemma.study.compress_job import compress_job
from trilemma.study.evaluate_job import AttackTask, attack_job, clean_job, cost_job
from trilemma.study.files import StoreFiles, load_tensors, open_model, save_tensors
from trilemma.study.keys import evaluation_key
from trilemma.study.plan import Cell
from trilemma.study.store import Store
from trilemma.study.work import run_jobs
from trilemma.study.workplace import Workplace

#: Test images of each patient; the phantoms' seed is not that of the public ones.
PER_PATIENT, NUM_TEST = 3, 24
STUDY = f"""{SMALLEST.replace("test = 12", f"test = {NUM_TEST}, images_per_patient = {PER_PATIENT}, seed = 7")}
[[compressions]]
kind = "none"
[[compressions]]
kind = "int8"
num_calibration = 8

[[evaluations]]
kind = "clean"
[[evaluations]]
kind = "all_at_once"
attacks = [{{ kind = "fgsm", radius = "4/255" }}, {{ kind = "pgd", radius = "4/255", steps = 1 }}]
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_of(write_study(tmp_path_factory.mktemp("study"), STUDY))


@pytest.fixture(scope="module")
def stored(plan, roots, tmp_path_factory):
    """The folder of a store that holds the study; do not write to it."""
    folder = tmp_path_factory.mktemp("wiring")
    run_plan(plan, folder, roots)
    return folder


@pytest.fixture
def place(stored, roots, tmp_path):
    """Where jobs may write: a copy of the store."""
    return Workplace(shutil.copytree(stored, tmp_path / "store"), roots, "cpu", 1, os.getpid())


@pytest.fixture
def clean(plan, stored):
    """Artefact key -> stored logits on clean images."""
    with Store(stored) as store:
        return {c.key: store.outcomes(evaluation_key(c.key, Clean()))[0].logits_NK for c in plan.cells}


def images_of(x_BCHW):
    return {x_CHW.numpy().tobytes() for x_CHW in x_BCHW}


@pytest.mark.parametrize("calibration", ["public", "train", "val"])
def test_int8_is_calibrated_on_the_images_that_its_guarantee_rests_on(plan, place, roots, monkeypatch, calibration):
    (training,), claimed, seen = plan.trainings, Guarantee(delta=1e-3, clip=1.0, epsilon_by_client={"north": 3.0}), []
    monkeypatch.setattr(compressions, "quantise", lambda model, x, *how: seen.append(x) or quantise(model, x, *how))
    cell = Cell(training, Int8(calibration=calibration, num_calibration=6), "s1:calibrated")
    guarantee = compress_job(place, cell, claimed).guarantee
    dataset = training.spec.data.load(roots)
    held = {split: images_of(getattr(dataset, split).x()) for split in ("train", "val", "test")}
    public = images_of(Phantom(size=16, train=16).load(roots).train.x())
    assert sum(map(len, held.values())) + len(public) == len(public.union(*held.values()))  # no image is in two
    (x_BCHW,) = seen
    assert len(images_of(x_BCHW)) == 6
    assert images_of(x_BCHW) <= (public if calibration == "public" else held[calibration])
    assert guarantee == claimed if calibration == "public" else guarantee.epsilon is None


def test_what_is_judged_is_the_file_that_ships_and_never_its_twin(plan, place, clean):
    target, source = plan.cells
    spec = Pgd(radii=("4/255",), steps=1)
    attack = AttackTask(spec, source, False, Transfer(radii=("4/255",), steps=1), (target,), clean)
    (before,) = attack_job(place, attack)
    tensors, texts = load_tensors(place.files.twin(target.key))
    save_tensors(place.files.twin(target.key), {name: -value for name, value in tensors.items()}, texts)
    after = clean_job(place, target)
    difference = next(m.value for m in after.measurements if m.metric == "twin_logit_difference")
    assert difference > 0.01  # the twin is another model now
    assert np.array_equal(after.outcomes[0].logits_NK, clean[target.key])
    (transferred,) = attack_job(place, attack)
    assert np.array_equal(transferred.outcomes[0].logits_NK, before.outcomes[0].logits_NK)


def test_every_interval_is_over_patients(plan, stored, roots, clean):
    """Worked out again from the stored logits with the patients counted off: three images each, in order."""
    patients_N = np.arange(NUM_TEST) // PER_PATIENT
    labels_N = plan.trainings[0].spec.data.load(roots).test.labels_N
    hospitals, of_hospital_N = ("hospital 1", "hospital 2"), patients_N % 2
    together = plan.study.evaluations[1]
    with Store(stored) as store:
        for cell in plan.cells:
            right_N = clean[cell.key].argmax(1) == labels_N
            found = store.evaluation(evaluation_key(cell.key, Clean())).measurements
            assert found[0].metric == "accuracy"
            assert found[0][2:4] == share_interval(right_N, patients_N) != share_interval(right_N, np.arange(NUM_TEST))
            expected = clean_measurements(clean[cell.key], labels_N, patients_N, of_hospital_N, hospitals, 0)
            assert found[: len(expected)] == tuple(expected)
            attacks = [evaluation_key(cell.key, spec) for spec in together.attacks]
            for key in (*attacks, evaluation_key(cell.key, together, ["worst"])):
                (outcome,) = store.outcomes(key)
                judged = (outcome.logits_NK, clean[cell.key], labels_N, patients_N, 4 / 255, None, 0)
                assert store.evaluation(key).measurements == tuple(robust_measurements(*judged))


def test_a_checkpoint_made_on_other_images_is_not_resumed(roots, tmp_path, monkeypatch):
    """The store's own check of the data comes before; a checkpoint may have been copied there."""
    names = [f"{split}/{kind}/{i}.png" for split in ("train", "test") for kind in ("a", "b") for i in range(12)]
    write_images(tmp_path / "images", names)
    study = write_study(tmp_path, SMALLEST.replace('"by_site"', '"iid"'))
    plan = plan_of(study, f'base.data={{kind="folder", path="{tmp_path}/images", size=16}}', "base.rounds=2")
    (training,), place = plan.trainings, Workplace(tmp_path / "store", roots, "cpu", 1, os.getpid())

    def dies(federation, state):
        if state.round == 1:
            raise Failure("the machine", "lost its power", "Wait")
        return run_round(federation, state)

    with monkeypatch.context() as patched:
        patched.setattr(train_job, "run_round", dies)
        with pytest.raises(Failure, match="lost its power"):
            train_job.train_job(place, training)
    checkpoint = place.files.checkpoint(training.key)
    before = checkpoint.read_bytes()
    write_image(tmp_path / "images" / names[0], seed=999)
    monkeypatch.setattr("trilemma.study.workplace._LOADED", {})  # as in a new process
    with pytest.raises(Failure, match="made on other images") as caught:
        train_job.train_job(place, training)
    assert str(checkpoint) in caught.value.where and checkpoint.read_bytes() == before
    write_image(tmp_path / "images" / names[0], seed=0)  # the data are put back
    monkeypatch.setattr("trilemma.study.workplace._LOADED", {})
    assert [row["round"] for row in train_job.train_job(place, training).history] == [1, 2]


def test_latency_is_measured_one_file_at_a_time_with_nothing_beside_it(plan, place, roots, monkeypatch):
    """Other jobs may run in two processes; a cost job runs in this one, and when no other is under way."""
    under_way, seen = [], []

    def watched(jobs, *arguments):
        under_way.append({job.function for job in jobs})
        yield from run_jobs(jobs, *arguments)
        under_way.pop()

    def timed(*arguments):  # another process would not come by here
        seen.append((list(under_way), threading.get_ident()))
        return cost_measurements(*arguments)

    monkeypatch.setattr(engine, "run_jobs", watched)
    monkeypatch.setattr(evaluate_job, "cost_measurements", timed)
    # One attack, so that it needs no worker process, and two costs.
    wanted = (Cost(repeats=5), Fgsm(radii=("1/255",)), Cost(repeats=6))
    run_plan(replace(plan, cells=plan.cells[:1], evaluations=wanted), place.folder, roots, jobs=2)
    with Store(place.folder) as store:
        assert all(store.evaluation(evaluation_key(plan.cells[0].key, spec)) for spec in wanted)
    assert seen == [([{cost_job}], threading.get_ident())] * 2


@pytest.fixture
def _one_thread_after():
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("_one_thread_after")
def test_latency_is_that_of_one_thread_whatever_the_other_jobs_have(plan, place, monkeypatch):
    asked = []

    def noted(path, threads):
        asked.append(threads)
        return open_model(path, threads)

    monkeypatch.setattr(evaluate_job, "open_model", noted)
    wide = replace(place, threads=2)
    clean_job(wide, plan.cells[0])
    cost_job(wide, plan.cells[0], Cost(repeats=5))
    assert asked == [2, 1]


def test_another_seed_starts_an_attack_elsewhere(plan, place, clean, tmp_path):
    """The same weights under two seeds: only the random start can differ."""
    other = plan_of(write_study(tmp_path, STUDY), "seeds=[1]")
    first, second, files = plan.cells[0], other.cells[0], place.files
    shutil.copy(files.weights(first.training.key), files.weights(second.training.key))
    for path in (StoreFiles.model, StoreFiles.twin):
        shutil.copy(path(files, first.key), path(files, second.key))
    spec, rows = Pgd(radii=("8/255",), steps=2, step_size=0.1), []
    for cell in (first, second, first):
        rows += attack_job(place, AttackTask(spec, cell, True, None, (), {cell.key: clean[first.key]}))
    logits = [row.outcomes[0].logits_NK for row in rows]
    pictures = [[example.adversarial_png for example in row.examples] for row in rows]
    assert np.array_equal(logits[0], logits[2]) and not np.array_equal(logits[0], logits[1])
    assert pictures[0] and pictures[0] == pictures[2] != pictures[1]
