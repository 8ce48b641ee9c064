"""Ranges of activations, against numpy on the values themselves: the code sees a histogram of them only."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from trilemma.compression.calibration import ACTIVATION_LEVELS, BINS, Range, grid_of, observe
from trilemma.models.classifier import Classifier

RULES = ("min_max", "percentile", "mse")


class Seen(nn.Module):
    """A network with a layer that passes on what it gets, so that a test knows all of its values."""

    def __init__(self):
        super().__init__()
        self.seen, self.never, self.last = nn.Identity(), nn.Identity(), nn.Linear(2, 2)

    def forward(self, x):
        return self.last(self.seen(x).flatten(1)[:, :2])


def ranges(x, rule, percentile=99.99):
    classifier = Classifier(Seen(), 2, mean=0.0, std=1.0).eval()
    found = observe(classifier, [classifier.module.seen, classifier.module.never], x, rule, percentile)
    assert list(found) == [id(classifier.module.seen)], "a layer that no image reached has no range"
    assert not classifier.module.seen._forward_hooks
    inside, outside = found[id(classifier.module.seen)]
    assert inside == outside
    return inside


def values(seed, shape, num_images=70):
    """Values of unlike kinds: of both signs, as after ReLU, with few far ones; more than a batch of them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num_images, 1, 16, 16, generator=g)
    if shape == "relu":
        return x.clamp_min(0)
    if shape == "far":
        return torch.where(torch.rand(x.shape, generator=g) < 0.001, 30 * x, x)
    return 3 * x - 5 if shape == "negative" else x


shapes = st.sampled_from(["both", "relu", "far", "negative"])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), shape=shapes)
def test_the_extremes_are_those_of_all_batches(seed, shape):
    x = values(seed, shape)
    assert ranges(x, "min_max") == (float(x.min()), float(x.max()))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), shape=shapes, percentile=st.floats(60, 99.999))
def test_percentiles_are_numpys_within_a_bin(seed, shape, percentile):
    x = values(seed, shape)
    found, raw = ranges(x, "percentile", percentile), x.numpy().ravel().astype(np.float64)
    spare = len(raw) * (1 - percentile / 100)
    assume(abs(spare - round(spare)) > 1e-6)  # there numpy's definition takes the value before
    width = (raw.max() - raw.min()) / BINS
    low, high = (sign * np.percentile(sign * raw, 100 - percentile, method="inverted_cdf") for sign in (1, -1))
    assert low - 1.001 * width <= found.low <= low + 1e-3 * width
    assert high - 1e-3 * width <= found.high <= high + 1.001 * width
    # Never more than the tails is cut off, up to what falls on an edge.
    inner = Range(found.low - 1e-3 * width, found.high + 1e-3 * width)
    assert (raw < inner.low).sum() <= spare and (raw > inner.high).sum() <= spare


def test_a_tail_may_be_cut_off_as_a_whole():
    x = torch.arange(128.0).reshape(2, 1, 8, 8)
    found = ranges(x, "percentile", 75)  # 32 of 128 values: 0 to 31 below, 96 to 127 above
    assert 31 < found.low <= 32 and 95 <= found.high < 96


def error(raw, tried):
    """The mean squared error of 256 levels on the values themselves."""
    scale, zero = grid_of(tried)
    levels = np.clip(np.rint(raw / scale), -zero, ACTIVATION_LEVELS - zero)
    return np.square(raw - levels * scale).mean()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), shape=shapes)
def test_the_least_error_is_the_least_of_all_shares(seed, shape):
    x = values(seed, shape)
    found, raw = ranges(x, "mse"), x.numpy().ravel().astype(np.float64)
    shares = np.linspace(1, 0.2, 81)
    errors = [error(raw, Range(share * raw.min(), share * raw.max())) for share in shares]
    chosen = found.high / raw.max() if raw.max() > 0 else found.low / raw.min()
    assert np.abs(shares - chosen).min() < 1e-6
    assert error(raw, found) <= 1.03 * min(errors)


def test_the_least_error_gives_up_a_single_far_value():
    x = values(0, "both", num_images=400)
    x[0, 0, 0, 0] = 20.0
    found, whole = ranges(x, "mse"), ranges(x, "min_max")
    raw = x.numpy().ravel().astype(np.float64)
    assert 0.75 < found.high / 20 < 0.95 and whole.high == 20.0
    assert error(raw, found) < 0.9 * error(raw, whole)


@pytest.mark.parametrize("rule", RULES)
def test_values_that_are_not_finite_are_left_out(rule):
    x = values(0, "both", num_images=6)
    spoilt = torch.cat([x, x[:1].clone()])
    spoilt[6] = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(86)[:256].reshape(1, 16, 16)
    assert ranges(spoilt, rule) == ranges(x, rule)
    assert ranges(torch.full((2, 1, 16, 16), torch.nan), rule) == (0.0, 0.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [0.0, 0.5, -2.0])
def test_constant_activations_are_their_own_range(rule, value):
    found = ranges(torch.full((3, 1, 16, 16), value), rule)
    assert found == (value, value)
    scale, zero = grid_of(found)
    level = np.clip(round(value / scale), -zero, ACTIVATION_LEVELS - zero) * scale
    assert level == pytest.approx(value, abs=1e-6)


def test_more_values_than_float32_counts_are_counted():
    """After ReLU half of a large layer's values are zero: one bin with more than 2^24 of them."""
    x = torch.zeros(1, 1, 22, 2**20)
    x[:, :, 18:] = torch.linspace(0.001, 1, 2**20)
    # Of 22 rows 2.2 may be cut off above, and 4 are even between 0 and 1.
    assert ranges(x, "percentile", 90).high == pytest.approx(1 - 2.2 / 4, abs=0.002)


def test_two_values_that_are_both_a_tail_keep_their_range():
    x = torch.zeros(2, 1, 16, 16)
    x[1] = 1.0
    assert ranges(x, "percentile", 50.1) == (pytest.approx(0.0, abs=1e-3), pytest.approx(1.0, abs=1e-3))
    assert ranges(x, "percentile", 49.0) == (0.0, 1.0)  # each of both is less than a tail
