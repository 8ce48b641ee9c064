"""Distillation: a student comes to answer as its teacher does."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from helpers.small_problem import stripes, trained
from trilemma.compression.distillation import _divergence, _mixed, distil
from trilemma.compression.pruning import prune, prune_n_of_m, sparsity
from trilemma.compression.specs import Distillation
from trilemma.compression.step import Material
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9
from trilemma.models.weight_standardisation import WeightStandardisedConv2d
from trilemma.randomness import generator

USUAL = {"epochs": 3, "learning_rate": 0.003, "batch_size": 16, "temperature": 2.0, "seed": 0}


@pytest.fixture(scope="module")
def records():
    return stripes(160, size=16)


@pytest.fixture(scope="module")
def teacher(records):
    return trained(Resnet9(width=8, norm="batch").make(1, 16, 3, 0), records, steps=40)


@pytest.fixture(scope="module")
def x(records):
    return records.x(slice(0, 100))


def student(seed=1, **fields):
    return Resnet9(width=4, **fields).make(1, 16, 3, seed)


def apart(one, other, x):
    """The mean Kullback-Leibler divergence of the answers, by numpy."""
    with torch.no_grad():
        p, q = (net(x).double().softmax(1).numpy() for net in (other, one))
    return float((p * (np.log(p) - np.log(q))).sum(1).mean())


def test_the_student_comes_to_answer_as_the_teacher_does(teacher, x, records):
    unseen = records.x(slice(100, 160))
    begun, taught = student().eval(), distil(student(), teacher, x, **{**USUAL, "epochs": 8})
    assert not taught.training
    assert apart(taught, teacher, unseen) < 0.3 * apart(begun, teacher, unseen)
    labels = records.y(slice(100, 160))
    with torch.no_grad():
        assert (taught(unseen).argmax(1) == labels).float().mean() > 0.85, "and nobody told it a label"


def test_the_teacher_is_left_as_it_was(teacher, x):
    before = copy.deepcopy(teacher.state_dict())
    distil(student(), teacher, x[:20], **USUAL)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training


@pytest.mark.parametrize("pruned", [lambda net: prune(net, 0.8), lambda net: prune_n_of_m(net, 1, 4)])
def test_weights_that_are_zero_stay_zero_and_the_others_learn(teacher, x, pruned):
    sparse = pruned(student().eval())
    before = copy.deepcopy(sparse.state_dict())
    taught = distil(copy.deepcopy(sparse), teacher, x, **USUAL)
    for name, value in taught.state_dict().items():
        if value.ndim > 1:
            assert (value[before[name] == 0] == 0).all()
            assert (value[before[name] != 0] != before[name][before[name] != 0]).float().mean() > 0.5
    assert sparsity(taught) == sparsity(sparse) > 0.7
    assert apart(taught, teacher, x) < apart(sparse, teacher, x)


def test_a_bias_of_zero_learns(teacher, x):
    begun = student()
    names = [name for name, value in begun.named_parameters() if value.ndim == 1 and not value.any()]
    taught = dict(distil(begun, teacher, x[:32], **USUAL).named_parameters())
    assert names and all(taught[name].any() for name in names)


def test_the_seed_decides_all_of_it(teacher, x):
    state = torch.get_rng_state()
    first, again, other = (distil(student(), teacher, x[:32], **{**USUAL, "seed": seed}) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    assert any(not torch.equal(value, other.state_dict()[name]) for name, value in first.state_dict().items())


def test_dropout_draws_from_the_seed_too(teacher, x):
    begun = Classifier(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 3)), 3)
    taught = []
    for before in (0, 99):
        torch.manual_seed(before)
        taught.append(distil(copy.deepcopy(begun), teacher, x[:32], **USUAL).module[2].weight)
    assert torch.equal(*taught)


def test_weights_that_become_infinite_are_refused(teacher, x):
    with pytest.raises(ValueError, match=r"learning_rate 1e\+25 is too large: the student's weights became infinite"):
        distil(student(), teacher, x[:32], **{**USUAL, "learning_rate": 1e25})


def test_a_last_image_alone_is_passed_over(teacher, x):
    """Batch norm has no variance of one image, where the network ends in one pixel."""
    small = x[:17, :, :8, :8]
    whole = distil(student(norm="batch"), teacher, small, **{**USUAL, "batch_size": 8, "epochs": 1})
    assert all(value.isfinite().all() for value in whole.state_dict().values())
    for few in (0, 1):
        with pytest.raises(ValueError, match=f"at least two images, and there are {few}"):
            distil(student(), teacher, x[:few], **USUAL)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_is_the_divergence_at_a_temperature(temperature):
    draws = np.random.default_rng(0)
    ours, theirs = draws.normal(size=(2, 7, 3)) * 3

    def softened(logits):
        powers = np.exp(logits / temperature)
        return powers / powers.sum(1, keepdims=True)

    p, q = softened(theirs), softened(ours)
    expected = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    assert float(_divergence(torch.tensor(ours), torch.tensor(theirs), temperature)) == pytest.approx(expected)
    assert float(_divergence(torch.tensor(ours), torch.tensor(ours), temperature)) == pytest.approx(0, abs=1e-12)


def nearest_mixture(target, x):
    """How far an image is from the nearest mixture of two of some images."""
    least = 1.0
    for one in x:
        direction, rest = x - one, target - one
        share_N = (direction * rest).flatten(1).sum(1) / direction.flatten(1).square().sum(1).clamp_min(1e-12)
        share_N = share_N.clamp(0, 1)
        error_N = (share_N[:, None, None, None] * direction - rest).flatten(1).abs().amax(1)
        least = min(least, float(error_N.min()))
    return least


def test_mixtures_lie_between_two_images_or_their_mirrors():
    x = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    mixed = _mixed(x, generator(0, "mixtures"))
    flipped = 0
    for each in mixed:
        left = [nearest_mixture(target, x) for target in (each, each.flip(-1))]
        assert min(left) < 1e-4
        flipped += left[1] < left[0]
    assert 8 < flipped < 32, "about half"


def test_a_new_student_with_standardised_weights_trains_with_them(teacher, x):
    spec = Distillation(student=Resnet9(width=4, norm="weight"), num_images=32, epochs=1, batch_size=16)
    taught = spec.apply(teacher, Material(teacher, lambda looks: x[: looks.count], (1, 16, 16), 0))
    convs = [module for module in taught.modules() if isinstance(module, nn.Conv2d)]
    assert convs and not any(isinstance(module, WeightStandardisedConv2d) for module in convs)
    for conv in convs:  # a standardised filter adds up to zero, whatever it learnt
        assert conv.weight.flatten(1).sum(1).abs().max() < 1e-4 * conv.weight.abs().max() * conv.weight[0].numel()


def test_a_new_student_starts_from_the_seed(teacher, x):
    def taught(seed):
        spec = Distillation(student=Resnet9(width=4), num_images=16, epochs=1)
        return spec.apply(teacher, Material(teacher, lambda looks: x[: looks.count], (1, 16, 16), seed)).state_dict()

    first, again, other = taught(0), taught(0), taught(1)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items() if value.ndim == 4)
