import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reference.naive_clipping import clipped_sum
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9, Resnet18
from trilemma.models.vector import num_params
from trilemma.privacy import clipping
from trilemma.privacy.clipping import clipped_gradient_sum
from trilemma.privacy.clipping_rules import Flat
from trilemma.robustness.objectives import mean_cross_entropy

CLASSES = 3


def small_net() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, CLASSES)
    return Classifier(nn.Sequential(*layers), CLASSES)


def frozen_start() -> Classifier:
    classifier = small_net()
    classifier.module[0].requires_grad_(False)
    return classifier


NETS = {
    "resnet9": lambda: Resnet9(width=4).make(1, 16, CLASSES, seed=1),
    "resnet9 mish": lambda: Resnet9(width=4, activation="mish").make(1, 16, CLASSES, seed=1),
    "resnet9 no norm": lambda: Resnet9(width=4, norm="none").make(1, 16, CLASSES, seed=1),
    "resnet9 weight": lambda: Resnet9(width=4, norm="weight").make(1, 16, CLASSES, seed=1),
    "resnet18": lambda: Resnet18(width=4).make(1, 16, CLASSES, seed=1),
    "conv and linear": small_net,
    "frozen first layer": frozen_start,
}
every_net = pytest.mark.parametrize("name", NETS)


def batch(num: int, views: int = 1, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(num, views, 1, 16, 16, generator=g), torch.randint(CLASSES, (num,), generator=g)


def relative(ours, other) -> float:
    return float((ours.double() - other.double()).norm() / other.double().norm())


@every_net
@pytest.mark.parametrize(("num", "views"), [(5, 1), (3, 2), (1, 1)])
def test_agrees_with_a_loop_over_records(name, num, views):
    classifier, (x, y) = NETS[name](), batch(num, views)
    _, norms = clipped_sum(classifier, mean_cross_entropy, x, y, clip=1.0)
    clip = sorted(norms)[num // 2] * 0.99  # some records above it and some below
    result = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(clip))
    expected, norms = clipped_sum(classifier, mean_cross_entropy, x, y, clip)
    assert relative(result.sum_P, expected) <= 1e-5
    for ours, norm in zip(result.norms_B.tolist(), norms, strict=True):
        assert ours == pytest.approx(norm, rel=1e-5)
    losses = mean_cross_entropy(classifier(x.flatten(0, 1)).unflatten(0, (num, views)), y)
    assert torch.allclose(result.losses_B, losses.detach(), rtol=1e-5)


@pytest.mark.parametrize("num", range(8))
def test_every_batch_size_and_chunk_gives_the_same(num, monkeypatch):
    classifier, (x, y) = NETS["conv and linear"](), batch(num)
    whole = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(0.5))
    monkeypatch.setattr(clipping, "MAX_GRADIENT_NUMBERS", 3 * num_params(classifier) + 1)
    chunked = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(0.5))
    monkeypatch.setattr(clipping, "MAX_GRADIENT_NUMBERS", 1)
    single = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(0.5))
    assert whole.norms_B.shape == whole.losses_B.shape == (num,)
    assert whole.sum_P.shape == (num_params(classifier),)
    for other in (chunked, single):
        assert torch.allclose(other.sum_P, whole.sum_P, rtol=1e-5, atol=1e-7)
        assert torch.allclose(other.norms_B, whole.norms_B, rtol=1e-6)
    if num == 0:
        assert not whole.sum_P.any()


@pytest.mark.parametrize("name", ["resnet9", "resnet18", "conv and linear"])
def test_agrees_with_opacus(name):
    from opacus.grad_sample import GradSampleModule

    classifier, (x, y) = NETS[name](), batch(6)
    wrapped = GradSampleModule(NETS[name](), loss_reduction="sum")
    loss = nn.functional.cross_entropy(wrapped(x[:, 0]), y, reduction="sum")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        loss.backward()
    flat_BP = torch.cat([p.grad_sample.flatten(1) for p in wrapped.parameters()], 1)
    norms_B = flat_BP.norm(dim=1)
    clip = float(norms_B.median())
    expected_P = (clip / norms_B).clamp(max=1) @ flat_BP
    result = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(clip))
    assert torch.allclose(result.norms_B, norms_B, rtol=1e-5)
    assert relative(result.sum_P, expected_P.detach()) <= 1e-5


@settings(deadline=None, max_examples=12)
@given(num=st.integers(1, 7), clip=st.floats(1e-4, 10), seed=st.integers(0, 999), scale=st.sampled_from([1.0, 1e3]))
def test_no_record_moves_the_sum_by_more_than_the_clip(num, clip, seed, scale):
    classifier, (x, y) = small_net(), batch(num, seed=seed)
    x[0] *= scale  # an image far outside [0, 1] has a gradient far beyond the others'
    whole = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(clip)).sum_P
    without = clipped_gradient_sum(classifier, mean_cross_entropy, x[1:], y[1:], Flat(clip)).sum_P
    moved = float((whole - without).norm())
    assert moved <= clip * (1 + 1e-4) + 1e-6
    assert float(whole.norm()) <= num * clip * (1 + 1e-4)


@every_net
def test_an_infinite_clip_is_the_plain_gradient(name):
    classifier, (x, y) = NETS[name](), batch(4)
    loss = nn.functional.cross_entropy(classifier(x[:, 0]), y, reduction="sum")
    plain = torch.autograd.grad(loss, [p for p in classifier.parameters() if p.requires_grad])
    result = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(float("inf")))
    assert relative(result.sum_P, torch.cat([g.flatten() for g in plain])) <= 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("clip", [0.3, float("inf")])
def test_a_record_without_a_finite_gradient_does_not_show_in_the_sum(bad, clip):
    classifier, (x, y) = small_net(), batch(4)
    without = clipped_gradient_sum(classifier, mean_cross_entropy, x[[0, 1, 3]], y[[0, 1, 3]], Flat(clip)).sum_P
    x[2] = bad
    result = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(clip))
    assert result.sum_P.isfinite().all()
    if not result.norms_B[2].isfinite():
        assert torch.allclose(result.sum_P, without, rtol=1e-5, atol=1e-7)
    else:
        assert float((result.sum_P - without).norm()) <= clip * 1.0001


def test_a_gradient_of_zero_stays_zero():
    classifier, (x, y) = small_net(), batch(2)

    def nothing(logits_BVK, y_B):
        return (logits_BVK * 0).sum((1, 2))

    result = clipped_gradient_sum(classifier, nothing, x, y, Flat(1.0))
    assert not result.sum_P.any()
    assert result.norms_B.tolist() == [0, 0]


def test_the_classifier_is_left_as_found():
    classifier, (x, y) = NETS["resnet9"](), batch(2)
    clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(1.0))
    assert all(p.grad is None and p.requires_grad for p in classifier.parameters())
