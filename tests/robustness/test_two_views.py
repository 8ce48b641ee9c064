"""TRADES and MART against their formulas, written down naively; and what their attacks climb."""

import math

import pytest
import torch
from torch.nn import functional as F

from helpers.small_problem import stripes, trained
from trilemma.attacks.budget import Budget
from trilemma.models.specs import Resnet9
from trilemma.robustness.crafting import last_pgd_images
from trilemma.robustness.two_views import (
    boosted_cross_entropy,
    divergence,
    divergent_images,
    mart_loss,
    trades,
    trades_loss,
)

BUDGETS = [Budget("linf", 8 / 255), Budget("l2", 1.0)]
every_budget = pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.norm)


def answers(num_classes, seed=0):
    draws = torch.Generator().manual_seed(seed)
    logits_BVK = 3 * torch.randn(7, 2, num_classes, generator=draws, dtype=torch.float64)
    return logits_BVK, torch.randint(0, num_classes, (7,), generator=draws)


def shares(logits):
    """The softmax in plain Python."""
    powers = [math.exp(value) for value in logits.tolist()]
    return [power / sum(powers) for power in powers]


def naive_divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_trades_is_its_formula(num_classes):
    logits_BVK, y_B = answers(num_classes)
    for views, label, own in zip(logits_BVK, y_B.tolist(), trades_loss(logits_BVK, y_B, beta=4.0), strict=True):
        p, q = map(shares, views)
        assert float(own) == pytest.approx(-math.log(p[label]) + 4 * naive_divergence(p, q), rel=1e-9)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_mart_is_its_formula(num_classes):
    logits_BVK, y_B = answers(num_classes)
    for views, label, own in zip(logits_BVK, y_B.tolist(), mart_loss(logits_BVK, y_B, beta=4.0), strict=True):
        p, q = map(shares, views)
        wrong = max(share for k, share in enumerate(q) if k != label)
        boosted = -math.log(q[label]) - math.log(1 - wrong)
        assert float(own) == pytest.approx(boosted + 4 * naive_divergence(p, q) * (1 - p[label]), rel=1e-9)


def test_the_boosted_cross_entropy_of_two_classes_is_twice_the_plain_one():
    logits_BVK, y_B = answers(2)
    plain_B = F.cross_entropy(logits_BVK[:, 1], y_B, reduction="none")
    assert torch.allclose(boosted_cross_entropy(logits_BVK[:, 1], y_B), 2 * plain_B)


def test_the_losses_stay_finite_where_a_model_is_sure():
    logits_BVK = torch.tensor([[[0.0, 400.0, -400.0], [900.0, 0.0, -90.0]]]).requires_grad_(True)
    for loss in (trades_loss, mart_loss):
        for label in range(3):
            value = loss(logits_BVK, torch.tensor([label]), beta=6.0).sum()
            (gradient,) = torch.autograd.grad(value, logits_BVK)
            assert value.isfinite() and gradient.isfinite().all()


def test_equal_answers_leave_the_cross_entropy():
    logits_BVK, y_B = answers(3)
    same_BVK = logits_BVK[:, :1].expand(-1, 2, -1)
    assert torch.allclose(divergence(same_BVK[:, 0], same_BVK[:, 1]), torch.zeros(7, dtype=torch.float64))
    plain = F.cross_entropy(same_BVK[:, 0], y_B, reduction="none")
    assert torch.allclose(trades_loss(same_BVK, y_B, beta=6.0), plain)


@pytest.fixture(scope="module")
def learned():
    records = stripes(192, size=8)
    return trained(Resnet9(width=4).make(1, 8, 3, seed=0), records), records.x(slice(0, 64)), records.y(slice(0, 64))


def moved(classifier, x, x_adv):
    with torch.no_grad():
        return divergence(classifier(x), classifier(x_adv))


@every_budget
def test_trades_images_move_the_answer_and_look_at_no_label(learned, budget):
    classifier, x, y = learned
    images = [divergent_images(classifier, x, y, budget, torch.Generator().manual_seed(0), steps=n) for n in (1, 10)]
    other = divergent_images(classifier, x, (y + 1) % 3, budget, torch.Generator().manual_seed(0), steps=10)
    assert torch.equal(images[1], other)
    one, ten = (moved(classifier, x, x_adv).mean() for x_adv in images)
    noise = (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1).sign() * budget.radius
    noise = noise if budget.norm == "linf" else noise / noise.flatten(1).norm(dim=1)[:, None, None, None]
    assert ten > 0.99 * one > 3 * moved(classifier, x, (x + noise).clamp(0, 1)).mean() > 0


@every_budget
def test_trades_images_hurt_without_knowing_the_label_and_pgds_hurt_more(learned, budget):
    classifier, x, y = learned
    losses = [float(F.cross_entropy(classifier(x), y).detach())]
    for craft in (divergent_images, last_pgd_images):
        x_adv = craft(classifier, x, y, budget, torch.Generator().manual_seed(0), steps=10)
        losses.append(float(F.cross_entropy(classifier(x_adv), y).detach()))
    clean, blind, informed = losses
    assert 1.5 * clean < blind < informed


def test_a_radius_below_the_first_noise_is_kept(learned):
    classifier, x, y = learned
    budget = Budget("linf", 1e-4)
    x_adv = divergent_images(classifier, x, y, budget, torch.Generator().manual_seed(0), steps=2)
    assert 0 < (x_adv - x).abs().max() <= 1e-4 * (1 + 1e-3)


def test_a_radius_of_0_draws_nothing_and_trains_plainly(learned):
    classifier, x, y = learned
    draws, untouched = (torch.Generator().manual_seed(0) for _ in range(2))
    attack = lambda *args: divergent_images(*args, steps=3)  # noqa: E731
    objective = trades(attack, Budget("linf", 0.0), beta=6.0)
    views = objective.views(classifier, x, y, draws)
    assert torch.equal(views[:, 0], x) and torch.equal(views[:, 1], x)
    assert torch.equal(draws.get_state(), untouched.get_state())
    logits = classifier(views.flatten(0, 1)).view(len(x), 2, -1)
    assert torch.allclose(objective.loss(logits, y), F.cross_entropy(classifier(x), y, reduction="none"), atol=1e-5)
