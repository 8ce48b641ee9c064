import pytest
import torch

from helpers import toolbox
from helpers.gratings import gratings, hardened
from helpers.smallest_problem import answered, curved, grey, linear, linear_distances, searched
from reference.naive_evasion import length_one, plane_step_one
from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.carlini_wagner import carlini_wagner, descend, search_weights
from trilemma.models.classifier import Classifier


def attacked(classifier, x, y, budget, steps=40, searches=4, learning_rate=0.05, answers=None):
    return carlini_wagner(
        classifier,
        x,
        y,
        budget,
        torch.Generator(),
        steps=steps,
        searches=searches,
        learning_rate=learning_rate,
        answers=answers,
    )


def distances(classifier, x, y, **settings):
    settings = {"steps": 100, "searches": 6, "learning_rate": 0.05, **settings}
    return searched(classifier, x, y, "l2", lambda s: search_weights(s, **settings)).distance_B


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_a_linear_model_is_broken_at_its_known_distance(num_classes):
    classifier, x = linear(num_classes), grey(12)
    y = answered(classifier, x)
    ratio = distances(classifier, x, y) / linear_distances(classifier, x, y, "l2")
    assert ratio.min() >= 1
    assert ratio.median() <= 1.01
    # The margin leads to the likeliest wrong class, whose boundary is not always the nearest.
    assert ratio.max() <= (1.01 if num_classes == 2 else 1.25)


def test_within_0_and_1_the_distance_is_that_of_a_general_solver():
    classifier, x = linear(2), grey(10, 1.5)  # many pixels are exactly 0 or 1
    y = answered(classifier, x)
    ratio = distances(classifier, x, y) / box_distances(classifier, x, y)
    assert ratio.min() >= 1 - 1e-6
    assert ratio.max() <= 1.03


def box_distances(classifier, x, y):
    weight = classifier.module[1].weight.detach()
    with torch.no_grad():
        logits = classifier(x)
    found = []
    for i in range(len(x)):
        wrong, true = 1 - y[i], y[i]
        gap = float(logits[i, wrong] - logits[i, true])
        found.append(length_one(plane_step_one(x[i], (weight[wrong] - weight[true]).view(1, 6, 6), gap, "l2"), "l2"))
    return torch.tensor(found)


def test_breaks_just_beyond_the_distance_and_not_before():
    classifier, x = linear(2), grey(3)
    y = answered(classifier, x)
    for i, least in enumerate(linear_distances(classifier, x, y, "l2").tolist()):
        one, label = x[i : i + 1], y[i : i + 1]
        x_adv = attacked(classifier, one, label, Budget("l2", least * 1.05))
        assert (answered(classifier, x_adv) != label).all()
        assert (x_adv - one).norm() <= least * 1.05 * (1 + 1e-9)
        assert (answered(classifier, attacked(classifier, one, label, Budget("l2", least * 0.99))) == label).all()


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_scaling_the_logits_changes_nothing(factor):
    class Scaled(Classifier):
        def forward(self, x_BCHW):
            return factor * super().forward(x_BCHW)

    plain = curved(3)
    x = grey(6, 1.2)
    y = answered(plain, x)
    scaled = Scaled(plain.module, 3, mean=plain.mean, std=plain.std)
    assert torch.allclose(distances(scaled, x, y), distances(plain, x, y), rtol=0.02)


def test_more_searches_find_nearer_images():
    classifier, x = hardened(2), gratings(12, num_classes=2, seed=5)[0]
    y = answered(classifier, x)
    one, six = (distances(classifier, x, y, steps=30, searches=n) for n in (1, 6))
    assert six.isfinite().all()
    assert (six <= one).all()
    assert six.mean() < one[one.isfinite()].mean() or not one.isfinite().all()


def test_a_heavier_weight_finds_where_a_light_one_does_not():
    classifier, x = linear(2), grey(3)
    y = answered(classifier, x)
    for weight, expected in ((1e-6, False), (1e3, True)):
        met = []
        searched(
            classifier,
            x,
            y,
            "l2",
            lambda s, w=weight, m=met: m.append(
                descend(s, torch.full((3,), w, dtype=torch.float64), steps=50, learning_rate=0.05)
            ),
        )
        assert (met[0] == expected).all()


def test_goes_on_until_the_model_that_ships_errs():
    classifier, shipped, x = linear(2), linear(2), grey(8)
    y = torch.zeros(8, dtype=torch.long)
    with torch.no_grad():
        shipped.module[1].bias[0] += 1.5
    budget = Budget("l2", 4.0)
    alone = attacked(classifier, x, y, budget, learning_rate=0.01)
    assert (answered(classifier, alone) != y).all()
    assert (answered(shipped, alone) == y).any()
    assert (answered(shipped, attacked(classifier, x, y, budget, learning_rate=0.01, answers=shipped)) != y).all()


def test_a_flat_model_leaves_the_images_alone():
    classifier, x = linear(3), grey(4)
    with torch.no_grad():
        classifier.module[1].weight.zero_()
    assert torch.equal(attacked(classifier, x, answered(classifier, x), Budget("l2", 1.0), steps=5, searches=2), x)


def test_measures_in_l2_only():
    with pytest.raises(ValueError, match="L2"):
        attacked(linear(2), grey(1), torch.zeros(1, dtype=torch.long), Budget("linf", 0.1))


@pytest.mark.parametrize("num_classes", [2, 3])
def test_distances_are_those_of_the_robustness_toolbox_or_smaller(num_classes):
    classifier, x = hardened(num_classes), gratings(8, num_classes=num_classes, seed=5)[0]
    ours = distances(classifier, x, answered(classifier, x), steps=60)
    theirs = toolbox.carlini_wagner_distances(classifier, x, steps=8, searches=6)
    assert ours.isfinite().all()
    assert float(ours.median()) <= 1.05 * float(theirs.median())
