"""Better initial weights from public images: what is trained, what is kept of it, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.tiny_federation import CPU, DP, equal_states, tiny_dataset, tiny_federation, tiny_spec, trained_state
from trilemma.attacks.evasion.specs import Pgd
from trilemma.errors import UserError
from trilemma.federation import pretraining
from trilemma.federation.early_stopping import robust_shares
from trilemma.federation.local_training import mean_gradient
from trilemma.federation.pretraining import pretrain, refuse_unfit, transfer
from trilemma.federation.round import run_round, watch
from trilemma.federation.specs import Pretraining, TrainSpec
from trilemma.federation.training import guarantee, initial_state, trained_model
from trilemma.models.specs import Resnet9, Resnet18
from trilemma.models.vector import get_buffers, get_params
from trilemma.randomness import generator
from trilemma.robustness.objectives import standard
from trilemma.robustness.specs import FgsmTraining

HOW = {"data": {"kind": "phantom", "seed": 7}, "epochs": 4, "optimizer": "adam", "learning_rate": 0.01}


def public_dataset(num_images=160, **changes):
    """Other stripes than the study's."""
    drawn = tiny_dataset(num_images + 200, **changes)
    return replace(drawn, name="public stripes", train=drawn.train.subset(np.arange(200, 200 + num_images)))


def start(public=None, dataset=None, **changes):
    federation = tiny_federation(dataset, pretraining={**HOW, **changes.pop("how", {})}, **changes)
    return federation, initial_state(federation, public or public_dataset())


def fresh(num_classes=3, seed=0, **model):
    return Resnet9(width=4, **model).make(1, 8, num_classes, seed)


def test_one_step_by_hand():
    how = {"epochs": 1, "optimizer": "sgd", "momentum": 0, "learning_rate": 0.3, "batch_size": 160}
    public = public_dataset()
    _, state = start(public, how=how)
    model = fresh().train()
    gradient_P, _ = mean_gradient(model, standard(), public.train.x(), public.train.y(), torch.Generator())
    assert torch.allclose(state.params_P, get_params(model) - 0.3 * gradient_P, atol=1e-5)
    assert not torch.allclose(state.params_P, get_params(model), atol=1e-3)


def test_it_makes_better_initial_weights():
    federation, state = start()
    before = watch(trained_model(federation, initial_state(tiny_federation())), federation.val)["val_accuracy"]
    after = watch(trained_model(federation, state), federation.val)["val_accuracy"]
    assert before < 0.6 and after > 0.9
    assert state.round == 0 and state.history == () and state.seconds > 0
    assert run_round(federation, state).seconds > state.seconds


@pytest.mark.parametrize("norm", ["group", "weight", "batch"])
def test_it_depends_on_the_seed_the_images_and_nothing_else(norm):
    model = {"kind": "resnet9", "width": 4, "norm": norm}
    how = {"augmentation": {"shift": 1, "flip": True, "multiplicity": 2}, "epochs": 1}
    _, one = start(how=how, model=model)
    torch.rand(3)
    # Neither the hospitals' images nor how they train.
    other_images = tiny_dataset(60)
    _, again = start(dataset=other_images, how=how, model=model, rounds=5, local={"batch_size": 8})
    assert torch.equal(one.params_P, again.params_P) and torch.equal(one.buffers_Q, again.buffers_Q)
    _, seed = start(how=how, model=model, seed=1)
    _, images = start(public_dataset(150), how=how, model=model)
    _, order = start(how={**how, "batch_size": 32}, model=model)
    for other in (seed, images, order):
        assert not torch.equal(other.params_P, one.params_P)


def test_a_training_without_it_is_what_it_was():
    dataset = tiny_dataset()
    assert torch.equal(initial_state(tiny_federation(dataset)).params_P, get_params(fresh()))
    federation, state = start(dataset=dataset)
    plain, pretrained = trained_state(tiny_federation(dataset)), trained_state(federation, state=state)
    assert not torch.equal(plain.params_P, pretrained.params_P)
    for unlike, public in ((tiny_federation(dataset), public_dataset()), (federation, None)):
        with pytest.raises(ValueError, match="starts from that data set"):
            initial_state(unlike, public)


def test_preparing_trains_nothing():
    federation = tiny_federation(pretraining=HOW)
    assert torch.equal(get_params(federation.classifier), get_params(fresh()))


def test_a_resumed_training_is_the_undisturbed_one():
    dataset = tiny_dataset()
    federation, state = start(dataset=dataset, averaging={"decay": 0.9})
    tensors, texts = state.pack()
    resumed = tiny_federation(dataset, pretraining=HOW, averaging={"decay": 0.9})
    unpacked = type(state).unpack(tensors, texts, CPU)
    assert unpacked.pretraining_seconds == state.pretraining_seconds
    assert equal_states(trained_state(federation, state=state), trained_state(resumed, state=unpacked))


def head_and_body(classifier):
    named = dict(classifier.named_parameters())
    head = [named.pop("module.linear.weight"), named.pop("module.linear.bias")]
    return [torch.cat([value.detach().flatten() for value in part]) for part in (head, named.values())]


@pytest.mark.parametrize("num_classes", [2, 3])
def test_another_number_of_classes_costs_the_last_layer_and_nothing_else(num_classes):
    federation = tiny_federation(pretraining=HOW)
    pretrain(federation.spec, public_dataset(num_classes=num_classes), federation.classifier)
    head, body = head_and_body(federation.classifier)
    first_head, first_body = head_and_body(fresh())
    assert torch.equal(head, first_head) == (num_classes == 2)
    assert not torch.isclose(body, first_body).all()
    state = initial_state(tiny_federation(pretraining=HOW), public_dataset(num_classes=num_classes))
    assert torch.equal(state.params_P, get_params(federation.classifier))


def test_everything_but_the_last_layer_is_copied_and_buffers_too():
    source, target = fresh(2, seed=1, norm="batch").train(), fresh(3, norm="batch")
    source(public_dataset(num_classes=2).train.x(slice(0, 20)))  # moves the statistics and their counters
    counters = [value.clone() for name, value in target.state_dict().items() if "num_batches" in name]
    transfer(source, target)
    assert torch.equal(head_and_body(target)[1], head_and_body(source)[1])
    assert torch.equal(get_buffers(target), get_buffers(source)) and get_buffers(target).abs().sum() > 0
    left = [value for name, value in target.state_dict().items() if "num_batches" in name]
    assert counters and all(torch.equal(one, other) for one, other in zip(counters, left, strict=True))


@pytest.mark.parametrize(
    "source",
    [
        Resnet9(width=4).make(3, 8, 3, 0),
        Resnet9(width=4).make(3, 8, 2, 0),
        Resnet9(width=8).make(1, 8, 3, 0),
        Resnet18(width=4).make(1, 8, 3, 0),
    ],
    ids=["channels", "channels and classes", "width", "kind"],
)
def test_another_network_is_refused(source):
    target = fresh()
    before = get_params(target)
    with pytest.raises(UserError, match="the study's own images"):
        transfer(source, target)
    assert torch.equal(get_params(target), before)


def test_images_that_do_not_fit_are_refused():
    dataset = tiny_dataset()
    refuse_unfit(dataset, public_dataset())
    refuse_unfit(dataset, public_dataset(num_classes=2))
    with pytest.raises(UserError, match="16 pixels a side, and those of stripes have 8"):
        refuse_unfit(dataset, public_dataset(size=16))
    coloured = replace(dataset, train=replace(dataset.train, images_NCHW=dataset.train.images_NCHW.repeat(3, 1)))
    with pytest.raises(UserError, match="1 channels, and those of stripes have 3"):
        refuse_unfit(coloured, public_dataset())


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_studys_own_images_are_not_public(split):
    dataset, public = tiny_dataset(), public_dataset()
    images = public.train.images_NCHW.copy()
    images[17] = getattr(dataset, split).images_NCHW[3]
    for studied in (dataset, dataset.evaluated_on_validation()):  # the test images are nobody's there either
        with pytest.raises(UserError, match=f"1 training images of public stripes are {split} images of stripes"):
            refuse_unfit(studied, replace(public, train=replace(public.train, images_NCHW=images)))


def test_weights_that_become_infinite_are_refused():
    with pytest.raises(UserError, match="became infinite") as caught:
        start(how={"optimizer": "sgd", "learning_rate": 1e6, "epochs": 2})
    assert caught.value.where == "pretraining.learning_rate"


def test_a_batch_of_one_waits_for_the_next_pass(monkeypatch):
    how = Pretraining(data=tiny_spec().data, epochs=3, batch_size=8)
    parts = list(pretraining._batches(17, how, torch.Generator().manual_seed(0)))
    assert [len(part) for part in parts] == [8, 8] * 3
    assert len({index for part in parts for index in part}) == 17
    parts = list(pretraining._batches(18, how, torch.Generator().manual_seed(0)))
    assert [len(part) for part in parts] == [8, 8, 2] * 3


@pytest.mark.parametrize(
    ("field", "value"), [("epochs", 0), ("batch_size", 1), ("learning_rate", 0), ("data", None), ("steps", 3)]
)
def test_what_cannot_be_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        TrainSpec.model_validate({"pretraining": {**HOW, field: value}})


def test_the_guarantee_says_that_the_public_images_are_not_protected():
    federation, state = start(privacy=DP)
    (said,) = [phrase for phrase in guarantee(federation, state).outside if "public" in phrase]
    assert "the synthetic images of phantom 64" in said and "not protected" in said
    plain = tiny_federation(privacy=DP)
    assert not any("public" in phrase for phrase in guarantee(plain, initial_state(plain)).outside)
    real = {**HOW, "data": {"kind": "medmnist", "name": "breastmnist"}}
    assert federation.spec.pretraining.label == "pretrained on phantom 64 (synthetic)"
    assert tiny_spec(pretraining=real).pretraining.label == "pretrained on breastmnist 28"


def test_an_adversarial_pretraining_is_the_defences_objective_and_draws_its_own():
    how = {"epochs": 1, "optimizer": "sgd", "momentum": 0, "learning_rate": 0.3, "batch_size": 160}
    defence = {"kind": "trades", "radius": 0.1, "steps": 2}
    public = public_dataset()
    federation, state = start(public, how={**how, "defence": defence})
    model, objective = fresh().train(), federation.spec.pretraining.defence.make(0.0)
    draws = generator(0, "pretraining", "defence")
    order = torch.randperm(160, generator=generator(0, "pretraining", "batches")).tolist()
    gradient_P, _ = mean_gradient(model, objective, public.train.x(order), public.train.y(order), draws)
    assert torch.allclose(state.params_P, get_params(model) - 0.3 * gradient_P, atol=1e-5)
    assert not torch.allclose(state.params_P, start(public, how=how)[1].params_P, atol=1e-3)
    assert federation.spec.pretraining.label == "pretrained on phantom 64 (synthetic) by TRADES-2 beta 6 Linf 0.1"


def test_its_radius_grows_over_the_pretraining_alone(monkeypatch):
    moments, real = [], FgsmTraining.make
    monkeypatch.setattr(FgsmTraining, "make", lambda self, progress: moments.append(progress) or real(self, progress))
    start(public_dataset(17), how={"epochs": 3, "batch_size": 8, "defence": {"kind": "fgsm", "warmup": 0.5}})
    assert moments == pytest.approx(np.arange(6) / 6)


@pytest.mark.parametrize("num_records", [16, 17, 18])
def test_steps_are_counted_beforehand(num_records):
    how = Pretraining(data=tiny_spec().data, epochs=3, batch_size=8)
    parts = list(pretraining._batches(num_records, how, torch.Generator().manual_seed(0)))
    assert pretraining._num_steps(num_records, how) == len(parts)


def test_an_adversarial_pretraining_is_free_under_dp_and_makes_the_start_robust():
    defence = {"kind": "pgd", "radius": 0.03, "steps": 3, "warmup": 0.5}
    attack, shares = Pgd(radii=(0.03,), steps=5), {}
    for name, how in {"plain": {}, "adversarial": {"defence": defence}}.items():
        how = {"epochs": 8, "batch_size": 32, "learning_rate": 0.005, **how}
        federation, state = start(how=how, privacy=DP)
        assert state.private_steps == {}
        model = trained_model(federation, state)
        shares[name] = robust_shares(model, federation.val, attack.make(), attack.budgets[0], 0).accuracy
    assert shares["adversarial"] > shares["plain"] + 0.05
