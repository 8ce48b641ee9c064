"""What every inference-time attack promises, on every kind of model, norm and image."""

import functools
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from helpers.small_problem import stripes, trained
from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion import autoattack
from trilemma.attacks.evasion.specs import (
    Apgd,
    AutoAttack,
    CarliniWagner,
    DeepFool,
    EvasionSpec,
    Fab,
    Fgsm,
    HopSkipJump,
    MiFgsm,
    Pgd,
    Square,
)
from trilemma.attacks.evasion.types import Access
from trilemma.models.specs import Monai, Resnet9, Resnet18
from trilemma.models.vector import get_buffers, get_params

R = (0.5,)  # no radius of a spec is looked at here: budgets are handed in
ATTACKS = [
    Fgsm(radii=R),
    Fgsm(radii=R, random_start=True),
    Pgd(radii=R, steps=3),
    Pgd(radii=R, steps=2, restarts=2, loss="margin", step_size=0.8),
    Pgd(radii=R, steps=3, momentum=0.9),
    MiFgsm(radii=R, steps=3),
    Apgd(radii=R, steps=5),
    Apgd(radii=R, steps=5, restarts=2, loss="dlr"),
    Apgd(radii=R, steps=5, loss="margin", num_targets=2),
    DeepFool(radii=R, steps=5),
    CarliniWagner(radii=R, steps=4, searches=2),
    Fab(radii=R, steps=4),
    Fab(radii=R, steps=4, restarts=2, num_targets=2),
    Square(radii=R, queries=20),
    HopSkipJump(radii=R, queries=100),
    AutoAttack(radii=R, effort="quick"),
]
#: Without a random number at all.
DETERMINISTIC = [spec for spec in ATTACKS if spec.kind in ("deepfool", "carlini_wagner") or spec == Fgsm(radii=R)]
DETERMINISTIC += [spec for spec in ATTACKS if spec.kind == "mifgsm" or spec == Fab(radii=R, steps=4)]
MODELS = {
    "resnet9": Resnet9(width=4),
    "resnet9_batch": Resnet9(width=4, norm="batch"),
    "resnet18_small": Resnet18(width=4),
    "resnet18_large": Resnet18(width=4, stem="large"),
    "densenet": Monai(network="DenseNet", arguments={"init_features": 8, "growth_rate": 4, "block_config": [2, 2]}),
}
BUDGETS = [Budget("linf", 8 / 255), Budget("l2", 0.5)]
BATCH = 5

every_attack = pytest.mark.parametrize("spec", ATTACKS, ids=lambda spec: spec.method)
every_budget = pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.norm)
every_model = pytest.mark.parametrize("model", MODELS)
every_channels = pytest.mark.parametrize("channels", [1, 3])


@pytest.fixture(autouse=True)
def short_ensemble(monkeypatch):
    """All parts of AutoAttack, each with few steps."""
    monkeypatch.setattr(autoattack, "STEPS", 20)
    monkeypatch.setattr(autoattack, "QUERIES", 100)


@functools.cache
def make_classifier(model: str, channels: int):
    classifier = MODELS[model].make(channels, 16, 3, seed=5)
    classifier.train()
    with torch.no_grad():
        classifier(torch.rand(16, channels, 16, 16, generator=torch.Generator().manual_seed(9)))  # batch statistics
    return classifier


def images(channels: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(BATCH, channels, 16, 16, generator=generator) * 1.4 - 0.2  # with pixels at both ends
    return x.clamp(0, 1), torch.randint(0, 3, (BATCH,), generator=generator)


def attacked(spec, classifier, x, y, budget, seed=0):
    if spec.kind == "carlini_wagner" and budget.norm != "l2":
        pytest.skip("measures in L2 only")
    return spec.make()(classifier, x, y, budget, torch.Generator().manual_seed(seed))


def test_every_member_is_here():
    members = get_args(get_args(EvasionSpec)[0])
    assert set(members) == {type(spec) for spec in ATTACKS}


def answers(classifier, x):
    classifier.eval()
    try:
        with torch.no_grad():
            return classifier(x).argmax(1)
    finally:
        classifier.train()


@every_attack
@every_budget
@every_model
@every_channels
def test_stays_in_the_ball_and_in_the_image_range(spec, budget, model, channels):
    x, y = images(channels)
    x_before = x.clone()
    y = answers(make_classifier(model, channels), x)  # so that there is something to break
    x_adv = attacked(spec, make_classifier(model, channels), x, y, budget)
    assert torch.equal(x, x_before)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    delta = (x_adv - x).flatten(1)
    length = delta.abs().amax(1) if budget.norm == "linf" else delta.norm(dim=1)
    assert (length <= budget.radius * (1 + 1e-5)).all()
    smallest = spec.kind in ("deepfool", "carlini_wagner", "fab", "hop_skip_jump", "autoattack")
    assert (length > 0).any() or smallest  # it is an attack; a minimal one leaves alone what it cannot break


@every_attack
@pytest.mark.parametrize("norm", ["linf", "l2"])
@every_model
def test_radius_0_changes_nothing(spec, norm, model):
    x, y = images(1)
    x_adv = attacked(spec, make_classifier(model, 1), x, y, Budget(norm, 0.0))
    assert torch.equal(x_adv, x)
    assert x_adv is not x


@every_attack
@every_budget
@every_model
def test_the_generator_alone_decides(spec, budget, model):
    classifier = make_classifier(model, 1)
    x, y = images(1)
    first = attacked(spec, classifier, x, y, budget)
    torch.manual_seed(1)
    assert torch.equal(attacked(spec, classifier, x, y, budget), first)
    other = attacked(spec, classifier, x, y, budget, seed=1)
    if spec in DETERMINISTIC:
        assert torch.equal(other, first)


@every_attack
@every_budget
@every_model
@every_channels
def test_a_record_does_not_depend_on_the_others(spec, budget, model, channels):
    classifier = make_classifier(model, channels).double()
    try:
        x, y = (images(channels)[0].double(), images(channels)[1])
        x_other, y_other = images(channels, seed=1)
        x_mixed, y_mixed = x_other.double(), y_other.clone()
        x_mixed[2], y_mixed[2] = x[2], y[2]
        alone = attacked(spec, classifier, x, y, budget)[2]
        mixed = attacked(spec, classifier, x_mixed, y_mixed, budget)[2]
        assert torch.allclose(alone, mixed, atol=1e-9)
    finally:
        classifier.float()


@pytest.mark.parametrize("model", ["resnet9", "resnet9_batch", "densenet"])
@every_budget
@pytest.mark.parametrize("spec", DETERMINISTIC, ids=lambda spec: spec.method)
def test_without_random_draws_the_order_is_irrelevant(spec, model, budget):
    classifier = make_classifier(model, 1).double()
    try:
        x, y = images(1)
        order = torch.tensor([3, 0, 4, 1, 2])
        x_adv = attacked(spec, classifier, x.double(), y, budget)
        assert torch.allclose(attacked(spec, classifier, x[order].double(), y[order], budget), x_adv[order], atol=1e-6)
    finally:
        classifier.float()


@every_attack
@every_budget
@every_model
def test_the_classifier_is_left_as_found(spec, budget, model):
    classifier = make_classifier(model, 1)
    frozen_parameter, marked = list(classifier.parameters())[:2]
    children = list(classifier.module.children())
    try:
        frozen_parameter.requires_grad_(False)
        marked.grad = torch.full_like(marked, 3.0)
        children[0].eval()  # one part in evaluation mode, the rest in training mode
        flags = [module.training for module in classifier.modules()]
        wants = [parameter.requires_grad for parameter in classifier.parameters()]
        hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in classifier.modules()]
        counters = {name: buffer.clone() for name, buffer in classifier.named_buffers()}
        params, buffers = get_params(classifier), get_buffers(classifier)
        x, y = images(1)
        attacked(spec, classifier, x, y, budget)
        assert [module.training for module in classifier.modules()] == flags
        assert [parameter.requires_grad for parameter in classifier.parameters()] == wants
        assert [len(m._forward_hooks) + len(m._backward_hooks) for m in classifier.modules()] == hooks
        assert all(torch.equal(buffer, counters[name]) for name, buffer in classifier.named_buffers())
        assert torch.equal(get_params(classifier), params)
        assert torch.equal(get_buffers(classifier), buffers)
        assert torch.equal(marked.grad, torch.full_like(marked, 3.0))
        assert sum(parameter.grad is not None for parameter in classifier.parameters()) == 1
    finally:
        frozen_parameter.requires_grad_(True)
        marked.grad = None
        classifier.train()


@every_budget
@every_model
@pytest.mark.parametrize("spec", [s for s in ATTACKS if isinstance(s, Pgd)], ids=lambda s: s.method)
def test_pgd_never_lowers_the_loss_and_never_repairs_an_image(spec, budget, model):
    classifier = make_classifier(model, 1)
    x = images(1)[0]
    y = answers(classifier, x)
    x_adv = attacked(spec, classifier, x, y, budget)
    classifier.eval()
    try:
        with torch.no_grad():
            clean, perturbed = classifier(x), classifier(x_adv)
    finally:
        classifier.train()
    rises = F.cross_entropy(perturbed, y, reduction="none") - F.cross_entropy(clean, y, reduction="none")
    if spec.loss == "cross_entropy":
        assert (rises >= -1e-5).all()
        assert rises.max() > 1e-4
    assert ((perturbed.argmax(1) != y) >= (clean.argmax(1) != y)).all()


@every_budget
@every_model
def test_fgsm_raises_the_mean_loss_at_a_small_radius(budget, model):
    classifier = make_classifier(model, 1)
    x, y = images(1)
    x_adv = attacked(Fgsm(radii=R), classifier, x, y, Budget(budget.norm, budget.radius / 50))
    classifier.eval()
    try:
        with torch.no_grad():
            assert F.cross_entropy(classifier(x_adv), y) > F.cross_entropy(classifier(x), y)
    finally:
        classifier.train()


@every_attack
@every_budget
def test_an_empty_batch_stays_empty(spec, budget):
    x, y = images(1)
    assert attacked(spec, make_classifier("resnet9", 1), x[:0], y[:0], budget).shape == (0, 1, 16, 16)


@every_attack
@every_budget
def test_works_where_gradients_are_switched_off(spec, budget):
    classifier = make_classifier("resnet9", 1)
    x, y = images(1)
    expected = attacked(spec, classifier, x, y, budget)
    with torch.no_grad():
        assert torch.equal(attacked(spec, classifier, x, y, budget), expected)


@functools.cache
def knowing_classifier(num_classes: int):
    records = stripes(96, num_classes=num_classes, size=16)
    return trained(Resnet9(width=4).make(1, 16, num_classes, seed=3), records, steps=60), records


@every_attack
@every_budget
@pytest.mark.parametrize("num_classes", [2, 3])
def test_it_breaks_a_model_that_knows_something_and_repairs_nothing(spec, budget, num_classes):
    if getattr(spec, "loss", "") == "dlr" and num_classes == 2:
        spec = spec.model_copy(update={"loss": "margin"})
    classifier, records = knowing_classifier(num_classes)
    x, y = records.x(slice(12)), records.y(slice(12))
    right = answers(classifier, x)
    y[0] = (right[0] + 1) % num_classes  # wrong from the start
    assert (right == y).sum() >= 10
    x_adv = attacked(spec, classifier.eval(), x, y, Budget(budget.norm, 6 * budget.radius))
    wrong = classifier.eval()(x_adv).argmax(1) != y
    assert wrong[0] or spec.kind == "fgsm"  # whose one step may land anywhere
    if spec.kind != "hop_skip_jump":  # a hundred questions promise little
        assert wrong.sum() > 3


@every_attack
@every_budget
def test_the_model_that_ships_is_asked_and_never_differentiated(spec, budget):
    twin, x, y = make_classifier("resnet9", 1), *images(1)
    seen = []

    def ships(images_BCHW):
        assert not images_BCHW.requires_grad
        seen.append(len(images_BCHW))
        with torch.inference_mode():
            twin.eval()
            return twin(images_BCHW).clone()

    try:
        x_adv = (
            spec.make(Access(ships))(twin, x, y, budget, torch.Generator().manual_seed(0))
            if (spec.kind != "carlini_wagner" or budget.norm == "l2")
            else x
        )
        assert x_adv.isfinite().all()
        assert seen or spec.sees_gradients
    finally:
        twin.train()


@every_attack
def test_every_attack_says_what_it_is(spec):
    again = type(spec).model_validate(spec.model_dump(mode="json"))
    assert again == spec and again.key == spec.key
    assert spec.label == f"{spec.method} {'L2' if spec.norm == 'l2' else 'Linf'}"
    assert spec.name(3).startswith(spec.method)
