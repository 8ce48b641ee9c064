import math

import pytest
import torch
from torch import nn

from helpers.gratings import gratings, hardened
from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.fgsm import fgsm
from trilemma.attacks.evasion.mifgsm import mifgsm
from trilemma.models.classifier import Classifier


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def errors(classifier, x, y):
    with torch.no_grad():
        return classifier(x).argmax(1) != y


def algorithm_1(classifier, x, y, budget, steps, decay):
    """Dong et al., Algorithm 1, for one image: every point of the way."""
    points, moving = [x], torch.zeros_like(x)
    for _ in range(steps):
        point = points[-1].clone().requires_grad_(True)
        logits = classifier(point[None])[0]
        (slope,) = torch.autograd.grad(torch.logsumexp(logits, 0) - logits[y], point)
        moving = decay * moving + slope / slope.abs().sum()
        step = moving.sign() if budget.norm == "linf" else moving / moving.norm()
        points.append((points[-1] + budget.radius / steps * step).clamp(0, 1))
    return points


@pytest.mark.parametrize("budget", [Budget("linf", 0.05), Budget("l2", 0.4)], ids=lambda budget: budget.norm)
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_is_algorithm_1_of_the_paper(budget, decay):
    classifier = hardened(3).double()
    x, y = gratings(4, num_classes=3, seed=5)
    x_adv = mifgsm(classifier, x.double(), y, budget, generator(), steps=6, decay=decay, stop=False)
    for i in range(len(x)):
        points = torch.stack(algorithm_1(classifier, x[i].double(), int(y[i]), budget, 6, decay))
        with torch.no_grad():
            logits = classifier(points)
        loss = torch.logsumexp(logits, 1) - logits[:, y[i]]
        worst = max(range(len(points)), key=lambda p: (int(logits[p].argmax()) != int(y[i]), float(loss[p])))
        assert worst > 0
        assert torch.allclose(x_adv[i], points[worst], atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_step_is_fgsm(norm):
    # In double precision, for in float32 the loss of some is 0 before and after, and the clean image stays.
    classifier, (x, y) = hardened(3).double(), gratings(12, num_classes=3, seed=5)
    x, budget = x.double(), Budget(norm, 0.03)
    one = mifgsm(classifier, x, y, budget, generator(), steps=1, stop=False)
    assert torch.allclose(one, fgsm(classifier, x, y, budget, generator()), atol=1e-6)


def test_the_moving_sum_changes_the_way():
    classifier, (x, y) = hardened(3), gratings(12, num_classes=3, seed=5)
    budget = Budget("linf", 0.05)
    ways = [mifgsm(classifier, x, y, budget, generator(), steps=8, decay=decay, stop=False) for decay in (0.0, 1.0)]
    assert not torch.equal(*ways)


def test_stopping_breaks_the_same_images_and_full_budget_goes_further():
    classifier, (x, y) = hardened(3), gratings(60, num_classes=3, seed=5)
    budget = Budget("linf", 14 / 255)
    stopped = mifgsm(classifier, x, y, budget, generator(), steps=10)
    driven = mifgsm(classifier, x, y, budget, generator(), steps=10, stop=False)
    broken = errors(classifier, stopped, y)
    assert 0 < broken.sum() < 60
    assert torch.equal(broken, errors(classifier, driven, y))
    with torch.no_grad():
        true = [classifier(images).log_softmax(1).gather(1, y[:, None])[broken].mean() for images in (stopped, driven)]
    assert true[1] < true[0]


def test_draws_nothing():
    classifier, (x, y) = hardened(2), gratings(4, num_classes=2)
    source = generator()
    before = source.get_state()
    mifgsm(classifier, x, y, Budget("linf", 0.05), source, steps=3)
    assert torch.equal(source.get_state(), before)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("factor", [math.nan, math.inf, 0.0, 1e-30])
def test_useless_gradients_move_no_image_out_of_the_numbers(norm, factor):
    class Odd(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] * factor

    x, y = gratings(4, num_classes=2)
    x_adv = mifgsm(Classifier(Odd(), 3), x, y, Budget(norm, 0.1), generator(), steps=4, stop=False)
    assert torch.isfinite(x_adv).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
