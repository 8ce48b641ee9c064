"""Fakes are flagged, honest models are not, and each flag follows from its evidence."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from helpers import fake_defences as fakes
from helpers.small_problem import stripes, trained
from trilemma.attacks.budget import Budget
from trilemma.compression.export import export_onnx
from trilemma.compression.fake_quantisation import quantise
from trilemma.compression.session import Session
from trilemma.evaluation.bounds import bounds
from trilemma.evaluation.diagnostics import Tried, diagnose, examined, judged
from trilemma.evaluation.evidence import _chosen, gather, independent_sample
from trilemma.evaluation.flags import diagnostic_measurements, withheld
from trilemma.evaluation.harness import Target
from trilemma.evaluation.repeats import Repeats, repeated
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9, Resnet18

SIZE = 12
BUDGETS = {"linf": Budget("linf", 24 / 255), "l2": Budget("l2", 0.5)}
NAMES = [
    "zero_gradient",
    "fgsm_beats_pgd",
    "black_box_beats_white_box",
    "large_radius_survives",
    "rises_with_radius",
    "not_converged",
    "logit_scaling",
    "randomised",
    "constant",
    "twin_disagrees",
]


@functools.cache
def learned(num_classes: int = 3):
    return stripes(500, size=SIZE, num_classes=num_classes)


@functools.cache
def held_out(num_classes: int = 3):
    return stripes(128, size=SIZE, num_classes=num_classes, seed=1)  # of 64 patients


@functools.cache
def network(num_classes: int = 3, seed: int = 0):
    return trained(Resnet9(width=4).make(1, SIZE, num_classes, seed), learned(num_classes), steps=50)


@functools.cache
def small(seed: int = 0):
    return fakes.small_network(learned(), 3, seed)


def int8(plain):
    twin = quantise(plain, learned(plain.num_classes).x(slice(0, 64)))
    return Target("int8", Session(export_onnx(twin, 1, SIZE)).predict, twin, (plain,))


def honest(name: str) -> Target:
    """Models whose robustness, much or little, is there."""
    match name:
        case "undefended":
            return fakes.shipped(network())
        case "undefended, 2 classes":
            return fakes.shipped(network(2))
        case "adversarially trained":
            started = trained(Resnet9(width=4).make(1, SIZE, 3, 1), learned(), steps=10)
            return fakes.shipped(fakes.adversarially_trained(started, learned(), BUDGETS["linf"], steps=40))
        case "int8 with its twin":
            return int8(network())
        case "noise on weights, 2 classes":
            return fakes.shipped(fakes.with_noisy_weights(network(2)))
        case "ResNet-18":
            return fakes.shipped(trained(Resnet18(width=4).make(1, SIZE, 3, 0), learned(), steps=40))
        case _:
            return fakes.shipped(fakes.saturated(network(), 0.5))


@functools.cache
def robust(seed: int = 0):
    return fakes.adversarially_trained(fakes.small_network(learned(), 3, seed), learned(), BUDGETS["linf"], steps=120)


@functools.cache
def fake(name: str, inside: str = "plain") -> Target:
    plain = small() if inside == "plain" else robust()
    match name:
        case "constant_predictor":
            return fakes.shipped(fakes.constant_predictor(plain, 1))
        case "int8_without_twin":
            return Target("int8", int8(plain).predict, fakes.rounded_weights(plain))
        case "twin_of_another":
            return fakes.shipped(plain, small(1))
        case "hard_activations":
            return fakes.shipped(fakes.hard_activations(plain, learned()))
        case _:
            return fakes.shipped(getattr(fakes, name)(plain))


def raised(flags):
    return {flag.name for flag in flags if flag.raised}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quantised_input", {"zero_gradient", "large_radius_survives"}),
        ("thermometer", {"zero_gradient", "large_radius_survives"}),
        ("shattered", {"black_box_beats_white_box"}),
        ("true_on_grid", {"fgsm_beats_pgd", "black_box_beats_white_box"}),
        ("sawtooth", {"large_radius_survives"}),
        ("saturated", {"logit_scaling"}),
        ("distilled", {"logit_scaling"}),
        ("clipped", {"zero_gradient"}),
        ("noisy", {"randomised"}),
        ("same_noise", {"randomised"}),
        ("seeded_by_the_batch", {"randomised"}),
        ("resized", {"randomised"}),
        ("detached", {"zero_gradient", "black_box_beats_white_box"}),
        ("hard_activations", {"zero_gradient"}),
        ("hard_answers", {"zero_gradient"}),
        ("constant_predictor", {"constant"}),
        ("int8_without_twin", {"zero_gradient", "large_radius_survives"}),
        ("twin_of_another", {"twin_disagrees"}),
    ],
)
def test_a_fake_is_flagged(name, expected):
    flags = diagnose(fake(name), held_out(), BUDGETS["linf"], 0, num_images=64)
    assert raised(flags) >= expected, withheld(diagnostic_measurements(flags))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quantised_input", {"zero_gradient", "large_radius_survives"}),
        ("true_on_grid", {"fgsm_beats_pgd"}),
        ("sawtooth", {"large_radius_survives"}),
        ("saturated", {"logit_scaling"}),
        ("noisy", {"randomised"}),
        ("seeded_by_the_batch", {"randomised"}),
        ("detached", {"zero_gradient"}),
        ("constant_predictor", {"constant"}),
    ],
)
@pytest.mark.slow
def test_a_fake_is_flagged_around_a_model_that_is_robust_too(name, expected):
    """Little is left to find for an attack that gets round the trick."""
    flags = diagnose(fake(name, "robust"), held_out(), BUDGETS["linf"], 0, num_images=64)
    assert raised(flags) >= expected, withheld(diagnostic_measurements(flags))


def test_the_robust_model_inside_is_not_flagged_and_is_robust():
    flags = diagnose(fakes.shipped(robust()), held_out(), BUDGETS["linf"], 0, num_images=64)
    assert withheld(diagnostic_measurements(flags)) == ""
    left = [examined(fakes.shipped(m), held_out(), BUDGETS["linf"], 0).left_N.mean() for m in (robust(), small())]
    assert left[0] > left[1] + 0.1


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("undefended", "linf"),
        ("undefended", "l2"),
        ("undefended, 2 classes", "l2"),
        ("adversarially trained", "linf"),
        ("int8 with its twin", "linf"),
        ("int8 with its twin", "l2"),
        ("noise on weights, 2 classes", "linf"),
        ("ResNet-18", "linf"),
        ("half the logits", "l2"),
    ],
)
def test_an_honest_model_is_not_flagged(name, norm):
    target = honest(name)
    flags = diagnose(target, held_out(target.twin.num_classes), BUDGETS[norm], 0, num_images=64)
    assert [flag.name for flag in flags] == NAMES
    assert withheld(diagnostic_measurements(flags)) == ""


def sampled(records, num_images, seed):
    return records.subset(independent_sample(records, num_images, seed))


@pytest.fixture(scope="module")
def evidence():
    """What an honest model gives, to be changed."""
    records = sampled(held_out(), 64, 0)
    return gather(fakes.shipped(network()), records, BUDGETS["linf"], 0)


def of(evidence, name):
    return next(flag for flag in judged(evidence) if flag.name == name)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("zero_gradient", {"no_gradient_N": 4}),
        ("rises_with_radius", {"smaller_N": 4}),
        ("not_converged", {"longer_N": 4}),
    ],
)
def test_a_flag_is_raised_at_its_threshold_and_not_far_below(evidence, name, changes):
    ((field, count),) = changes.items()
    many, few = np.arange(64) < count, np.arange(64) < count // 3
    assert of(evidence._replace(**{field: many}), name).raised
    flag = of(evidence._replace(**{field: few}), name)
    assert not flag.raised
    assert flag.value == few.mean()
    assert flag.low <= flag.value <= flag.high


@pytest.mark.parametrize(("stands", "told"), [(6, False), (7, True), (64, True)])
def test_a_model_that_withstands_an_attack_without_bounds(evidence, stands, told):
    """A tenth of 64 is 6.4."""
    kept_MK = np.eye(3)[np.where(np.arange(64) < stands, evidence.labels_N, (evidence.labels_N + 1) % 3)]
    flag = of(evidence._replace(anything_MK=kept_MK), "large_radius_survives")
    assert (flag.raised, flag.value) == (told, stands / 64)


def test_a_model_with_nothing_left_raises_nothing():
    """Robust accuracy 0 is honest: every comparison is a tie."""
    flags = diagnose(fakes.shipped(network()), held_out(), Budget("linf", 80 / 255), 0, num_images=64)
    assert withheld(diagnostic_measurements(flags)) == ""


def test_a_collapse_under_attack_is_constant_where_the_model_leans_to_it(evidence):
    """What always answering one class would reach, by answering hardly anything else under attack."""
    usual = np.bincount(evidence.labels_N).argmax()
    always_NK = np.eye(3)[np.full(64, usual)]
    broken = of(evidence._replace(white_NK=always_NK), "constant")  # right when clean: an attack that aims at one class
    assert not broken.raised
    wrong_N = (np.cumsum(evidence.labels_N != usual) <= 7) & (evidence.labels_N != usual)
    leaning_NK = np.eye(3)[np.where(wrong_N, usual, evidence.labels_N)]
    assert of(evidence._replace(clean_NK=leaning_NK, white_NK=always_NK), "constant").raised
    assert not of(evidence._replace(clean_NK=leaning_NK), "constant").raised
    assert of(evidence._replace(clean_NK=always_NK), "constant").raised


def test_rounding_is_no_randomness_and_more_is(evidence):
    none = np.zeros(64)
    honest_repeats = Repeats(none, np.full(64, 1e-6), none, np.full(64, 1e-2), 1e-3)

    def seen(**changes):
        changed = evidence._replace(session=honest_repeats, twin=honest_repeats._replace(**changes))
        return of(changed, "randomised").raised

    assert not seen()
    assert not seen(regrouped_M=np.where(np.arange(64) < 5, 0.02, 0))  # int8 rounds a few otherwise
    assert seen(regrouped_M=np.where(np.arange(64) < 7, 0.02, 0))
    assert seen(again_M=np.where(np.arange(64) == 3, 0.1, 0), nudged_M=np.full(64, 1.0))
    assert seen(beside_M=np.where(np.arange(64) == 3, 0.1, 0), nudged_M=np.full(64, 1.0))
    assert not seen(beside_M=np.full(64, 1e-4))


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
@pytest.mark.parametrize(("name", "told"), [("noisy", True), ("honest", False)])
def test_what_all_logits_have_in_common_hides_no_noise(offset, name, told):
    inside = fakes.noisy(small()) if name == "noisy" else small()
    moved = fakes.around(inside, after=lambda logits: logits + offset)
    repeats = repeated(moved, held_out().x(slice(0, 32)), 0)
    assert bool((repeats.again_M > repeats.rounding).any()) == told
    assert bool((repeats.beside_M > repeats.rounding).any()) == told


def test_worse_than_always_answering_the_most_frequent_class_is_told_of_the_whole_split(evidence):
    """A sample of it would often be worse by chance."""
    for whole, told in (((0.661, 0.625), False), ((0.625, 0.625), True), ((0.6, 0.625), True)):
        flag = of(evidence._replace(whole=whole), "constant")
        assert flag.raised == told
        assert f"the accuracy is {whole[0]:.3f} where always answering the most frequent class" in flag.evidence
        assert flag.evidence.endswith("of no more use than a constant") == told


def test_what_the_studys_own_white_box_breaks_and_the_diagnostics_do_not_is_a_flag(evidence):
    """Whatever it follows: an AutoAttack breaks some images without gradients."""
    evidence = evidence._replace(white_NK=evidence.clean_NK)
    left_M = np.flatnonzero(~evidence.white_N)
    evidence = evidence._replace(chosen_M=left_M)
    for count, told in ((3, False), (4, True)):
        broken = np.isin(np.arange(64), left_M[:count])
        assert of(evidence._replace(tried_white_N=broken), "not_converged").raised == told
    assert not of(evidence._replace(tried_white_N=evidence.white_N), "not_converged").raised
    few_M = left_M[:2]  # on the others no thorough attack was made: there it is no wonder
    assert not of(evidence._replace(chosen_M=few_M, tried_white_N=np.ones(64, dtype=bool)), "not_converged").raised


def test_from_the_radius_to_twice_the_radius_is_judged_by_what_was_tried(evidence):
    """4 of 64 are too many, also where there are 256 images, and whatever was found within half the radius."""
    wide = {"smaller_N": np.arange(64) < 3, "larger_stands_N": np.arange(64) < 4}
    for num_larger, told in ((64, True), (0, False)):
        flag = of(evidence._replace(num_larger=num_larger, **wide), "rises_with_radius")
        assert flag.raised == told
    assert (flag.value, flag.n) == (3 / 64, 64)


@pytest.mark.parametrize("name", ["black_box_beats_white_box", "rises_with_radius", "not_converged"])
def test_of_those_that_were_drawn_fewer_are_too_many(evidence, name):
    """3 of 32, for they stand for all that are left; 3 of all 64 are not."""
    drawn_M, three, other = np.arange(32), np.arange(64) < 3, np.arange(64) >= 61

    def seen(broken_N):
        fields = {"black_boxes": {"Square": broken_N}, "smaller_N": broken_N, "longer_N": broken_N}
        return of(evidence._replace(drawn_M=drawn_M, **fields), name)

    assert seen(three).raised and "3 of them among the 32 drawn (p = .004)" in seen(three).evidence
    assert (seen(three).value, seen(three).n) == (3 / 32, 32)
    assert not seen(other).raised and not seen(np.arange(64) < 2).raised


class OneClassHidden(nn.Module):
    """Two models: the one answers where the other says class 1, large and by gradients that lead nowhere."""

    def __init__(self, honest, hidden):
        super().__init__()
        self.honest, self.hidden = honest, hidden

    def forward(self, x):
        chosen = self.hidden(x.detach()).argmax(1) == 1
        shattered = 20 * self.hidden(x + 0.01 * torch.sin(1200 * x))
        return torch.where(chosen[:, None], shattered, self.honest(x))


@pytest.mark.parametrize("steps", [pytest.param(16, marks=pytest.mark.slow), 20])
def test_a_model_that_hides_one_class_behind_large_margins_is_found(steps):
    """Its images are never those nearest to an error; half of those that are followed are drawn."""
    records = stripes(512, size=SIZE, num_classes=3, seed=1)  # of 256 patients
    hidden = Classifier(OneClassHidden(robust(), small()), 3, mean=0.0, std=1.0).eval()
    flags = diagnose(fakes.shipped(hidden), records, Budget("linf", steps / 255), 0)
    assert raised(flags), withheld(diagnostic_measurements(flags))


def test_what_is_followed_is_half_near_and_half_drawn():
    logits_NK = np.stack([np.arange(200.0), np.zeros(200)], axis=1)  # the first are the nearest to an error
    labels_N, stands_N = np.zeros(200, dtype=int), np.arange(200) >= 10
    chosen = [_chosen(logits_NK, stands_N, 20, labels_N, seed) for seed in range(3)]
    for index_M, drawn_M in chosen:
        assert set(drawn_M) == set(index_M) - set(range(10, 20))
        assert len(set(index_M)) == 20 and (np.diff(index_M) > 0).all() and stands_N[index_M].all()
        assert set(range(10, 20)) <= set(index_M) and index_M.max() > 60
    assert not np.array_equal(chosen[0][0], chosen[1][0])
    few, drawn = _chosen(logits_NK, np.arange(200) < 20, 20, labels_N, 0)
    assert np.array_equal(few, np.arange(20)) and not len(drawn)


def test_what_is_left_is_left_by_everything():
    """Also by what the study has tried, and by nothing at all: a clean error is one."""
    target, records = fakes.shipped(small()), held_out()
    labels_N = records.labels_N
    wrong = {"planted": np.eye(3)[(labels_N + 1) % 3]}
    alone = examined(target, records, Budget("linf", 1e-6), 0)
    clean_N = alone.errors(alone.clean_NK)
    assert np.array_equal(alone.left_N, ~clean_N)
    assert not examined(target, records, Budget("linf", 1e-6), 0, tried=Tried({}, wrong)).left_N.any()
    told, of_planted = bounds(alone, records, 256, 0, wrong)
    assert (told.metric, told.value, told.n) == ("robust_accuracy_bound", alone.left_N.mean(), len(clean_N))
    assert (of_planted.source, of_planted.value) == ("planted", 0.0)
    (_, of_right) = bounds(alone, records, 256, 0, {"right": np.eye(3)[labels_N]})
    assert of_right.value == pytest.approx(1 - clean_N.mean())  # clean errors stay errors


def test_the_sample_has_one_image_of_each_patient_and_does_not_see_labels():
    records = held_out()
    chosen = sampled(records, 40, 3)
    assert len(chosen) == len(set(chosen.patients_N.tolist())) == 40
    other = records.subset(np.arange(len(records)))
    other.labels_N[:] = 0
    np.testing.assert_array_equal(sampled(other, 40, 3).names_N, chosen.names_N)
    assert set(sampled(records, 40, 4).names_N) != set(chosen.names_N)
    assert len(sampled(records, 256, 0)) == 64


def test_measurements_and_what_is_withheld():
    flags = diagnose(fake("detached"), held_out(), BUDGETS["linf"], 0, num_images=32)
    measured = {m.metric: m for m in diagnostic_measurements(flags)}
    assert list(measured) == [f"flag_{name}" for name in NAMES]
    zero = measured["flag_zero_gradient"]
    assert (zero.value, zero.n, zero.radius) == (1.0, 32, BUDGETS["linf"].radius)
    assert zero.reason.startswith("on 32 of 32 images")
    assert measured["flag_constant"].value == 0.0
    assert "zero_gradient: on 32 of 32 images" in withheld(diagnostic_measurements(flags))
    assert "constant" not in withheld(diagnostic_measurements(flags))
    assert flags == diagnose(fake("detached"), held_out(), BUDGETS["linf"], 0, num_images=32)


def test_the_model_is_left_as_found():
    plain = fakes.small_network(learned(), 3, 2)
    plain.train()
    plain.zero_grad()
    plain.module[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    diagnose(fakes.shipped(plain), held_out().subset(np.arange(16)), BUDGETS["l2"], 0)
    assert all(module.training for module in plain.modules())
    assert [p.requires_grad for p in plain.parameters()] == [False] + [True] * 5
    assert all(parameter.grad is None for parameter in plain.parameters())
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_no_record_gives_no_flag_and_radius_0_is_refused():
    nothing = held_out().subset(np.arange(0))
    assert diagnose(fakes.shipped(network()), nothing, BUDGETS["linf"], 0) == []
    with pytest.raises(ValueError, match="radius above 0"):
        diagnose(fakes.shipped(network()), held_out(), Budget("linf", 0.0), 0)
