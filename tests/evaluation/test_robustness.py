import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.specs import Pgd
from trilemma.evaluation.harness import Target, attacked_logits, clean_logits
from trilemma.evaluation.intervals import wilson
from trilemma.evaluation.robustness import robust_auroc, robust_measurements, worst_logits
from trilemma.models.classifier import Classifier


def _logits(answers, num_classes=2):
    return np.eye(num_classes, dtype=np.float32)[answers] * 3


def _measure(adv, clean, labels, num_classes=2, radius=0.1, source=None, units=None):
    labels_N = np.array(labels)
    units_N = np.arange(len(labels)) if units is None else units
    found = robust_measurements(
        _logits(adv, num_classes), _logits(clean, num_classes), labels_N, units_N, radius, source, 0
    )
    return {m.metric: m for m in found}


def test_every_count_by_hand():
    labels = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    clean_ = [1, 1, 1, 0, 0, 0, 0, 0, 1, 1]  # 7 right
    attack = [1, 0, 0, 1, 0, 0, 0, 1, 0, 1]  # of these 4 stay right; two lucky hits do not count
    m = _measure(attack, clean_, labels, source="other")
    assert m["robust_accuracy"].value == pytest.approx(0.4) and m["robust_accuracy"].n == 10
    assert (m["robust_accuracy"].low, m["robust_accuracy"].high) == wilson(4, 10)
    assert m["robust_accuracy_among_correct"].value == pytest.approx(4 / 7)
    assert m["robust_accuracy_among_correct"].n == 7
    assert m["attack_success_rate"].value == pytest.approx(3 / 7)
    assert (m["attack_success_rate"].low, m["attack_success_rate"].high) == wilson(3, 7)
    assert m["sensitivity"].value == pytest.approx(1 / 4) and m["sensitivity"].n == 4
    assert m["specificity"].value == pytest.approx(3 / 6) and m["specificity"].n == 6
    assert m["above_majority"].value == 0 and "0.400 does not exceed" in m["above_majority"].reason
    assert {x.radius for x in m.values()} == {0.1} and {x.source for x in m.values()} == {"other"}


@settings(deadline=None, max_examples=40)
@given(data=st.data(), n=st.integers(1, 30))
def test_robust_accuracy_never_exceeds_clean_accuracy_nor_that_of_any_attack(data, n):
    draw = st.lists(st.integers(0, 2), min_size=n, max_size=n)
    labels, clean, first, second = (np.array(data.draw(draw)) for _ in range(4))
    worst_NK = worst_logits([_logits(first, 3), _logits(second, 3)], _logits(clean, 3), labels)
    both = worst_NK.argmax(1) == labels
    naive = (clean == labels) & (first == labels) & (second == labels)
    np.testing.assert_array_equal(both, naive)
    m = _measure(first, clean, labels, 3)
    assert m["robust_accuracy"].value <= min((clean == labels).mean(), (first == labels).mean()) + 1e-12
    if m["attack_success_rate"].value is not None:
        total = m["attack_success_rate"].value + m["robust_accuracy_among_correct"].value
        assert total == pytest.approx(1)


def test_the_worst_of_several_is_no_better_than_each():
    rng = np.random.default_rng(0)
    labels, clean, *attacks = rng.integers(3, size=(5, 100))
    worst_NK = worst_logits([_logits(a, 3) for a in attacks], _logits(clean, 3), labels)
    together = robust_measurements(worst_NK, _logits(clean, 3), labels, np.arange(100), 0.1, None, 0)[0]
    alone = [_measure(a, clean, labels, 3)["robust_accuracy"].value for a in attacks]
    assert together.value <= min(alone)
    np.testing.assert_array_equal(worst_logits([], _logits(clean, 3), labels), _logits(clean, 3))


def test_an_attack_that_changes_nothing_leaves_the_clean_accuracy():
    rng = np.random.default_rng(0)
    labels, clean = rng.integers(3, size=(2, 100))
    m = _measure(clean, clean, labels, 3, radius=0.0)
    assert m["robust_accuracy"].value == pytest.approx((clean == labels).mean())
    assert m["attack_success_rate"].value == 0


def test_radius_zero_of_a_real_attack_leaves_the_clean_accuracy(target, test_records):
    evasion, labels_N = Pgd(radii=(0.1,), steps=2).make(), test_records.labels_N
    clean_NK = clean_logits(target, test_records)
    (adv_NK,) = attacked_logits(target.twin, [target], evasion, Budget("linf", 0.0), test_records, 0)
    found = robust_measurements(adv_NK, clean_NK, labels_N, test_records.units(), 0.0, None, 0)
    assert found[0].value == (clean_NK.argmax(1) == labels_N).mean()


def test_a_constant_model_is_marked(test_records):
    import torch
    from torch import nn

    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
    with torch.no_grad():
        network[1].weight.zero_()
        network[1].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    classifier = Classifier(network, 3).eval()
    target = Target("constant", classifier, classifier)
    labels_N = np.where(test_records.labels_N == 0, 1, test_records.labels_N)  # class 1 is the most frequent
    clean_NK = clean_logits(target, test_records)
    evasion = Pgd(radii=(0.1,), steps=2).make()
    (adv_NK,) = attacked_logits(classifier, [target], evasion, Budget("linf", 0.1), test_records, 0)
    m = {m.metric: m for m in robust_measurements(adv_NK, clean_NK, labels_N, test_records.units(), 0.1, None, 0)}
    assert m["robust_accuracy"].value == (labels_N == 1).mean() > 0.5
    assert m["robust_accuracy"].status == "ok"
    assert m["attack_success_rate"].value == 0
    assert m["above_majority"].value == 0 and "most frequent class" in m["above_majority"].reason


def test_a_robust_model_is_above_the_majority():
    labels = [0, 1] * 10
    m = _measure(labels, labels, labels)
    assert m["above_majority"].value == 1 and m["above_majority"].reason == ""


def test_without_a_correct_image_success_is_undefined():
    m = _measure([1, 1], [1, 1], [0, 0])
    for name in ("robust_accuracy_among_correct", "attack_success_rate"):
        assert (m[name].value, m[name].status, m[name].n) == (None, "undefined", 0)
        assert "correctly when clean" in m[name].reason
    assert m["robust_accuracy"].value == 0
    assert m["sensitivity"].value is None


def test_answers_that_are_not_numbers_are_an_attackers_success():
    adv_NK, clean_NK = _logits([0, 1]), _logits([0, 1])
    adv_NK[0] = np.nan
    found = robust_measurements(adv_NK, clean_NK, np.array([0, 1]), np.arange(2), 0.1, None, 0)
    assert found[0].value == 0.5


def test_several_images_of_a_patient_widen_the_interval():
    labels, clean = np.zeros(100, int), np.zeros(100, int)
    adv = np.repeat([0, 1], 50)
    alone = _measure(adv, clean, labels)["robust_accuracy"]
    patients = _measure(adv, clean, labels, units=np.arange(100) // 10)["robust_accuracy"]
    assert patients.high - patients.low > 2 * (alone.high - alone.low)


def _margins(*values):
    return np.stack([np.zeros(len(values)), values], axis=1).astype(np.float32)


def test_an_auroc_under_attack_by_hand():
    """Of 2 x 3 pairs of a positive and a negative, 4 are in order and one is equal."""
    found = robust_auroc(_margins(1, 3, 0, 1, 2), np.array([1, 1, 0, 0, 0]), np.arange(5), 0.1, 0)
    assert (found.metric, found.value, found.radius, found.n) == ("robust_auroc", 4.5 / 6, 0.1, 5)
    assert 0 <= found.low <= found.value <= found.high <= 1 and found.source is None
    turned = robust_auroc(_margins(-3, -2, 1, 2), np.array([1, 1, 0, 0]), np.arange(4), 0.1, 0)
    assert turned.value == 0  # every order the wrong way round: below that of a coin
    units_N = np.array([0, 0, 0, 1, 1])
    patients = robust_auroc(_margins(1, 3, 0, 1, 2), np.array([1, 1, 0, 0, 0]), units_N, 0.1, 0)
    assert patients.value == found.value and (patients.low, patients.high) != (found.low, found.high)


def test_an_auroc_under_attack_that_does_not_exist_has_a_reason():
    alone = robust_auroc(_margins(1, 2), np.array([1, 1]), np.arange(2), 0.1, 0)
    broken = robust_auroc(_margins(1, np.nan), np.array([1, 0]), np.arange(2), 0.1, 0)
    assert (alone.value, alone.status, alone.radius) == (broken.value, broken.status, broken.radius)
    assert alone.status == "undefined" and "no record of class 0" in alone.reason and "1 of 2" in broken.reason


def test_images_driven_to_the_end_rank_no_better_than_those_that_stopped(float_target, test_records):
    """On a model where it makes a difference; which images are broken is the same."""
    labels_N, units_N = test_records.labels_N, test_records.units()
    found, right = [], []
    for stop in (False, True):
        evasion = Pgd(radii=(0.05,), steps=8, loss="margin").make(stop=stop)
        budget = Budget("linf", 0.05)
        (adv_NK,) = attacked_logits(float_target.twin, [float_target], evasion, budget, test_records, 0)
        found.append(robust_auroc(adv_NK, labels_N, units_N, 0.05, 0).value)
        right.append(adv_NK.argmax(1) == labels_N)
    assert found[0] < found[1] and np.array_equal(*right) and 0 < right[0].mean() < 1
