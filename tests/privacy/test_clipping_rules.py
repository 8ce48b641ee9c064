import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9
from trilemma.models.vector import num_params
from trilemma.privacy.clipping import clipped_gradient_sum
from trilemma.privacy.clipping_rules import Automatic, Flat, PerLayer, clipped_row_sum, row_norms, total_norms
from trilemma.robustness.objectives import mean_cross_entropy

KINDS = [Flat, PerLayer, Automatic]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
INFINITY = float("inf")


def two_layers() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 2)
    return Classifier(nn.Sequential(*layers), 2)


def batch(num: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(num, 1, 1, 8, 8, generator=g), torch.randint(2, (num,), generator=g)


def rows_of(classifier, x, y) -> torch.Tensor:
    """Each record's own gradient, one backward pass at a time."""
    rows = []
    for i in range(len(y)):
        loss = nn.functional.cross_entropy(classifier(x[i]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(classifier.parameters()))]))
    return torch.stack(rows)


@every_kind
@settings(deadline=None, max_examples=10)
@given(num=st.integers(1, 6), clip=st.floats(1e-3, 10), seed=st.integers(0, 99), scale=st.sampled_from([1.0, 1e3]))
def test_no_record_moves_a_gradient_sum_by_more_than_the_clip(kind, num, clip, seed, scale):
    classifier, (x, y) = two_layers(), batch(num, seed)
    x[0] *= scale
    whole = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, kind(clip)).sum_P
    without = clipped_gradient_sum(classifier, mean_cross_entropy, x[1:], y[1:], kind(clip)).sum_P
    assert float((whole - without).norm()) <= clip * (1 + 1e-4) + 1e-6


@every_kind
@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    num=st.integers(1, 6),
    clip=st.floats(1e-3, 1e3),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e12]),
    seed=st.integers(0, 999),
)
def test_no_client_moves_a_sum_of_updates_by_more_than_the_clip(kind, sizes, num, clip, scale, seed):
    sizes = tuple(sizes) if kind is PerLayer else (sum(sizes),)
    rows = torch.randn(num, sum(sizes), generator=torch.Generator().manual_seed(seed))
    rows[0] *= scale
    whole, norms = clipped_row_sum(rows, sizes, kind(clip))
    without, _ = clipped_row_sum(rows[1:], sizes, kind(clip))
    assert float((whole - without).norm()) <= clip * (1 + 1e-4) + 1e-6
    assert torch.allclose(total_norms(norms), rows.norm(dim=1), rtol=1e-5)


@every_kind
def test_a_sum_of_gradients_is_the_sum_of_their_rows(kind):
    classifier, (x, y) = two_layers(), batch(5)
    rows, clipper = rows_of(classifier, x, y), kind(float(rows_of(classifier, x, y).norm(dim=1).median()))
    ours = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, clipper)
    expected, norms = clipped_row_sum(rows, clipper.group_sizes(classifier), clipper)
    assert torch.allclose(ours.sum_P, expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(ours.norms_BG, norms, rtol=1e-5)
    assert torch.allclose(ours.norms_B, norms.square().sum(1).sqrt(), rtol=1e-5)


def test_layers_are_the_modules_with_parameters_of_their_own():
    assert PerLayer(1.0).group_sizes(two_layers()) == (3 * 9 + 3, 3 * 36 * 2 + 2)
    assert Flat(1.0).group_sizes(two_layers()) == Automatic(1.0).group_sizes(two_layers()) == (248,)
    frozen = two_layers()
    frozen.module[0].requires_grad_(False)
    assert PerLayer(1.0).group_sizes(frozen) == (218,)
    large = Resnet9(width=4).make(1, 8, 3, seed=0)
    sizes = PerLayer(1.0).group_sizes(large)
    assert sum(sizes) == num_params(large)
    assert len(sizes) == len([m for m in large.modules() if list(m.parameters(recurse=False))])


def test_each_layer_is_clipped_alone_to_its_share():
    rows = torch.tensor([[3.0, 4.0, 0.1], [0.3, 0.4, 7.0]])
    summed, norms = clipped_row_sum(rows, (2, 1), PerLayer(2**0.5))
    assert summed.tolist() == pytest.approx([0.6 + 0.3, 0.8 + 0.4, 0.1 + 1.0])
    assert norms.flatten().tolist() == pytest.approx([5.0, 0.1, 0.5, 7.0])
    assert total_norms(norms).tolist() == pytest.approx([25.01**0.5, 49.25**0.5])
    flat, _ = clipped_row_sum(rows, (3,), Flat(2**0.5))
    assert not torch.allclose(flat, summed)


def test_automatic_clipping_by_hand():
    summed, _ = clipped_row_sum(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.03]]), (2,), Automatic(2.0, 0.01))
    assert summed.tolist() == pytest.approx([6 / 5.01, 8 / 5.01 + 0.06 / 0.04])


@pytest.mark.parametrize("kind", [Flat, PerLayer])
def test_an_infinite_clip_only_adds(kind):
    rows = torch.randn(4, 5)
    assert torch.allclose(clipped_row_sum(rows, (2, 3) if kind is PerLayer else (5,), kind(INFINITY))[0], rows.sum(0))


@every_kind
@pytest.mark.parametrize("bad", [float("nan"), INFINITY, -INFINITY])
@pytest.mark.parametrize("clip", [0.5, INFINITY])
def test_a_row_that_is_no_number_does_not_show(kind, bad, clip):
    if kind is Automatic and clip == INFINITY:
        clip = 1e6
    sizes = (2, 3) if kind is PerLayer else (5,)
    rows = torch.randn(3, 5)
    without, _ = clipped_row_sum(rows[:2], sizes, kind(clip))
    rows[2, 4] = bad  # in one layer only: the other must not show either
    summed, _ = clipped_row_sum(rows, sizes, kind(clip))
    assert torch.allclose(summed, without)


@every_kind
def test_nobody_is_zero(kind):
    sizes = (2, 3) if kind is PerLayer else (5,)
    summed, norms = clipped_row_sum(torch.zeros(0, 5), sizes, kind(1.0))
    assert summed.tolist() == [0] * 5 and len(norms) == 0


def test_labels_with_further_dimensions_reach_the_loss_untouched():
    classifier, (x, _) = two_layers(), batch(3)
    x_BVCHW, y_BV = torch.cat([x, x.flip(0)], dim=1), torch.tensor([[0, 1], [1, 1], [1, 0]])

    def loss(logits_BVK, labels_BV):
        return -logits_BVK.log_softmax(-1).gather(-1, labels_BV[..., None]).sum((1, 2))

    ours = clipped_gradient_sum(classifier, loss, x_BVCHW, y_BV, Flat(INFINITY)).sum_P
    flat = nn.functional.cross_entropy(classifier(x_BVCHW.flatten(0, 1)), y_BV.flatten(), reduction="sum")
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(flat, list(classifier.parameters()))])
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("length", [1, 1023, 1024, 1025, 3_000_000])
def test_norms_keep_their_digits_at_any_length(length):
    rows_NP = torch.randn(2, length, generator=torch.Generator().manual_seed(0))
    exact_N = rows_NP.double().norm(dim=1)
    assert ((row_norms(rows_NP) - exact_N).abs() <= 5e-7 * exact_N).all()


def test_norms_of_rows_that_are_not_finite_or_empty():
    rows_NP = torch.tensor([[torch.inf, 1.0], [torch.nan, 1.0], [3.0, 4.0]])
    assert row_norms(rows_NP).tolist()[2] == 5.0 and not row_norms(rows_NP)[:2].isfinite().any()
    assert row_norms(torch.empty(0, 5000)).shape == (0,) and row_norms(torch.zeros(2, 0)).tolist() == [0.0, 0.0]
