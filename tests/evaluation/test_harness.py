import numpy as np
import pytest
import torch

from helpers.small_problem import stripes
from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.specs import Fgsm, Pgd
from trilemma.evaluation import harness
from trilemma.evaluation.harness import (
    Target,
    agreement_measurements,
    attack_images,
    attacked_logits,
    clean_logits,
    judge,
    legal,
)
from trilemma.evaluation.metrics import predictions

LINF, L2 = Budget("linf", 8 / 255), Budget("l2", 0.5)
budgets = pytest.mark.parametrize("budget", [LINF, L2], ids=["linf", "l2"])


def _within(x_adv, x, budget):
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax(1) if budget.norm == "linf" else delta.norm(dim=1)
    return bool((size <= budget.radius * (1 + 1e-5) + 1e-7).all() and x_adv.min() >= 0 and x_adv.max() <= 1)


def _white_out(classifier, x, y, budget, generator):
    """A cheat: it ignores its budget."""
    return torch.full_like(x, 7.0)


def _broken(classifier, x, y, budget, generator):
    """Every second image is not a number or infinite."""
    x_adv = x.clone()
    x_adv[::2, 0, 0, 0] = float("nan")
    x_adv[1::4, 0, 3, 3] = float("inf")
    return x_adv


@budgets
def test_a_cheating_attack_is_put_back_into_its_budget(float_target, test_records, budget):
    x_adv = attack_images(float_target.twin, _white_out, budget, test_records, 0)
    x = test_records.x()
    assert _within(x_adv, x, budget)
    assert not torch.equal(x_adv, x)
    seen = []

    def predict(images):
        seen.append(images)
        return float_target.predict(images)

    judge(Target("t", predict, float_target.twin), torch.full_like(x, 7.0), x, budget)
    assert _within(seen[0], x, budget)


@budgets
def test_images_that_are_not_numbers_become_the_clean_ones(target, test_records, budget):
    (logits_NK,) = attacked_logits(target.twin, [target], _broken, budget, test_records, 0)
    np.testing.assert_allclose(logits_NK, clean_logits(target, test_records), atol=1e-5)
    assert torch.equal(attack_images(target.twin, _broken, budget, test_records, 0), test_records.x())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_radius_zero_changes_nothing(target, test_records, norm):
    evasion = Pgd(norm=norm, radii=(0.1,), steps=3).make()
    for attack in (evasion, _white_out):
        (logits_NK,) = attacked_logits(target.twin, [target], attack, Budget(norm, 0.0), test_records, 0)
        np.testing.assert_array_equal(logits_NK, clean_logits(target, test_records))


@budgets
def test_a_real_attack_hurts_the_shipped_model_float_or_int8(target, test_records, budget):
    labels_N = test_records.labels_N
    clean = (predictions(clean_logits(target, test_records)) == labels_N).mean()
    evasion = Pgd(norm=budget.norm, radii=(budget.radius,), steps=5).make()
    larger = Budget(budget.norm, 8 * budget.radius)
    (logits_NK,) = attacked_logits(target.twin, [target], evasion, larger, test_records, 0)
    assert clean > 0.95
    assert (predictions(logits_NK) == labels_N).mean() < 0.5


def test_int8_falls_about_as_far_as_float(float_target, int8_target, test_records):
    """The negative control of gradient masking: rounding must not look like a defence."""
    evasion, budget = Pgd(radii=(0.1,), steps=5).make(), Budget("linf", 0.1)
    fallen = []
    for target in (float_target, int8_target):
        (logits_NK,) = attacked_logits(target.twin, [target], evasion, budget, test_records, 0)
        fallen.append((predictions(logits_NK) == test_records.labels_N).mean())
    assert abs(fallen[0] - fallen[1]) < 0.1


def test_one_attack_is_judged_on_every_target(float_target, int8_target, test_records):
    evasion = Fgsm(radii=(8 / 255,)).make()
    both = attacked_logits(float_target.twin, [float_target, int8_target], evasion, LINF, test_records, 3)
    for logits_NK, target in zip(both, (float_target, int8_target), strict=True):
        (alone_NK,) = attacked_logits(float_target.twin, [target], evasion, LINF, test_records, 3)
        np.testing.assert_array_equal(logits_NK, alone_NK)
    x_adv = attack_images(float_target.twin, evasion, LINF, test_records, 3)
    np.testing.assert_allclose(float_target.predict(x_adv).numpy(), both[0], atol=1e-5)


def test_the_seed_and_only_the_seed_decides(float_target, test_records):
    evasion = Pgd(radii=(0.1,), steps=1).make()
    torch.manual_seed(0)
    first = attack_images(float_target.twin, evasion, LINF, test_records, 0)
    torch.manual_seed(1)
    assert torch.equal(attack_images(float_target.twin, evasion, LINF, test_records, 0), first)
    assert not torch.equal(attack_images(float_target.twin, evasion, LINF, test_records, 1), first)
    start = harness.BATCH_SIZE
    part = test_records.subset(np.arange(start))
    assert torch.equal(attack_images(float_target.twin, evasion, LINF, part, 0), first[:start])


def test_an_empty_split_gives_empty_logits(float_target):
    empty = stripes(10, size=16).subset(np.arange(0))
    evasion = Fgsm(radii=(0.1,)).make()
    assert clean_logits(float_target, empty).shape == (0, 3)
    assert attacked_logits(float_target.twin, [float_target], evasion, LINF, empty, 0)[0].shape == (0, 3)
    assert attack_images(float_target.twin, evasion, LINF, empty, 0).shape == (0, 1, 16, 16)
    assert {m.status for m in agreement_measurements(float_target, np.zeros((0, 3)), empty)} == {"undefined"}


def test_legal_images_are_left_alone(test_records):
    x = test_records.x(slice(8))
    inside = (x + 0.5 * LINF.radius).clamp(0, 1)
    assert torch.allclose(legal(inside, x, LINF), inside, atol=1e-7)


def test_a_twin_agrees_with_its_model_and_a_stranger_does_not(float_target, int8_target, test_records):
    logits_NK = clean_logits(int8_target, test_records)
    difference, agreement = agreement_measurements(int8_target, logits_NK, test_records)
    spread = logits_NK.std()
    assert difference.metric == "twin_logit_difference" and 0 <= difference.value < 0.2 * spread
    assert agreement.metric == "twin_agreement" and agreement.value > 0.98
    assert agreement.low <= agreement.value <= agreement.high
    stranger = Target("x", int8_target.predict, lambda x: -float_target.twin(x))  # negative control
    stranger.twin.device = torch.device("cpu")
    far, apart = agreement_measurements(stranger, logits_NK, test_records)
    assert far.value > spread and apart.value < 0.1


def test_a_difference_that_is_not_finite_is_not_a_number(float_target, test_records):
    logits_NK = clean_logits(float_target, test_records)
    logits_NK[0, 0] = np.inf
    difference, _ = agreement_measurements(float_target, logits_NK, test_records)
    assert difference.value is None and difference.status == "undefined" and "finite" in difference.reason
