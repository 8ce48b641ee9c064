import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.gratings import gratings, hardened
from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.apgd import apgd, checkpoints
from trilemma.attacks.evasion.geometry import random_start
from trilemma.attacks.evasion.losses import likeliest_wrong
from trilemma.errors import UserError
from trilemma.models.classifier import Classifier

BUDGETS = {"linf": Budget("linf", 0.06), "l2": Budget("l2", 0.6)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(num_classes: int, *, seed: int = 2) -> Classifier:
    """A small smooth network without normalisation, in double precision, with random weights."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3), nn.SiLU(), nn.Conv2d(6, 6, 3, stride=2), nn.SiLU(), nn.Flatten()]
    return Classifier(nn.Sequential(*layers, nn.Linear(54, num_classes)), num_classes).double().eval()


def images(num_classes: int, batch: int = 5, seed: int = 3):
    x = torch.rand(batch, 1, 9, 9, generator=generator(seed), dtype=torch.float64)
    return x, torch.arange(batch) % num_classes


def right_labels(classifier: Classifier, x):
    with torch.no_grad():
        return classifier(x).argmax(1)


def loss_of(name: str, logits, y: int, target: int | None):
    """The losses of the paper for one image, written out."""
    others = [float("-inf") if k == y else 0.0 for k in range(len(logits))]
    if name == "cross_entropy":
        return torch.logsumexp(logits, 0) - logits[y]
    top = logits.sort(descending=True).values
    rise = (logits + torch.tensor(others)).max() - logits[y] if target is None else logits[target] - logits[y]
    if name == "margin":
        return rise
    return rise / (top[0] - top[2] + 1e-12 if target is None else top[0] - (top[2] + top[3]) / 2 + 1e-12)


def into_ball(z, x, budget):
    delta = z - x
    if budget.norm == "linf":
        delta = delta.clamp(-budget.radius, budget.radius)
    elif delta.norm() > budget.radius:
        delta = delta * budget.radius / delta.norm()
    return (x + delta).clamp(0, 1)


def algorithm_1(classifier, x, start, y, budget, steps, name, target=None):
    """Algorithm 1 for one image, point by point; returns all points and the number of halvings."""

    def value_and_slope(point):
        point = point.clone().requires_grad_(True)
        value = loss_of(name, classifier(point[None])[0], y, target)
        (slope,) = torch.autograd.grad(value, point)
        return float(value.detach()), slope.sign() if budget.norm == "linf" else slope / slope.norm()

    marks = {math.ceil(mark * steps / 100 - 1e-9) for mark in (22, 41, 57, 70, 80, 87, 93, 99)}
    step, halvings, last_mark = 2 * budget.radius, 0, 0
    points, values = [start], []
    previous, best, best_at_mark, halved_before, rises = start, None, None, False, 0
    for k in range(steps):
        value, slope = value_and_slope(points[-1])
        rises += k > 0 and value > values[-1]
        values.append(value)
        if best is None or value > best[0]:
            best = (value, points[-1], slope)
        if k == 0:
            best_at_mark = best[0]
        current = points[-1]
        if k in marks:
            halved = rises < 0.75 * (k - last_mark) or (not halved_before and best_at_mark == best[0])
            if halved:
                step, halvings = step / 2, halvings + 1
                values[-1], current, slope = best
            rises, best_at_mark, halved_before, last_mark = 0, best[0], halved, k
        z = into_ball(current + step * slope, x, budget)
        if k > 0:
            z = into_ball(current + 0.75 * (z - current) + 0.25 * (current - previous), x, budget)
        previous = current
        points.append(z)
    return points, halvings


CASES = [
    ("cross_entropy", None, 3),
    ("margin", None, 2),
    ("dlr", None, 3),
    ("margin", 1, 3),
    ("dlr", 1, 4),
]


@pytest.mark.parametrize("norm", BUDGETS)
@pytest.mark.parametrize(("loss", "num_targets", "classes"), CASES)
def test_is_algorithm_1_of_the_paper(norm, loss, num_targets, classes):
    classifier, (x, _) = network(classes), images(classes)
    y, budget, steps = right_labels(classifier, x), BUDGETS[norm], 30
    with torch.no_grad():
        target = classifier(x).sort(dim=1, descending=True).indices[:, 1]
    x_adv = apgd(classifier, x, y, budget, generator(4), steps=steps, loss=loss, num_targets=num_targets, stop=False)
    start = random_start(x, budget, generator(4))
    halvings = 0
    for i in range(len(x)):
        aim = None if num_targets is None else int(target[i])
        points, halved = algorithm_1(classifier, x[i], start[i], int(y[i]), budget, steps, loss, aim)
        halvings += halved
        points = [x[i], *points]
        with torch.no_grad():
            logits = classifier(torch.stack(points))
        # The worst of all points that were visited: one that is misclassified first, then by the untargeted loss.
        order = "margin" if num_targets is not None else loss
        worst = max(
            range(len(points)),
            key=lambda p: (int(logits[p].argmax()) != int(y[i]), float(loss_of(order, logits[p], int(y[i]), None))),
        )
        assert torch.allclose(x_adv[i], points[worst], atol=1e-7)
    assert halvings > 0  # or the comparison says little


def test_the_checkpoints_of_100_steps_are_those_of_the_paper():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(20) == [5, 9, 12, 14, 16, 18, 19]
    assert checkpoints(1) == []


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 1000])
def test_checkpoints_ascend_within_the_steps(steps):
    marks = checkpoints(steps)
    assert marks == sorted(set(marks))
    assert all(0 < mark < steps for mark in marks)


@pytest.mark.parametrize("norm", BUDGETS)
def test_another_start_never_lowers_the_loss_nor_repairs_an_image(norm):
    classifier, (x, y) = network(3), images(3)

    def loss(steps, restarts=1):
        x_adv = apgd(classifier, x, y, BUDGETS[norm], generator(), steps=steps, restarts=restarts, stop=False)
        with torch.no_grad():
            logits = classifier(x_adv)
        return logits.argmax(1) != y, F.cross_entropy(logits, y, reduction="none")

    with torch.no_grad():
        clean = F.cross_entropy(classifier(x), y, reduction="none")
    broken, one = loss(10)
    broken_twice, two = loss(10, 2)
    assert (one[~broken] >= clean[~broken]).all()
    assert (broken_twice >= broken).all()
    assert (two[broken_twice == broken] >= one[broken_twice == broken] - 1e-12).all()
    assert (two > clean).any()


@pytest.mark.parametrize("norm", BUDGETS)
@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_reaches_the_optimum_of_a_linear_model(norm, loss):
    weights = torch.tensor([1.0, -2.0, 3.0, -1.0], dtype=torch.float64)
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.stack([torch.zeros_like(weights), weights])
    classifier = Classifier(nn.Sequential(nn.Flatten(), layer), 2, mean=0.0, std=1.0)
    x = 0.4 + 0.2 * torch.rand(6, 1, 2, 2, generator=generator(), dtype=torch.float64)
    y = torch.arange(6) % 2
    x_adv = apgd(classifier, x, y, Budget(norm, 0.1), generator(), steps=60, loss=loss, stop=False)
    towards = torch.where(y == 0, 1.0, -1.0)[:, None, None, None] * weights.view(1, 1, 2, 2)
    best = 0.1 * (towards.sign() if norm == "linf" else towards / weights.norm())
    assert torch.allclose(x_adv, x + best, atol=1e-4)


def test_targets_are_the_likeliest_wrong_classes():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [math.nan, 1.0, 5.0, 7.0], [-math.inf, -math.inf, 0.0, math.inf]])
    y = torch.tensor([0, 3, 3])
    assert likeliest_wrong(logits, y, 2).tolist() == [[2, 1], [2, 1], [2, 0]]
    ranked = likeliest_wrong(logits, y, 9)
    assert ranked.shape == (3, 3)
    assert not (ranked == y[:, None]).any()


def test_aiming_at_all_classes_finds_what_the_likeliest_hides():
    # Class 1 is likeliest and out of reach; class 2 is far behind, and the last pixel alone decides on it.
    layer = nn.Linear(4, 3)
    layer.weight.data = torch.tensor([[0.0] * 4, [0.6, 0.6, 0.6, -0.1], [0.0, 0.0, 0.0, 20.0]])
    layer.bias.data = torch.tensor([2.0, 0.0, -11.8])
    classifier = Classifier(nn.Sequential(nn.Flatten(), layer), 3, mean=0.0, std=1.0)
    x, y, budget = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), Budget("linf", 0.2)
    first = apgd(classifier, x, y, budget, generator(), steps=10, loss="margin", num_targets=1)
    both = apgd(classifier, x, y, budget, generator(), steps=10, loss="margin", num_targets=5)
    with torch.no_grad():
        assert classifier(first).argmax(1).item() == 0
        assert classifier(both).argmax(1).item() == 2


@pytest.mark.parametrize(("classes", "num_targets", "needed"), [(2, None, 3), (2, 1, 4), (3, 2, 4)])
@pytest.mark.parametrize("radius", [0.0, 0.1])
def test_too_few_classes_for_the_ratio_are_refused_by_name(classes, num_targets, needed, radius):
    x, y = images(classes)
    with pytest.raises(UserError, match=f"apgd.*at least {needed} classes, not {classes}.*margin"):
        apgd(network(classes), x, y, Budget("linf", radius), generator(), steps=2, loss="dlr", num_targets=num_targets)


def test_the_cross_entropy_has_no_target():
    x, y = images(3)
    with pytest.raises(UserError, match="aims at no class"):
        apgd(network(3), x, y, BUDGETS["linf"], generator(), steps=2, num_targets=1)


class Counting(nn.Module):
    """Counts the images that pass."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.passed: list[int] = []

    def forward(self, x):
        self.passed.append(len(x))
        return self.inner(x)


def test_broken_images_leave_the_batch():
    classifier, (x, y) = network(3), images(3, batch=12)
    y = right_labels(classifier, x)
    counting = Counting(classifier.module)
    classifier.module = counting
    x_adv = apgd(classifier, x, y, Budget("linf", 0.05), generator(), steps=20)
    with torch.no_grad():
        left = int((classifier.module.inner((x_adv - 0.5) / 0.25).argmax(1) == y).sum())
    assert 0 < left < 12  # some break, some do not
    assert counting.passed == sorted(counting.passed, reverse=True)
    assert counting.passed[:2] == [12, 12]
    assert counting.passed[-1] == left
    assert len(counting.passed) == 22  # the clean images, 20 steps, the last look


def test_an_image_leaves_only_when_the_model_that_ships_errs():
    classifier, (x, _) = network(3), images(3, batch=12)
    y, budget = right_labels(classifier, x), Budget("linf", 0.05)

    def stubborn(x_BCHW):  # asks for a margin of 0.02 before it errs
        with torch.no_grad():
            return classifier(x_BCHW) + 0.02 * F.one_hot(y_of(x_BCHW), 3)

    def y_of(x_BCHW):
        nearest = (x_BCHW[:, None] - x[None]).abs().amax(dim=(2, 3, 4)).argmin(1)
        return y[nearest]

    alone = apgd(classifier, x, y, budget, generator(), steps=20)
    judged = apgd(classifier, x, y, budget, generator(), steps=20, answers=stubborn)
    errors_alone = (stubborn(alone).argmax(1) != y).sum()
    errors_judged = (stubborn(judged).argmax(1) != y).sum()
    assert errors_judged > errors_alone


def test_a_model_that_answers_with_nan_moves_no_image_out_of_the_numbers():
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] * math.nan

    x, y = images(3)
    for norm in BUDGETS:
        x_adv = apgd(Classifier(Broken(), 3), x, y, BUDGETS[norm], generator(), steps=5, stop=False)
        assert torch.isfinite(x_adv).all()


# --- against the Adversarial Robustness Toolbox, on networks that were trained under attack --------------------------

TOOLBOX_CASES = [(2, "linf", 14 / 255), (2, "l2", 0.5), (3, "linf", 12 / 255), (3, "l2", 0.45), (10, "linf", 4 / 255)]


def toolbox_robust(classifier, x, y, budget, steps, starts=1):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the toolbox's own imports
        from art.attacks.evasion import AutoProjectedGradientDescent
        from art.estimators.classification import PyTorchClassifier
    estimator = PyTorchClassifier(
        model=classifier,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=classifier.num_classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = AutoProjectedGradientDescent(
        estimator,
        norm=np.inf if budget.norm == "linf" else 2,
        eps=budget.radius,
        eps_step=2 * budget.radius,
        max_iter=steps,
        nb_random_init=starts,
        batch_size=len(x),
        loss_type="cross_entropy",
        verbose=False,
    )
    np.random.seed(0)
    x_adv = torch.from_numpy(attack.generate(x.numpy(), y.numpy()))
    return accuracy(classifier, x_adv, y)


def accuracy(classifier, x, y):
    with torch.no_grad():
        return float((classifier(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize(("classes", "norm", "radius"), TOOLBOX_CASES)
def test_at_least_as_strong_as_the_toolbox(classes, norm, radius):
    classifier, budget = hardened(classes), Budget(norm, radius)
    x, y = gratings(100, num_classes=classes, seed=7)
    clean = accuracy(classifier, x, y)
    robust = accuracy(classifier, apgd(classifier, x, y, budget, generator(), steps=30), y)
    assert 0.02 < robust < clean - 0.02  # the attack does something, and not all is lost
    assert robust <= toolbox_robust(classifier, x, y, budget, 30) + 0.01


def test_the_ratio_and_the_margin_break_what_scaled_logits_hide():
    # Logits times 300 leave the cross entropy without a gradient in float32, and every prediction as it was.
    classifier = hardened(3)
    x, y = gratings(120, num_classes=3, seed=7)
    budget = Budget("linf", 14 / 255)
    honest = accuracy(classifier, apgd(classifier, x, y, budget, generator(), steps=20), y)
    classifier.module[-1].weight.data *= 300
    classifier.module[-1].bias.data *= 300
    robust = {
        loss: accuracy(classifier, apgd(classifier, x, y, budget, generator(), steps=20, loss=loss), y)
        for loss in ("cross_entropy", "margin", "dlr")
    }
    assert robust["cross_entropy"] > honest + 0.2
    assert robust["margin"] <= honest + 0.05
    assert robust["dlr"] <= honest + 0.05
