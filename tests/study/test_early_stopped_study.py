"""A study whose trainings stop early: what is stored, resumed after a kill, and refused before anything is trained."""

import os
import re
from dataclasses import replace

import pytest
import torch

from helpers.tiny_study import SMALLEST, plan_of, rows_of, run_plan, write_study
from trilemma.errors import Failure, UserError
from trilemma.federation.early_stopping import ended
from trilemma.federation.round import run_round
from trilemma.federation.training import initial_state, prepare
from trilemma.report.tables import training_table
from trilemma.results import Results
from trilemma.study import train_job
from trilemma.study.assemble import assemble
from trilemma.study.facts import prepare_all
from trilemma.study.files import StoreFiles, load_tensors
from trilemma.study.store import Store
from trilemma.study.workplace import Workplace

LONG = SMALLEST.replace("base.rounds = 1", "base.rounds = 8")
STOPPING = (
    LONG
    + """
base.defence = { kind = "nfgsm", radius = "4/255", schedule = [[0, 0], [0.5, 1]] }
base.early_stopping = { patience = 2, attack = { kind = "pgd", radius = "4/255", steps = 2 } }
"""
)
PUBLIC = (
    LONG
    + """
base.defence = { kind = "mart", radius = "4/255", steps = 1 }
base.early_stopping = { split = "public", every = 3 }
base.pretraining.data = { kind = "phantom", size = 16, train = 40, val = 8, test = 8, sites = 1, classes = 2, seed = 5 }
base.pretraining.epochs = 1
base.pretraining.defence = { kind = "fgsm" }
base.privacy = { kind = "dp_sgd", noise_multiplier = 2.0, delta = 1e-3 }
"""
)


@pytest.fixture(scope="module", params=[STOPPING, PUBLIC], ids=["val", "public"])
def case(request, tmp_path_factory, roots):
    """A plan, and the store of its undisturbed run."""
    folder = tmp_path_factory.mktemp("stopping")
    plan = plan_of(write_study(folder, request.param))
    run_plan(plan, folder / "store", roots)
    return plan, folder / "store"


def test_what_is_stored_is_the_best_round(case, roots):
    plan, stored = case
    (training,) = plan.trainings
    spec = training.spec
    public = spec.pretraining.data.load(roots) if spec.pretraining else None
    federation = prepare(spec, spec.data.load(roots), torch.device("cpu"), public)
    state = initial_state(federation, public)
    while not ended(spec, state):
        state = run_round(federation, state)
    tensors, _ = load_tensors(StoreFiles(stored).weights(training.key))
    assert torch.equal(tensors["params"], state.model_P) and torch.equal(state.model_P, state.best_P)
    with Store(stored) as store:
        run = store.run(training.key)
    assert [row["round"] for row in run.history if "robust_val_accuracy" in row] == (
        [3, 6, 8] if public else list(range(1, state.round + 1))
    )
    assert len(run.history) == state.round and (state.round < 8) == (public is None)


def test_the_report_says_which_round_was_chosen(case):
    plan, stored = case
    with Store(stored) as store:
        (run,) = assemble(plan, store, "", "").runs
        history = store.run(run.key).history
    looks = {row["round"]: row["robust_val_accuracy"] for row in history if "robust_val_accuracy" in row}
    assert run.chosen_round == max(looks, key=lambda number: (looks[number], number))
    assert not any(name.startswith("robust_val_") for row in run.history for name in row)
    table = training_table(Results("", "", "", (0,), (), (run,), (), ()))
    assert re.findall("<th[^>]*>chosen</th>", table)
    assert [re.sub("<[^>]+>", "", cell) for cell in re.findall("<td.*?</td>", table)][2] == str(run.chosen_round)
    without = training_table(Results("", "", "", (0,), (), (replace(run, chosen_round=None),), (), ()))
    assert "chosen</th>" not in without


@pytest.mark.parametrize("stop", [1, 2])
def test_killed_it_goes_on_bit_for_bit(stop, case, roots, tmp_path, monkeypatch):
    plan, stored = case
    (training,) = plan.trainings
    stopped = []

    def dies(federation, state):
        if state.round == stop and not stopped:
            stopped.append(1)
            raise Failure("the machine", "lost its power", "Wait")
        return run_round(federation, state)

    monkeypatch.setattr(train_job, "run_round", dies)
    with pytest.raises(Failure, match="lost its power"):
        run_plan(plan, tmp_path, roots)
    run_plan(plan, tmp_path, roots)
    assert stopped and rows_of(tmp_path)["runs"] == rows_of(stored)["runs"]
    weights = [StoreFiles(folder).weights(training.key).read_bytes() for folder in (tmp_path, stored)]
    assert weights[0] == weights[1]


def test_public_images_of_other_classes_are_refused_before_anything_is_trained(roots, tmp_path):
    plan = plan_of(write_study(tmp_path, PUBLIC.replace("classes = 2, seed = 5", "classes = 3, seed = 5")))
    with pytest.raises(UserError, match="3 classes, and those of") as caught:
        prepare_all(plan, Workplace(tmp_path, roots, "cpu", 1, os.getpid()))
    assert caught.value.where == "early_stopping.split"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('base.defence={kind="free"}', "free adversarial training"),
        ('base.privacy={kind="dp_sgd",epsilon=8.0,delta=1e-3}', "chooses the model by private images"),
        ('base.defence={kind="adversarial",attack={kind="square",radius=0.1}}', "is for finished models"),
        ('base.defence={kind="pgd",schedule=[[0,0],[0.5,0.5]]}', "reach the whole radius"),
    ],
)
def test_a_file_that_cannot_be_is_refused_with_its_reason(override, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        plan_of(write_study(tmp_path, STOPPING), override)
    assert "study.toml: base" in caught.value.where
