"""The images of PGD and N-FGSM training, against loops that say what they are."""

import pytest
import torch
from torch.nn import functional as F

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.geometry import project, random_start, steepest_step
from trilemma.models.specs import Resnet9
from trilemma.robustness.crafting import last_pgd_images, nfgsm_images

BUDGETS = [Budget("linf", 8 / 255), Budget("l2", 0.5)]
every_budget = pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.norm)


def setting():
    draws = torch.Generator().manual_seed(0)
    classifier = Resnet9(width=4).make(1, 16, 3, seed=1)
    return classifier, torch.rand(6, 1, 16, 16, generator=draws), torch.randint(0, 3, (6,), generator=draws)


def gradient(classifier, x, y):
    x = x.clone().requires_grad_(True)
    classifier.eval()
    (found,) = torch.autograd.grad(F.cross_entropy(classifier(x), y, reduction="sum"), x)
    classifier.train()
    return found


@every_budget
@pytest.mark.parametrize(("steps", "step_size"), [(1, None), (4, None), (3, 0.9)])
def test_pgd_images_are_the_last_ones(budget, steps, step_size):
    classifier, x, y = setting()
    length = (step_size or 2.5 / steps) * budget.radius
    expected = random_start(x, budget, torch.Generator().manual_seed(7))
    for _ in range(steps):
        expected = project(expected + steepest_step(gradient(classifier, expected, y), length, budget.norm), x, budget)
    made = last_pgd_images(classifier, x, y, budget, torch.Generator().manual_seed(7), steps=steps, step_size=step_size)
    assert torch.equal(made, expected)


def test_nfgsm_by_hand():
    # de Jorge et al. (2022), Algorithm 1: uniform noise of k radii, one step of alpha radii, no projection.
    classifier, x, y = setting()
    radius = 8 / 255
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(7)) * 2 - 1
    start = (x + 2 * radius * noise).clamp(0, 1)
    expected = (start + radius * gradient(classifier, start, y).sign()).clamp(0, 1)
    made = nfgsm_images(classifier, x, y, Budget("linf", radius), torch.Generator().manual_seed(7))
    assert torch.allclose(made, expected, atol=1e-6)
    assert (made - x).abs().max() > 1.5 * radius  # not moved back


@every_budget
@pytest.mark.parametrize("noise", [0.0, 1.0, 2.0])
def test_nfgsm_reaches_as_far_as_noise_and_step(budget, noise):
    classifier, x, y = setting()
    x = 0.4 + 0.2 * x  # far from 0 and 1
    made = nfgsm_images(classifier, x, y, budget, torch.Generator().manual_seed(7), noise=noise, step_size=0.5)
    delta = (made - x).flatten(1)
    length = delta.abs().amax(1) if budget.norm == "linf" else delta.norm(dim=1)
    assert (length <= (noise + 0.5) * budget.radius * (1 + 1e-5)).all()
    assert (length >= 0.45 * budget.radius).all()


@pytest.mark.parametrize("make", [last_pgd_images, nfgsm_images])
def test_nothing_is_drawn_and_a_copy_returned_where_nothing_may_change(make):
    classifier, x, y = setting()
    more = {"steps": 2} if make is last_pgd_images else {}
    draws, untouched = (torch.Generator().manual_seed(0) for _ in range(2))
    made = make(classifier, x, y, Budget("linf", 0.0), draws, **more)
    assert torch.equal(made, x) and made is not x
    assert make(classifier, x[:0], y[:0], BUDGETS[0], draws, **more).shape == (0, 1, 16, 16)
    assert torch.equal(draws.get_state(), untouched.get_state())
