import functools

import pytest
import torch

from helpers import toolbox
from helpers.gratings import gratings, hardened
from helpers.smallest_problem import answered, curved, grey, linear, linear_distances, searched
from reference.naive_evasion import fab_one, length_one, plane_step_one
from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion import fab as module
from trilemma.attacks.evasion.boundary import BEYOND
from trilemma.attacks.evasion.deepfool import follow_boundary
from trilemma.attacks.evasion.fab import approach, fab
from trilemma.attacks.evasion.frozen import frozen
from trilemma.attacks.evasion.geometry import project
from trilemma.attacks.evasion.pgd import pgd

norms = pytest.mark.parametrize("norm", ["linf", "l2"])
problem = functools.cache(hardened)


def attacked(classifier, x, y, budget, steps=15, seed=0, **settings):
    return fab(classifier, x, y, budget, torch.Generator().manual_seed(seed), steps=steps, **settings)


def from_start(smallest, start, steps):
    approach(smallest, start, smallest.likeliest_wrong(), steps=steps)


def from_clean(steps):
    return lambda s: approach(s, s.x_BCHW, s.likeliest_wrong(), steps=steps)


def aimed(steps):
    def search(s):
        for aims in s.likeliest_wrong().split(1, dim=1):
            approach(s, s.x_BCHW, aims, steps=steps)

    return search


@norms
@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("search", [from_clean, aimed])
def test_a_linear_model_is_broken_at_its_known_distance(norm, num_classes, search):
    classifier, x = linear(num_classes), grey(12)
    y = answered(classifier, x)
    ratio = searched(classifier, x, y, norm, search(10)).distance_B / linear_distances(classifier, x, y, norm)
    assert ratio.min() >= 1 - 1e-9
    assert ratio.max() <= 1.002


@norms
def test_within_0_and_1_the_distance_is_that_of_a_general_solver(norm):
    classifier, x = linear(2), grey(10, 1.5)
    y = answered(classifier, x)
    weight = classifier.module[1].weight.detach()
    with torch.no_grad():
        logits = classifier(x)
    found = searched(classifier, x, y, norm, from_clean(10)).distance_B
    for i in range(len(x)):
        wrong, true = 1 - y[i], y[i]
        gap = float(logits[i, wrong] - logits[i, true])
        expected = length_one(plane_step_one(x[i], (weight[wrong] - weight[true]).view(1, 6, 6), gap, norm), norm)
        assert expected <= float(found[i]) * (1 + 1e-6)
        assert float(found[i]) <= 1.003 * expected


@norms
def test_breaks_just_beyond_the_distance_and_not_before(norm):
    classifier, x = linear(3), grey(6)
    y = answered(classifier, x)
    for i, least in enumerate(linear_distances(classifier, x, y, norm).tolist()):
        one, label = x[i : i + 1], y[i : i + 1]
        assert (answered(classifier, attacked(classifier, one, label, Budget(norm, least * 1.01))) != label).all()
        x_adv = attacked(classifier, one, label, Budget(norm, least * 0.99))
        assert (answered(classifier, x_adv) == label).all()
        assert (x_adv != one).any()


@norms
@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize(("share", "steps"), [(0.0, 6), (0.4, 1), (0.4, 3)])
def test_finds_what_the_twin_for_one_image_finds(norm, num_classes, share, steps, monkeypatch):
    monkeypatch.setattr(module, "FINAL_STEPS", 0)
    classifier, x = curved(num_classes), grey(5, 1.2)
    y, start = answered(classifier, x), x + share * (grey(5, 1.2, seed=8) - x)
    search = functools.partial(from_start, start=start, steps=steps)
    found = searched(classifier, x, y, norm, search).distance_B
    for i in range(len(x)):
        wrong = [k for k in range(num_classes) if k != y[i]]
        expected = fab_one(classifier, x[i], start[i], int(y[i]), wrong, norm, steps, BEYOND)
        assert float(found[i]) == pytest.approx(expected, rel=1e-3)


@norms
def test_the_final_search_undoes_the_overshoot_of_a_linear_model(norm, monkeypatch):
    classifier, x = linear(2), grey(8)
    y = answered(classifier, x)
    least = linear_distances(classifier, x, y, norm)
    after = searched(classifier, x, y, norm, from_clean(1)).distance_B / least
    monkeypatch.setattr(module, "FINAL_STEPS", 0)
    before = searched(classifier, x, y, norm, from_clean(1)).distance_B / least
    assert torch.allclose(before, torch.tensor(1.05, dtype=torch.float64), atol=1e-3)
    assert after.max() < 1.0001


@norms
def test_the_final_search_moves_nearer_and_stays_wrong(norm, monkeypatch):
    classifier, (x, _) = problem(2), gratings(20, num_classes=2, seed=5)
    y = answered(classifier, x)
    after = searched(classifier, x, y, norm, from_clean(4))
    monkeypatch.setattr(module, "FINAL_STEPS", 0)
    before = searched(classifier, x, y, norm, from_clean(4))
    assert (after.distance_B <= before.distance_B).all()
    assert after.distance_B.mean() < before.distance_B.mean()
    assert (answered(classifier, after.nearest_BCHW) != y).all()


@norms
def test_targets_one_by_one_and_all_at_once(norm):
    classifier, (x, _) = problem(3), gratings(60, num_classes=3, seed=5)
    y = answered(classifier, x)
    nearest = [searched(classifier, x, y, norm, search(15)).distance_B for search in (from_clean, aimed)]
    assert nearest[1].median() <= 1.02 * nearest[0].median()
    radius = Budget(norm, float(nearest[1].median()))
    # One target is the likeliest wrong class; more than there are means all.
    one, two, many = (attacked(classifier, x, y, radius, num_targets=n) for n in (1, 2, 9))
    assert torch.equal(two, many)
    assert (answered(classifier, two) == y).sum() <= (answered(classifier, one) == y).sum()


@norms
def test_with_two_classes_there_is_one_target(norm):
    classifier, (x, _) = problem(2), gratings(10, num_classes=2, seed=5)
    y, budget = answered(classifier, x), Budget(norm, 0.05 if norm == "linf" else 0.5)
    plain = attacked(classifier, x, y, budget, restarts=2)
    assert torch.equal(plain, attacked(classifier, x, y, budget, restarts=2, num_targets=1))


@norms
def test_starts_are_random_at_half_the_radius_and_draw_alike_whatever_breaks(norm):
    classifier, x = linear(3), grey(4)
    y, states = answered(classifier, x), []
    for radius in (1e-6, 1.0, 0.02):
        generator = torch.Generator().manual_seed(0)
        fab(classifier, x, y, Budget(norm, radius), generator, steps=3, restarts=3, num_targets=2)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
    start = module._start(x, Budget(norm, 0.2), torch.Generator().manual_seed(0))
    delta = start - x
    size = delta.flatten(1).abs().amax(1) if norm == "linf" else delta.flatten(1).norm(dim=1)
    assert torch.allclose(size, torch.tensor(0.1, dtype=torch.float64))


@norms
def test_goes_on_until_the_model_that_ships_errs(norm):
    classifier, shipped, x = linear(2), linear(2), grey(8)
    y = torch.zeros(8, dtype=torch.long)
    with torch.no_grad():
        shipped.module[1].bias[0] += 1.5
    budget = Budget(norm, float(linear_distances(shipped, x, y, norm).max()) * 1.5)
    alone = attacked(classifier, x, y, budget)
    assert (answered(classifier, alone) != y).all()
    assert (answered(shipped, alone) == y).any()
    assert (answered(shipped, attacked(classifier, x, y, budget, answers=shipped)) != y).all()
    # The twin errs on the clean images and the model that ships does not: the search goes on from there.
    with torch.no_grad():
        classifier.module[1].bias[0] -= 3.0
    assert (answered(classifier, x) != y).all()
    assert (answered(shipped, attacked(classifier, x, y, budget, answers=shipped)) != y).all()


def test_a_model_that_ships_and_never_errs_is_never_broken():
    classifier, x = linear(2), grey(4)
    y, budget = torch.zeros(4, dtype=torch.long), Budget("l2", 0.4)
    x_adv = attacked(classifier, x, y, budget, answers=lambda z: torch.tensor([[1.0, 0.0]]).expand(len(z), 2))
    assert ((x_adv - x).flatten(1).norm(dim=1) <= 0.4 * (1 + 1e-9)).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def test_a_flat_model_leaves_the_images_alone():
    classifier, x = linear(3), grey(4)
    with torch.no_grad():
        classifier.module[1].weight.zero_()
    x_adv = attacked(classifier, x, answered(classifier, x), Budget("linf", 0.1))
    assert torch.equal(x_adv, x)


def test_logits_that_are_not_numbers_do_not_move_images_out_of_the_numbers():
    classifier, x = linear(3), grey(4)
    classifier.module.append(torch.nn.Threshold(-1e9, float("nan")))
    with torch.no_grad():
        classifier.module[1].weight[1] *= 1e300  # overflows in the gradients' sums
    y = torch.zeros(4, dtype=torch.long)
    with frozen(classifier):
        x_adv = attacked(classifier, x, y, Budget("linf", 0.1), answers=lambda z: torch.eye(3)[:1].expand(len(z), 3))
    assert x_adv.isfinite().all()


@norms
def test_nearer_than_deepfool_and_as_strong_as_pgd(norm):
    classifier, (x, _) = problem(2), gratings(40, num_classes=2, seed=6)
    y = answered(classifier, x)
    ours = searched(classifier, x, y, norm, from_clean(25)).distance_B
    deepfool = searched(classifier, x, y, norm, lambda s: follow_boundary(s, steps=50, overshoot=0.02)).distance_B
    assert ours.isfinite().all()
    assert ours.median() <= deepfool.median()
    budget = Budget(norm, float(ours.median()))
    by_pgd = pgd(classifier, x, y, budget, torch.Generator().manual_seed(0), steps=40, restarts=2, loss="margin")
    by_fab = attacked(classifier, x, y, budget, steps=25)
    assert (answered(classifier, by_fab) == y).sum() <= (answered(classifier, by_pgd) == y).sum() + 2


def test_nearer_than_the_robustness_toolbox():
    classifier, (x, _) = problem(3), gratings(60, num_classes=3, seed=5)
    ours = searched(classifier, x, answered(classifier, x), "l2", from_clean(25)).distance_B
    assert float(ours.median()) <= float(toolbox.deepfool_distances(classifier, x, steps=50).median())


@norms
def test_what_breaks_stays_broken_when_it_is_judged_alone_and_projected_again(norm):
    classifier, (x, _) = problem(2), gratings(60, num_classes=2, seed=7)
    y = answered(classifier, x)
    budget = Budget(norm, 0.06 if norm == "linf" else 0.5)
    x_adv = attacked(classifier, x, y, budget)
    wrong = answered(classifier, x_adv) != y
    assert 10 <= wrong.sum() <= 50
    for i in wrong.nonzero().squeeze(1):
        again = project(x_adv[i : i + 1], x[i : i + 1], budget)
        assert (answered(classifier, again) != y[i : i + 1]).all()
