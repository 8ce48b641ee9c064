import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reference.naive_evasion import pgd_one
from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.fgsm import fgsm
from trilemma.attacks.evasion.frozen import frozen, logits_and_gradient
from trilemma.attacks.evasion.geometry import project, random_start, steepest_step
from trilemma.attacks.evasion.losses import cross_entropy, margin
from trilemma.attacks.evasion.pgd import climb, pgd
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_classifier(w0, w1, size=2) -> Classifier:
    layer = nn.Linear(size * size, 2, bias=False)
    layer.weight.data = torch.tensor([w0, w1], dtype=layer.weight.dtype)
    return Classifier(nn.Sequential(nn.Flatten(), layer), 2, mean=0.0, std=1.0)


@pytest.fixture(scope="module")
def trained():
    """A small network that tells a bright left half from a bright right half, and its images."""
    torch.manual_seed(0)
    classifier = Resnet9(width=4).make(1, 16, 2, seed=0)
    y = torch.arange(64) % 2
    x = torch.rand(64, 1, 16, 16, generator=generator()) * 0.5
    x[y == 0, :, :, :8] += 0.25
    x[y == 1, :, :, 8:] += 0.25
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(classifier(x), y).backward()
        optimizer.step()
    assert accuracy(classifier, x, y) == 1.0
    return classifier, x, y


def accuracy(classifier, x, y) -> float:
    with torch.no_grad():
        return float((classifier(x).argmax(1) == y).float().mean())


def test_fgsm_by_hand():
    # d(loss)/dx = p(wrong) * (w_wrong - w_true): its sign is that of (1, -2, 3, -1) for label 0, minus that for 1.
    classifier = linear_classifier([0.0] * 4, [1.0, -2.0, 3.0, -1.0])
    x = torch.tensor([[[[0.2, 0.5], [0.9, 0.05]]], [[[0.2, 0.5], [0.9, 0.05]]]])
    x_adv = fgsm(classifier, x, torch.tensor([0, 1]), Budget("linf", 0.1), generator())
    assert torch.allclose(x_adv[0, 0], torch.tensor([[0.3, 0.4], [1.0, 0.0]]))
    assert torch.allclose(x_adv[1, 0], torch.tensor([[0.1, 0.6], [0.8, 0.15]]))
    x_adv = fgsm(classifier, x[:1], torch.tensor([0]), Budget("l2", 0.15**0.5 / 10), generator())
    assert torch.allclose(x_adv[0, 0], torch.tensor([[0.21, 0.48], [0.93, 0.04]]), atol=1e-6)


def test_fgsm_from_a_random_start_steps_a_quarter_further():
    weights = torch.tensor([1.0, -2.0, 3.0, -1.0])
    classifier = linear_classifier([0.0] * 4, weights.tolist())
    x, y = torch.full((50, 1, 2, 2), 0.5), torch.zeros(50, dtype=torch.int64)
    x_adv = fgsm(classifier, x, y, Budget("linf", 0.1), generator(), random_start=True)
    start = random_start(x, Budget("linf", 0.1), generator())
    expected = (start - x + 0.125 * weights.sign().view(1, 1, 2, 2)).clamp(-0.1, 0.1) + x
    assert torch.allclose(x_adv, expected, atol=1e-6)
    assert 0.02 < float((x_adv - x).abs().lt(0.0999).float().mean()) < 0.98  # not all end on the surface


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_pgd_on_a_linear_model_is_the_closed_form(loss):
    weights = torch.tensor([1.0, -2.0, 3.0, -1.0])
    classifier = linear_classifier([0.0] * 4, weights.tolist()).double()  # the loss is flat around the optimum
    x = 0.3 + 0.4 * torch.rand(6, 1, 2, 2, generator=generator(), dtype=torch.float64)
    x[0, 0, 0, 0] = 0.98  # the box cuts this one
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    towards = torch.where(y == 0, 1.0, -1.0)[:, None, None, None] * weights.view(1, 1, 2, 2)
    linf = pgd(classifier, x, y, Budget("linf", 0.1), generator(), steps=5, loss=loss, stop=False)
    assert torch.allclose(linf, (x + 0.1 * towards.sign()).clamp(0, 1), atol=1e-6)
    inside = slice(1, None)
    budget = Budget("l2", 0.1)
    l2 = pgd(classifier, x[inside], y[inside], budget, generator(), steps=40, step_size=1.0, loss=loss, stop=False)
    assert torch.allclose(l2, x[inside] + 0.1 * towards[inside] / weights.norm(), atol=1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("restarts", [1, 2])
def test_pgd_matches_the_naive_twin(norm, loss, restarts):
    classifier = Resnet9(width=4).make(1, 16, 3, seed=2).double().eval()
    x = torch.rand(4, 1, 16, 16, generator=generator(3), dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 1])
    budget, steps = Budget(norm, 0.05 if norm == "linf" else 0.5), 3
    x_adv = pgd(classifier, x, y, budget, generator(4), steps=steps, restarts=restarts, loss=loss, stop=False)
    draws = generator(4)
    starts = [random_start(x, budget, draws) for _ in range(restarts)]
    for i in range(len(x)):
        own = [start[i] for start in starts]
        twin = pgd_one(classifier, x[i], int(y[i]), own, norm, budget.radius, steps, loss)
        assert torch.allclose(x_adv[i], twin, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_climb_returns_its_last_iterate(norm):
    classifier = Resnet9(width=4).make(1, 16, 3, seed=2).eval()
    x, y = torch.rand(4, 1, 16, 16, generator=generator(3)), torch.tensor([0, 1, 2, 1])
    budget = Budget(norm, 0.05)
    again = random_start(x, budget, generator())
    x_adv = climb(classifier, again, x, budget, lambda z: cross_entropy(z, y), steps=2)
    for _ in range(2):
        _, gradient = logits_and_gradient(classifier, again, lambda z: cross_entropy(z, y))
        direction = gradient.sign() if norm == "linf" else gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        delta = again + 1.25 * 0.05 * direction - x
        if norm == "linf":
            delta = delta.clamp(-0.05, 0.05)
        else:
            delta = delta * (0.05 / delta.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
        again = (x + delta).clamp(0, 1)
    assert torch.allclose(x_adv, again, atol=1e-5)


def test_the_network_is_evaluated_once_per_step():
    calls = []
    classifier = Resnet9(width=4).make(1, 16, 2, seed=0)
    classifier.module.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    x, y = torch.rand(2, 1, 16, 16), torch.tensor([0, 1])
    pgd(classifier, x, y, Budget("linf", 0.1), generator(), steps=4, restarts=2, stop=False)
    assert calls.count(True) == 8  # forward and backward
    assert calls.count(False) == 3  # forward only: the clean images and each restart's end
    calls.clear()
    climb(classifier, x, x, Budget("linf", 0.1), lambda z: margin(z, y), steps=4)
    assert calls == [True] * 4


def test_a_trained_network_falls_and_more_effort_never_helps_it(trained):
    classifier, x, y = trained
    budget = Budget("linf", 0.1)
    with torch.no_grad():
        before = cross_entropy(classifier(x), y).mean()
        noise = cross_entropy(classifier(random_start(x, budget, generator())), y).mean()
        fast = cross_entropy(classifier(fgsm(classifier, x, y, budget, generator())), y).mean()
        strong = cross_entropy(classifier(pgd(classifier, x, y, budget, generator(), steps=10)), y).mean()
    assert before < fast < strong
    assert noise < fast  # random noise is no attack
    assert accuracy(classifier, pgd(classifier, x, y, Budget("linf", 0.3), generator(), steps=10), y) < 0.2


def test_misclassified_goes_before_a_higher_loss():
    class Trap(nn.Module):
        """Label 0 has its highest loss at x = .5, where it is still right; only beyond .9 is it wrong."""

        def forward(self, x_BCHW):
            x_B = x_BCHW.flatten(1).mean(1)
            below_B = 0.98 - (x_B - 0.5).abs()
            second_B = torch.where(x_B > 0.9, 1.0, below_B)
            third_B = torch.where(x_B > 0.9, -50.0, below_B)
            return torch.stack([torch.full_like(x_B, 0.99), second_B, third_B], 1)

    classifier = Classifier(Trap(), 3, mean=0.0, std=1.0)
    probes, y = torch.tensor([0.5, 0.95]).view(2, 1, 1, 1), torch.zeros(200, dtype=torch.int64)
    losses = cross_entropy(classifier(probes), y[:2])
    assert losses[0] > losses[1]  # the trap is set
    x, budget = torch.full((200, 1, 1, 1), 0.5), Budget("linf", 0.5)
    lucky = (random_start(x, budget, generator()) > 0.9).flatten()
    assert 5 < lucky.sum() < 50
    x_adv = pgd(classifier, x, y, budget, generator(), steps=3)
    wrong = classifier(x_adv).argmax(1) != 0
    assert wrong[lucky].all()  # though x = .5 has the higher loss
    assert not wrong.all()


def test_margin_by_hand_and_against_a_saturated_cross_entropy():
    logits = torch.tensor([[1.0, 4.0, 2.5], [200.0, 0.0, 50.0]])
    assert margin(logits, torch.tensor([1, 0])).tolist() == [-1.5, -150.0]
    assert margin(logits, torch.tensor([0, 2])).tolist() == [3.0, 150.0]
    classifier = linear_classifier([500.0] * 4, [-500.0] * 4)
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    assert logits_and_gradient(classifier, x, lambda z: cross_entropy(z, y))[1].abs().max() == 0
    assert (logits_and_gradient(classifier, x, lambda z: margin(z, y))[1] < 0).all()


def test_the_gradient_is_the_gradient_and_keeps_no_graph():
    classifier = linear_classifier([0.0] * 4, [1.0, -2.0, 3.0, -1.0])
    x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])
    with frozen(classifier), torch.no_grad():
        logits, gradient = logits_and_gradient(classifier, x, lambda z: cross_entropy(z, y))
    assert torch.allclose(logits, classifier(x))
    wrong = torch.softmax(classifier(x), 1)[torch.arange(3), 1 - y]
    expected = torch.where(y == 0, 1.0, -1.0)[:, None] * wrong[:, None] * torch.tensor([1.0, -2.0, 3.0, -1.0])
    assert torch.allclose(gradient.flatten(1), expected, atol=1e-6)
    assert not gradient.requires_grad
    assert not logits.requires_grad


def test_frozen_restores_after_an_error_and_when_nested():
    classifier = Resnet9(width=4, norm="batch").make(1, 16, 2, seed=0)
    classifier.module.res1.eval()
    classifier.module.linear.bias.requires_grad_(False)
    flags = [m.training for m in classifier.modules()]
    wants = [p.requires_grad for p in classifier.parameters()]
    with pytest.raises(RuntimeError, match="on purpose"), frozen(classifier), frozen(classifier):
        assert not any(m.training for m in classifier.modules())
        assert not any(p.requires_grad for p in classifier.parameters())
        raise RuntimeError("on purpose")
    assert [m.training for m in classifier.modules()] == flags
    assert [p.requires_grad for p in classifier.parameters()] == wants


def test_a_broken_model_gives_finite_images():
    classifier = linear_classifier([torch.nan] * 4, [1.0] * 4)
    x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    for norm in ("linf", "l2"):
        for x_adv in (
            fgsm(classifier, x, y, Budget(norm, 0.1), generator(), random_start=True),
            pgd(classifier, x, y, Budget(norm, 0.1), generator(), steps=3),
        ):
            assert torch.isfinite(x_adv).all()
            assert (x_adv - x).abs().max() <= 0.1 + 1e-6


def test_broken_images_leave_the_batch(trained):
    classifier, x, y = trained
    sizes, budget = [], Budget("linf", 0.18)
    handle = classifier.module.register_forward_hook(lambda _, images, __: sizes.append(len(images[0])))
    try:
        stopped = pgd(classifier, x, y, budget, generator(), steps=10)
        assert sizes[:2] == [64, 64]  # the clean images, the first gradient
        work = sum(sizes) - sizes[2]  # and the far points
        sizes.clear()
        driven = pgd(classifier, x, y, budget, generator(), steps=10, stop=False)
    finally:
        handle.remove()
    assert work < 0.95 * sum(sizes)
    with torch.no_grad():
        wrong = [classifier(x_adv).argmax(1) != y for x_adv in (stopped, driven)]
        losses = [margin(classifier(x_adv), y).mean() for x_adv in (stopped, driven)]
    assert torch.equal(*wrong)  # stopping saves work and no image
    assert 0 < wrong[0].sum() < len(y)
    assert losses[1] > losses[0]


def test_an_image_is_broken_when_the_model_that_ships_says_so(trained):
    classifier, x, y = trained

    def stubborn(images):
        """The twin with a bias towards the truth of the first half: it takes more to break these."""
        with torch.no_grad():
            return classifier(images) + 1.5 * F.one_hot(torch.where(images[:, 0, :, :8].mean((1, 2)) > 0.49, 0, 1), 2)

    budget = Budget("linf", 0.18)
    for_twin = pgd(classifier, x, y, budget, generator(), steps=20)
    for_shipped = pgd(classifier, x, y, budget, generator(), steps=20, answers=stubborn)
    broken = [(stubborn(x_adv).argmax(1) != y).float().mean() for x_adv in (for_twin, for_shipped)]
    assert broken[1] > broken[0]


def test_the_far_point_along_the_first_gradient_breaks_many_at_once(trained):
    """Computed again; one that it breaks is done with, and the others go on as if it had not been tried."""
    classifier, x, y = trained
    budget = Budget("linf", 0.26)
    start = random_start(x, budget, generator())
    with frozen(classifier), torch.no_grad():
        at_start = classifier(start).argmax(1) != y
    with frozen(classifier):
        _, slope = logits_and_gradient(classifier, start, lambda z: cross_entropy(z, y))
        far = project(start + steepest_step(slope, 2 * budget.radius, "linf"), x, budget)
        with torch.no_grad():
            broken = (classifier(far).argmax(1) != y) & ~at_start
    found = pgd(classifier, x, y, budget, generator(), steps=12)
    assert 3 <= broken.sum() < 60
    assert torch.equal(found[broken], far[broken])
    sizes = []
    handle = classifier.module.register_forward_hook(lambda _, images, __: sizes.append(len(images[0])))
    try:
        pgd(classifier, x, y, budget, generator(), steps=12)
    finally:
        handle.remove()
    assert sizes[2:4] == [int((~at_start).sum()), int((~at_start & ~broken).sum())]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_momentum_goes_the_way_of_mifgsm_from_a_random_start(trained, norm):
    """Dong et al., Algorithm 1, from the start that `pgd` draws; every image of the way competes, the clean one too."""
    classifier, x, y = trained
    budget = Budget(norm, 0.1 if norm == "linf" else 0.8)
    found = pgd(classifier, x, y, budget, generator(), steps=4, step_size=0.3, momentum=0.7, stop=False)
    at, moving, points = random_start(x, budget, generator()), torch.zeros_like(x), [x]
    with frozen(classifier):
        for _ in range(4):
            points.append(at)
            _, slope = logits_and_gradient(classifier, at, lambda z: cross_entropy(z, y))
            moving = 0.7 * moving + slope / slope.abs().mean((1, 2, 3), keepdim=True)
            step = moving.sign() if norm == "linf" else moving / moving.flatten(1).norm(dim=1)[:, None, None, None]
            at = project(at + 0.3 * budget.radius * step, x, budget)
        points.append(at)
        with torch.no_grad():
            logits = torch.stack([classifier(point) for point in points])
    loss = torch.stack([cross_entropy(at_point, y) for at_point in logits]) + 1e3 * (logits.argmax(2) != y)
    expected = torch.stack(points)[loss.argmax(0), torch.arange(len(x))]
    assert torch.allclose(found, expected, atol=1e-5)
    without = pgd(classifier, x, y, budget, generator(), steps=4, step_size=0.3, stop=False)
    assert not torch.equal(found, without)
