"""Early stopping: which round becomes the model, when a training ends, what resuming changes, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.small_problem import stripes
from helpers.tiny_federation import CPU, DP, equal_states, tiny_dataset, tiny_federation, tiny_spec, trained_state
from trilemma.attacks.evasion.specs import Apgd
from trilemma.errors import UserError
from trilemma.federation.early_stopping import ended, look_attack, robust_shares
from trilemma.federation.local_training import load_model
from trilemma.federation.pretraining import refuse_unfit
from trilemma.federation.round import run_round
from trilemma.federation.specs import TrainSpec
from trilemma.federation.state import TrainingState
from trilemma.federation.training import guarantee, initial_state, prepare, trained_model
from trilemma.models.vector import get_buffers, get_params
from trilemma.study.files import load_tensors, save_tensors

LOOK = {"attack": {"kind": "pgd", "radius": "4/255", "steps": 2}}
DEFENCE = {"kind": "fgsm", "radius": "4/255"}
HOW = {"data": {"kind": "phantom", "seed": 7}, "epochs": 1}
#: Learns fast and overshoots, so that the last round is not the best.
WILD = {"local": {"batch_size": 16, "steps": 1, "learning_rate": 0.3}, "rounds": 10}


def rounds_of(federation, state=None):
    """Every state of a training, from the first on."""
    states = [state or initial_state(federation)]
    while not ended(federation.spec, states[-1]):
        states.append(run_round(federation, states[-1]))
    return states


def looks_of(states, measure="accuracy"):
    return [row.get(f"robust_val_{measure}") for row in states[-1].history]


def public_dataset(num_classes=3):
    drawn = tiny_dataset(296, num_classes=num_classes)
    index = np.arange(200, 296)
    val = stripes(48, num_classes=num_classes, size=8, seed=9)
    return replace(drawn, name="public stripes", train=drawn.train.subset(index), val=val)


BATCH_NORM = {"model": {"kind": "resnet9", "width": 4, "norm": "batch"}, "seed": 1}


@pytest.mark.parametrize("changes", [{}, {"averaging": {"decay": 0.5}}, BATCH_NORM], ids=str)
def test_the_model_is_the_best_look_and_the_rounds_are_those_without(changes):
    dataset = tiny_dataset()
    stopping = tiny_federation(dataset, **WILD, **changes, early_stopping=LOOK)
    states, plain = rounds_of(stopping), rounds_of(tiny_federation(dataset, **WILD, **changes))
    values = looks_of(states)
    best = max(range(10), key=lambda index: (values[index], index))
    assert 0 < best < 9, "choose another setting: the first or last round is the best"
    for one, other in zip(states, plain, strict=True):
        assert torch.equal(one.params_P, other.params_P) and torch.equal(one.latest_P, other.model_P)
        assert torch.equal(one.latest_Q, other.model_Q)
    chosen = plain[best + 1]  # states[0] is the initial one
    assert torch.equal(states[-1].model_P, chosen.model_P) and torch.equal(states[-1].model_Q, chosen.model_Q)
    assert not torch.equal(states[-1].model_P, states[-1].latest_P)
    model = trained_model(stopping, states[-1])
    assert torch.equal(get_params(model), chosen.model_P) and torch.equal(get_buffers(model), chosen.model_Q)
    for state, value in zip(states[1:], values, strict=True):  # what a row says holds for the round's own weights
        load_model(stopping.classifier, state.latest_P, state.latest_Q)
        assert robust_shares(stopping.classifier, dataset.val, *look_attack(stopping.spec), 0).accuracy == value


def test_before_the_first_look_the_model_is_the_latest():
    federation = tiny_federation(rounds=4, early_stopping={**LOOK, "every": 3})
    states = rounds_of(federation)
    assert [value is not None for value in looks_of(states)] == [False, False, True, True]  # the last round too
    assert all(torch.equal(state.model_P, state.params_P) and state.best_P is None for state in states[:3])
    assert states[3].best_P is not None
    assert "robust_val_balanced_accuracy" in states[3].history[2]


def history(values):
    return tuple({"round": i + 1, "robust_val_accuracy": v} for i, v in enumerate(values))


def state_with(values, rounds=None):
    nothing = torch.zeros(1)
    return TrainingState(len(values) if rounds is None else rounds, nothing, nothing, {}, history=history(values))


@pytest.mark.parametrize(
    ("values", "over"),
    [
        ([], False),
        ([0.5], False),
        ([0.5, 0.4], False),
        ([0.5, 0.4, 0.4], True),
        ([0.5, 0.4, 0.6], False),
        ([0.5, 0.5, 0.5], True),  # as high is no higher
        ([0.0, 0.0, 0.0], True),
        ([0.5, 0.4, 0.6, 0.5, 0.6], True),
        ([0.5, None, None, 0.4], False),  # rounds without a look
        ([0.5, None, 0.4, None, 0.3], True),
    ],
)
def test_patience(values, over):
    spec = tiny_spec(rounds=50, early_stopping={**LOOK, "patience": 2})
    assert ended(spec, state_with(values)) == over
    assert ended(spec, state_with(values, rounds=50))
    assert not ended(tiny_spec(rounds=50, early_stopping=LOOK), state_with(values))
    assert not ended(tiny_spec(rounds=50), state_with(values))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=1, max_size=12), st.integers(1, 4))
def test_patience_is_counted_as_one_would_by_hand(values, patience):
    spec = tiny_spec(rounds=50, early_stopping={**LOOK, "patience": patience})
    highest, waited, over = -1.0, 0, False
    for value in values:
        highest, waited = (value, 0) if value > highest else (highest, waited + 1)
        over = waited >= patience
    assert ended(spec, state_with(values)) == over


def test_an_impatient_training_ends_early_and_keeps_its_best():
    dataset = tiny_dataset()
    patient = rounds_of(tiny_federation(dataset, **{**WILD, "rounds": 12}, early_stopping=LOOK))
    states = rounds_of(tiny_federation(dataset, **{**WILD, "rounds": 12}, early_stopping={**LOOK, "patience": 2}))
    values = looks_of(states)
    assert len(states) < len(patient) and values == looks_of(patient)[: len(values)]
    assert len(states[-1].history) == states[-1].round == len(values)
    assert values.index(max(values)) == len(values) - 3
    assert ended(tiny_spec(rounds=12, early_stopping={**LOOK, "patience": 2}), states[-1])


@pytest.mark.parametrize("moment", [0, 1, 2, 7, 9])
def test_resumed_from_a_file_it_is_the_undisturbed_training(moment, tmp_path: Path):
    dataset = tiny_dataset()
    changes = {**WILD, "early_stopping": {**LOOK, "every": 2}, "averaging": {"decay": 0.5}, "defence": DEFENCE}
    undisturbed = rounds_of(tiny_federation(dataset, **changes))
    tensors, texts = undisturbed[moment].pack()
    save_tensors(tmp_path / "state", tensors, texts)
    unpacked = TrainingState.unpack(*load_tensors(tmp_path / "state"), CPU)
    assert (unpacked.best_P is None) == (moment < 2)
    again = rounds_of(tiny_federation(dataset, **changes), unpacked)
    assert equal_states(again[-1], undisturbed[-1]) and "best" in again[-1].pack()[0]
    assert torch.equal(again[-1].model_P, undisturbed[-1].model_P)


def test_without_it_a_state_holds_nothing_of_it():
    federation = tiny_federation()
    state = trained_state(federation)
    assert state.best_P is None and "best" not in state.pack()[0]
    assert not any(name.startswith("robust") for row in state.history for name in row)


def test_looks_draw_the_same_and_change_no_round():
    federation = tiny_federation(early_stopping=LOOK, defence=DEFENCE)
    start = initial_state(federation)
    one = run_round(federation, start)
    torch.rand(5)
    assert equal_states(one, run_round(federation, start))


def test_the_defences_radius_is_the_default():
    spec = tiny_spec(early_stopping={}, defence={"kind": "trades", "norm": "l2", "radius": 0.3, "warmup": 0.5})
    evasion, budget = look_attack(spec)
    assert (budget.norm, budget.radius) == ("l2", 0.3) and evasion.keywords["steps"] == 10
    chosen = tiny_spec(early_stopping={"attack": {"kind": "apgd", "radius": 0.1, "steps": 3}}, defence=DEFENCE)
    assert isinstance(chosen.early_stopping.attack, Apgd) and look_attack(chosen)[1].radius == 0.1
    free_choice = {"kind": "adversarial", "attack": {"kind": "fgsm", "radius": 0.2}}
    assert look_attack(tiny_spec(early_stopping={}, defence=free_choice))[1].radius == 0.2


def test_a_constant_predictor_leads_by_accuracy_alone():
    federation = tiny_federation(defence=DEFENCE, early_stopping={"measure": "balanced_accuracy"})
    few = np.flatnonzero(stripes(200, size=8).labels_N != 0)[:20]
    many = np.flatnonzero(stripes(200, size=8).labels_N == 0)[:60]
    records = stripes(200, size=8).subset(np.concatenate([many, few]))
    with torch.no_grad():
        head = federation.classifier.module.linear
        head.weight.zero_()
        head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    shares = robust_shares(federation.classifier, records, *look_attack(federation.spec), 0)
    assert shares == (0.75, pytest.approx(1 / 3))


def test_both_measures_stand_in_the_rows_and_the_named_one_decides():
    dataset = tiny_dataset()
    federation = tiny_federation(dataset, **WILD, early_stopping={**LOOK, "measure": "balanced_accuracy"})
    states = rounds_of(federation)
    values = looks_of(states, "balanced_accuracy")
    best = max(range(10), key=lambda index: (values[index], index))
    assert torch.equal(states[-1].model_P, states[best + 1].latest_P)
    assert values != looks_of(states)


def test_an_image_that_is_wrong_unattacked_does_not_count():
    federation = tiny_federation(early_stopping=LOOK)
    x, y = federation.val.x(), federation.val.y()
    healing = lambda classifier, x_BCHW, *_: torch.zeros_like(x_BCHW)  # noqa: E731 - an attack that makes all alike
    with torch.no_grad():
        answers = federation.classifier.eval()(x).argmax(1)
        blank = int(federation.classifier(torch.zeros_like(x[:1])).argmax())
    shares = robust_shares(federation.classifier, federation.val, healing, look_attack(federation.spec)[1], 0)
    assert shares.accuracy == pytest.approx(float(((answers == y) & (y == blank)).double().mean()))


def test_public_images_choose_a_private_model_at_no_cost():
    dataset, public = tiny_dataset(), public_dataset()
    changes = {"privacy": DP, "pretraining": HOW, "rounds": 3, "defence": DEFENCE}
    spec = tiny_spec(**changes, early_stopping={"split": "public"})
    federation = prepare(spec, dataset, CPU, public)
    assert federation.looked_at is public.val
    (*_, state) = rounds_of(federation, initial_state(federation, public))
    plain = tiny_federation(dataset, **changes)
    other = trained_state(plain, state=initial_state(plain, public))
    assert state.private_steps == other.private_steps
    assert guarantee(federation, state).epsilon_by_client == guarantee(plain, other).epsilon_by_client
    load_model(federation.classifier, state.model_P, state.model_Q)
    best = robust_shares(federation.classifier, public.val, *look_attack(spec), 0).accuracy
    assert best == max(looks_of([state]))


def test_public_looks_need_the_public_images():
    spec = tiny_spec(pretraining=HOW, early_stopping={"split": "public"}, defence=DEFENCE)
    federation = prepare(spec, tiny_dataset(), CPU)  # enough to check it
    with pytest.raises(ValueError, match="needs them: prepare"):
        run_round(federation, initial_state(federation, public_dataset()))


def test_public_images_that_cannot_be_looked_at_are_refused():
    dataset, public = tiny_dataset(), public_dataset()
    refuse_unfit(dataset, public, looked_at=True)
    refuse_unfit(dataset, public_dataset(num_classes=2))
    with pytest.raises(UserError, match="2 classes, and those of stripes have 3"):
        refuse_unfit(dataset, public_dataset(num_classes=2), looked_at=True)
    images = public.val.images_NCHW.copy()
    images[5] = dataset.test.images_NCHW[3]
    mixed = replace(public, val=replace(public.val, images_NCHW=images))
    refuse_unfit(dataset, mixed)
    with pytest.raises(UserError, match="1 validation images of public stripes are test images of stripes"):
        refuse_unfit(dataset, mixed, looked_at=True)


def test_a_split_without_images_is_refused():
    dataset = tiny_dataset()
    empty = replace(dataset, val=dataset.val.subset(np.arange(0)))
    with pytest.raises(UserError, match="stripes has no validation images"):
        tiny_federation(empty, early_stopping=LOOK)
    tiny_federation(empty)


PUBLIC = {"pretraining": HOW, "defence": DEFENCE}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"early_stopping": {}}, "there is none; give it an attack"),
        ({"early_stopping": {}, "defence": {"kind": "pgd", "radius": 0}}, "there is none; give it an attack"),
        ({"early_stopping": {"split": "public"}, "defence": DEFENCE}, "give pretraining"),
        ({"early_stopping": LOOK, "data": {"kind": "phantom", "evaluate_on": "val"}}, "the very images"),
        ({"early_stopping": LOOK, "privacy": DP}, "private images.*fix the rounds and use averaging.*'public'"),
        ({"early_stopping": {**LOOK, "patience": 2}, "privacy": DP}, "private images"),
        ({"early_stopping": {"split": "public", "patience": 2}, "privacy": DP, **PUBLIC}, "leave patience out"),
        ({"early_stopping": {"attack": {"kind": "square", "radius": 0.1}}}, "is for finished models"),
        ({"early_stopping": {"attack": {"kind": "pgd", "radii": [0.1, 0.2]}}}, "has 2 radii here"),
        ({"early_stopping": {**LOOK, "every": 0}}, "greater than or equal to 1"),
        ({"early_stopping": {**LOOK, "patience": 0}}, "greater than or equal to 1"),
        ({"early_stopping": {**LOOK, "split": "test"}}, "'val' or 'public'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_spec(**changes)


def test_what_can_be_is_not():
    tiny_spec(early_stopping={"split": "public", "patience": 2}, **PUBLIC)
    tiny_spec(early_stopping={"split": "public"}, privacy=DP, **PUBLIC)
    tiny_spec(early_stopping={"split": "public"}, data={"kind": "phantom", "evaluate_on": "val"}, **PUBLIC)
    assert "early_stopping" not in tiny_spec().model_dump(mode="json")
    named = [
        tiny_spec(early_stopping=stopping, **PUBLIC).early_stopping.label
        for stopping in ({}, LOOK, {"patience": 3, "every": 5, "split": "public", "measure": "balanced_accuracy"})
    ]
    assert named == [
        "best round on val",
        "best round on val under PGD-2 Linf 4/255",
        "best balanced round on public every 5 rounds, patience 3",
    ]
    spec = tiny_spec(early_stopping=LOOK)
    assert TrainSpec.model_validate(spec.model_dump(mode="json")) == spec
