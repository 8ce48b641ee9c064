"""A study that pretrains, averages and copies: what is stored, resumed, shown, booked and refused."""

import io
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

from helpers.pictures import write_image, write_images
from helpers.tiny_study import SMALLEST, plan_of, rows_of, run_plan, write_study
from trilemma.errors import Failure, UserError
from trilemma.federation import training as federated
from trilemma.federation.round import run_round
from trilemma.federation.training import initial_state, prepare
from trilemma.report.export import export_markdown
from trilemma.report.html import report_html
from trilemma.study import train_job
from trilemma.study.assemble import assemble
from trilemma.study.check import check_study
from trilemma.study.files import StoreFiles, load_tensors
from trilemma.study.holdings import release_of
from trilemma.study.store import Store
from trilemma.study.workplace import Workplace

PUBLIC = """
base.averaging = { decay = 0.9 }
base.pretraining.data = { kind = "phantom", size = 16, train = 40, val = 8, test = 8, sites = 1, seed = 5 }
base.pretraining.epochs = 2
"""
STUDY = SMALLEST.replace("base.rounds = 1", "base.rounds = 3").replace(
    "batch_size = 8 ", "batch_size = 8, augmentation = { flip = true, multiplicity = 2 } "
)


def place_in(folder: Path, roots) -> Workplace:
    return Workplace(folder, roots, "cpu", 1, os.getpid())


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_of(write_study(tmp_path_factory.mktemp("study"), STUDY + PUBLIC))


@pytest.fixture(scope="module")
def stored(plan, roots, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    run_plan(plan, folder, roots)
    return folder


def test_what_is_stored_is_the_average_of_a_pretrained_training(plan, stored, roots):
    (training,) = plan.trainings
    spec = training.spec
    federation = prepare(spec, spec.data.load(roots), torch.device("cpu"))
    state = initial_state(federation, spec.pretraining.data.load(roots))
    while state.round < spec.rounds:
        state = run_round(federation, state)
    tensors, _ = load_tensors(StoreFiles(stored).weights(training.key))
    assert torch.equal(tensors["params"], state.model_P) and not torch.equal(state.model_P, state.params_P)
    with Store(stored) as store:
        run = store.run(training.key)
    assert run.history[-1]["val_loss"] == state.history[-1]["val_loss"]
    assert run.seconds > sum(row["seconds"] for row in run.history)


@pytest.mark.parametrize("stop", [0, 2])
def test_killed_it_goes_on_bit_for_bit_and_pretrains_once(stop, plan, stored, roots, tmp_path, monkeypatch):
    (training,) = plan.trainings
    pretrained, real, stopped = [], federated.pretrain, []
    monkeypatch.setattr(federated, "pretrain", lambda *rest: pretrained.append(1) or real(*rest))

    def dies(federation, state):
        if state.round == stop and not stopped:
            stopped.append(1)
            raise Failure("the machine", "lost its power", "Wait")
        return run_round(federation, state)

    monkeypatch.setattr(train_job, "run_round", dies)
    with pytest.raises(Failure, match="lost its power"):
        run_plan(plan, tmp_path, roots)
    run_plan(plan, tmp_path, roots)
    assert len(pretrained) == 1
    assert rows_of(tmp_path)["runs"] == rows_of(stored)["runs"]
    weights = [StoreFiles(folder).weights(training.key).read_bytes() for folder in (tmp_path, stored)]
    assert weights[0] == weights[1]


def test_killed_while_it_pretrains_it_does_so_again(plan, stored, roots, tmp_path, monkeypatch):
    real, calls = federated.pretrain, []

    def dies(*rest):
        real(*rest)
        calls.append(1)
        if len(calls) == 1:
            raise Failure("the machine", "lost its power", "Wait")

    monkeypatch.setattr(federated, "pretrain", dies)
    with pytest.raises(Failure, match="lost its power"):
        run_plan(plan, tmp_path, roots)
    run_plan(plan, tmp_path, roots)
    assert len(calls) == 2 and rows_of(tmp_path)["runs"] == rows_of(stored)["runs"]


def test_a_check_shows_the_public_images_and_trains_nothing(plan, roots, tmp_path, monkeypatch):
    monkeypatch.setattr(federated, "pretrain", lambda *_: pytest.fail("it pretrains"))
    shown = io.StringIO()
    check_study(plan, tmp_path, roots, Console(file=shown, width=300))
    after = shown.getvalue().partition("For pretraining")[2]
    assert "phantom" in after and "(synthetic images)" in after and "40 train" in after


def test_the_report_and_its_exports_say_what_it_pretrained_on(plan, stored, tmp_path):
    with Store(stored) as store:
        results = assemble(plan, store, "", "")
    (public,) = results.public
    assert public.synthetic and public.name.endswith("for pretraining") and len(results.data) == 1
    export_markdown(results, tmp_path / "table.md")
    assert f"{public.name} (SYNTHETIC images, not taken of patients)" in (tmp_path / "table.md").read_text()
    assert public.name in report_html(results)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["size=32"], "have 32 pixels a side"),
        (["seed=0", "sites=2", "train=24"], "are train images of"),
    ],
)
def test_unfit_images_are_refused_before_anything_is_trained(changes, words, roots, tmp_path):
    study = write_study(tmp_path, STUDY + PUBLIC)
    plan = plan_of(study, *(f"base.pretraining.data.{change}" for change in changes))
    with pytest.raises(UserError, match=words):
        check_study(plan, tmp_path, roots, Console(file=io.StringIO()))
    with pytest.raises(UserError, match=words):
        run_plan(plan, tmp_path / "store", roots)
    assert not rows_of(tmp_path / "store")["runs"]


def test_changed_public_images_are_refused_and_another_release(roots, tmp_path, monkeypatch):
    names = [f"{split}/{kind}/{i}.png" for split in ("train", "test") for kind in ("a", "b") for i in range(12)]
    write_images(tmp_path / "images", names)
    folder = f'base.pretraining={{epochs=1, data={{kind="folder", path="{tmp_path}/images", size=16}}}}'
    plan = plan_of(write_study(tmp_path, SMALLEST), folder)
    (training,) = plan.trainings
    run_plan(plan, tmp_path / "store", roots)
    place = place_in(tmp_path / "store", roots)
    dataset = place.dataset(training.spec.data)
    before = release_of(place, training, dataset)
    assert release_of(place, training, dataset) == before
    write_image(tmp_path / "images" / names[0], seed=999)
    monkeypatch.setattr("trilemma.study.holdings._FINGERPRINTS", {})  # as in a new process
    assert release_of(place, training, dataset) != before
    with pytest.raises(Failure, match="have changed"):
        run_plan(plan, tmp_path / "store", roots)
