"""What every inference-time attack promises, on every kind of model, norm and image."""

import functools
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from trilemma.attacks.budget import Budget
from trilemma.attacks.specs import EvasionSpec, Fgsm, Pgd
from trilemma.models.specs import Monai, Resnet9, Resnet18
from trilemma.models.vector import get_buffers, get_params

ATTACKS = [Fgsm(), Fgsm(random_start=True), Pgd(steps=3), Pgd(steps=2, restarts=2, loss="margin", step_size=0.8)]
MODELS = {
    "resnet9": Resnet9(width=4),
    "resnet9_batch": Resnet9(width=4, norm="batch"),
    "resnet18_small": Resnet18(width=4),
    "resnet18_large": Resnet18(width=4, stem="large"),
    "densenet": Monai(network="DenseNet", arguments={"init_features": 8, "growth_rate": 4, "block_config": [2, 2]}),
}
BUDGETS = [Budget("linf", 8 / 255), Budget("l2", 0.5)]
BATCH = 5

every_attack = pytest.mark.parametrize("spec", ATTACKS, ids=lambda spec: spec.label)
every_budget = pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.norm)
every_model = pytest.mark.parametrize("model", MODELS)
every_channels = pytest.mark.parametrize("channels", [1, 3])


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
    return spec.make()(classifier, x, y, budget, torch.Generator().manual_seed(seed))


def test_every_member_is_here():
    members = get_args(get_args(EvasionSpec)[0])
    assert set(members) == {type(spec) for spec in ATTACKS}


@every_attack
@every_budget
@every_model
@every_channels
def test_stays_in_the_ball_and_in_the_image_range(spec, budget, model, channels):
    x, y = images(channels)
    x_before = x.clone()
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
    assert (length > 0).any()  # it is an attack


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
    random = isinstance(spec, Pgd) or spec.random_start
    assert torch.equal(other, first) != random


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
def test_without_random_draws_the_order_is_irrelevant(model, budget):
    classifier = make_classifier(model, 1).double()
    try:
        x, y = images(1)
        order = torch.tensor([3, 0, 4, 1, 2])
        x_adv = attacked(Fgsm(), classifier, x.double(), y, budget)
        assert torch.allclose(attacked(Fgsm(), classifier, x[order].double(), y[order], budget), x_adv[order])
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
@pytest.mark.parametrize("spec", [s for s in ATTACKS if isinstance(s, Pgd)], ids=lambda s: s.label)
def test_pgd_never_lowers_the_loss_and_never_repairs_an_image(spec, budget, model):
    classifier = make_classifier(model, 1)
    x, y = images(1)
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
    x_adv = attacked(Fgsm(), classifier, x, y, Budget(budget.norm, budget.radius / 50))
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
