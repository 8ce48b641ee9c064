import pytest
import torch

from helpers import toolbox
from helpers.gratings import gratings, hardened
from helpers.smallest_problem import answered, curved, grey, linear, linear_distances, searched
from reference.naive_evasion import deepfool_one
from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.boundary import BEYOND
from trilemma.attacks.evasion.deepfool import deepfool, follow_boundary

norms = pytest.mark.parametrize("norm", ["linf", "l2"])


def attacked(classifier, x, y, budget, steps=20, answers=None, **settings):
    return deepfool(classifier, x, y, budget, torch.Generator(), steps=steps, answers=answers, **settings)


@norms
@pytest.mark.parametrize("num_classes", [2, 3, 12])
def test_a_linear_model_is_broken_at_its_known_distance_and_no_sooner(norm, num_classes):
    classifier, x = linear(num_classes), grey(8)
    y = answered(classifier, x)
    distance = linear_distances(classifier, x, y, norm)
    for i in range(len(x)):
        one, label, least = x[i : i + 1], y[i : i + 1], float(distance[i])
        inside, outside = Budget(norm, least * 1.021), Budget(norm, least * 0.99)
        assert (answered(classifier, attacked(classifier, one, label, inside, steps=1)) != label).all()
        x_adv = attacked(classifier, one, label, outside)
        assert (answered(classifier, x_adv) == label).all()
        assert (x_adv != one).any()  # what was found farther away comes back projected


@norms
@pytest.mark.parametrize("num_classes", [2, 4])
def test_ends_where_the_twin_for_one_image_ends(norm, num_classes):
    classifier, x = curved(num_classes), grey(6, 1.2)
    y = answered(classifier, x)
    found = searched(classifier, x, y, norm, lambda s: follow_boundary(s, steps=10, overshoot=0.02))
    crossed = found.distance_B.isfinite()
    assert crossed.sum() >= 4
    for i in range(len(x)):
        wrong = [k for k in range(num_classes) if k != y[i]]
        expected = deepfool_one(classifier, x[i], int(y[i]), wrong, norm, 10, BEYOND)
        assert (answered(classifier, expected[None]) != y[i]) == crossed[i]
        if crossed[i]:
            assert torch.allclose(found.nearest_BCHW[i], expected, atol=1e-9)


def test_overshoot_lengthens_the_perturbation():
    classifier, x = linear(3), grey(8)
    y = answered(classifier, x)
    ends = [
        searched(classifier, x, y, "l2", lambda s, o=overshoot: follow_boundary(s, steps=1, overshoot=o)).distance_B
        for overshoot in (0.0, 0.5)
    ]
    assert torch.allclose(ends[1], 1.5 * ends[0])


def test_looks_at_the_nine_likeliest_classes_only():
    classifier, x = linear(12), grey(3)
    y, asked = answered(classifier, x), []
    original = torch.autograd.grad
    try:
        torch.autograd.grad = lambda *a, **k: (asked.append(1), original(*a, **k))[1]
        attacked(classifier, x, y, Budget("l2", 10.0), steps=1)
    finally:
        torch.autograd.grad = original
    assert len(asked) == 9


def test_goes_on_until_the_model_that_ships_errs():
    classifier, shipped, x = linear(3), linear(3), grey(8)
    y = answered(classifier, x)
    with torch.no_grad():
        shipped.module[1].bias += 0.3 * torch.nn.functional.one_hot(y[:1], 3)[0]
    y = torch.full_like(y, int(y[0]))
    assert (answered(shipped, x) == y).all()
    budget = Budget("l2", 3.0)
    alone = attacked(classifier, x, y, budget)
    assert (answered(classifier, alone) != y).all()
    assert (answered(shipped, alone) == y).any()  # the twin's word is not enough
    with torch.no_grad():
        confirmed = attacked(classifier, x, y, budget, answers=shipped)
    assert (answered(shipped, confirmed) != y).all()


def test_a_flat_model_leaves_the_images_alone():
    classifier, x = linear(3), grey(4)
    with torch.no_grad():
        classifier.module[1].weight.zero_()
    y = answered(classifier, x)
    assert torch.equal(attacked(classifier, x, y, Budget("l2", 1.0)), x)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_distances_are_those_of_the_robustness_toolbox(num_classes):
    classifier, x = hardened(num_classes), gratings(60, num_classes=num_classes, seed=5)[0]
    ours = searched(
        classifier, x, answered(classifier, x), "l2", lambda s: follow_boundary(s, steps=50, overshoot=0.02)
    )
    theirs = toolbox.deepfool_distances(classifier, x, steps=50)
    assert ours.distance_B.isfinite().all()
    assert float(ours.distance_B.median()) <= 1.05 * float(theirs.median())
