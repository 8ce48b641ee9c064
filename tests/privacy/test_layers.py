"""Each layer's rules against autograd, one unit at a time, in double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trilemma.models.weight_standardisation import WeightStandardisedConv2d
from trilemma.privacy import layers, standardised


def naive(module, x, g):
    """Every unit's gradients by autograd: {name: (B, P_name)}."""
    rows = {name: [] for name, _ in module.named_parameters()}
    for x_unit, g_unit in zip(x, g, strict=True):
        gradients = torch.autograd.grad((module(x_unit) * g_unit).sum(), list(module.parameters()))
        for name, gradient in zip(rows, gradients, strict=True):
            rows[name].append(gradient.flatten())
    return {name: torch.stack(row) for name, row in rows.items()}


def check(module, x):
    module, draws = module.double(), torch.Generator().manual_seed(1)
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        shape = module(x.flatten(0, 1)).shape[1:]
    g = torch.randn(*x.shape[:2], *shape, generator=draws, dtype=torch.float64)
    expected = naive(module, x, g)
    with torch.no_grad():
        found = layers.per_unit_gradients(module, x, g, list(expected))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)
        if isinstance(module, (nn.Linear, nn.Embedding, *layers.CONVOLUTIONS)):
            norms = layers.ghost_squared_norm(module, x, g)
            floor = 1e-9
            if isinstance(module, WeightStandardisedConv2d):  # a filter of one weight has a steep slope and no gradient
                floor += 1e-13 * float(x.square().sum() * standardised.ahead(module, g).square().sum())
            torch.testing.assert_close(norms, expected["weight"].square().sum(1), rtol=1e-9, atol=floor)
            weight_B = torch.rand(len(x), generator=draws, dtype=torch.float64)
            total = layers.weighted_weight_gradient(module, x, g, weight_B)
            torch.testing.assert_close(total, weight_B @ expected["weight"], rtol=1e-9, atol=1e-9)


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(
    units=st.integers(1, 3),
    views=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    channels=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    mode=st.sampled_from(["zeros", "reflect", "circular", "replicate"]),
    bias=st.booleans(),
)
def test_a_convolution_in_the_plane(
    units, views, groups, channels, size, kernel, stride, dilation, padding, mode, bias
):
    into, out = (groups * number for number in channels)
    module = nn.Conv2d(into, out, kernel, stride, padding, dilation, groups=groups, bias=bias, padding_mode=mode)
    check(module, images(units, views, into, *size))


@settings(deadline=None, max_examples=40)
@given(
    units=st.integers(1, 3),
    views=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    channels=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    mode=st.sampled_from(["zeros", "circular"]),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
    bias=st.booleans(),
    rounded=st.booleans(),
)
def test_standardised_weights(
    units, views, groups, channels, kernel, stride, dilation, padding, mode, zeros, bias, rounded
):
    into, out = (groups * number for number in channels)
    draws = torch.Generator().manual_seed(2)
    how = {"groups": groups, "bias": bias, "padding_mode": mode}
    module = WeightStandardisedConv2d(into, out, kernel, stride, padding, dilation, **how, scale=1.3)
    with torch.no_grad():
        module.gain.copy_(torch.randn(out, generator=draws))
        module.weight.masked_fill_(torch.rand(module.weight.shape, generator=draws) < zeros, 0.0)
    if rounded:
        module.weight_rounding = lambda weight: (weight * 4).round() / 4
    check(module, images(units, views, into, 6, 5))


@pytest.mark.parametrize("names", [["weight"], ["gain"], ["bias"], ["gain", "weight"], []], ids=str)
def test_standardised_weights_of_which_some_parameters_are_frozen(names):
    module, x = WeightStandardisedConv2d(2, 3, 3).double(), images(2, 1, 2, 5, 5)
    g = images(2, 1, 3, 3, 3, seed=1)
    expected = naive(module, x, g)
    with torch.no_grad():
        found = layers.per_unit_gradients(module, x, g, names)
    assert sorted(found) == sorted(names)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=15)
@given(dim=st.sampled_from([1, 3]), stride=st.integers(1, 2), groups=st.sampled_from([1, 2]), views=st.integers(1, 2))
def test_a_convolution_on_a_line_and_in_space(dim, stride, groups, views):
    kind = {1: nn.Conv1d, 3: nn.Conv3d}[dim]
    check(kind(2, 4, 3, stride, 1, groups=groups), images(2, views, 2, *[5] * dim))


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [2, 3])
def test_padding_by_name(padding, kernel):
    check(nn.Conv2d(2, 3, kernel, padding=padding), images(2, 1, 2, 6, 5))


@pytest.mark.parametrize("positions", [(), (1,), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer(positions, views, bias):
    check(nn.Linear(4, 3, bias=bias), images(3, views, *positions, 4))


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.GroupNorm(2, 6), (6, 4, 3)),
        (nn.GroupNorm(3, 6), (6,)),
        (nn.InstanceNorm1d(3, affine=True), (3, 7)),
        (nn.InstanceNorm2d(3, affine=True), (3, 4, 5)),
        (nn.InstanceNorm3d(2, affine=True), (2, 3, 3, 2)),
        (nn.LayerNorm(5), (4, 5)),
        (nn.LayerNorm((4, 5)), (3, 4, 5)),
        (nn.LayerNorm(5, bias=False), (4, 5)),
    ],
    ids=str,
)
def test_a_normalisation(module, shape, views):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) + 0.5)
    check(module, 3 + 2 * images(2, views, *shape))


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_an_embedding(padding_idx):
    index = torch.randint(4, (3, 2, 5), generator=torch.Generator().manual_seed(0))
    check(nn.Embedding(4, 3, padding_idx=padding_idx), index)


def test_what_has_no_rule_says_why():
    assert layers.why_unsupported(nn.Conv2d(1, 1, 1)) is None
    assert layers.why_unsupported(WeightStandardisedConv2d(1, 1, 1)) is None
    assert "ConvTranspose2d has no rule" in layers.why_unsupported(nn.ConvTranspose2d(1, 1, 1))
    assert "running statistics" in layers.why_unsupported(nn.InstanceNorm2d(1, affine=True, track_running_stats=True))
    assert "max_norm" in layers.why_unsupported(nn.Embedding(3, 2, max_norm=1.0))

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert "Scaled has no rule" in layers.why_unsupported(Scaled(1, 1))


def test_small_maps_go_by_their_grams_and_large_ones_do_not():
    deep, wide = nn.Conv2d(256, 256, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    small, large = torch.empty(1, 1, 256, 7, 7), torch.empty(1, 1, 16, 28, 28)
    assert layers.ghost_pays(deep, small, small)
    own = WeightStandardisedConv2d(256, 256, 3, padding=1)
    with torch.no_grad():
        own.weight[:2, :4, 1, 0] = 0
    assert layers.ghost_pays(own, small, small)  # a few zeros come about by chance
    with torch.no_grad():
        own.weight[3, :9] = 0
    assert not layers.ghost_pays(own, small, small)
    assert not layers.ghost_pays(wide, large, torch.empty(1, 1, 32, 28, 28))
    assert layers.ghost_pays(nn.Linear(500, 500), torch.empty(1, 1, 500), torch.empty(1, 1, 500))
    assert not layers.ghost_pays(nn.Linear(4, 4), torch.empty(1, 1, 9, 4), torch.empty(1, 1, 9, 4))


def test_a_standardised_ghost_norm_that_cancels_is_noticed():
    """Inputs that are all alike give a filter a gradient that is its own mean, of which nothing is left."""
    module = WeightStandardisedConv2d(4, 6, 3)
    x, g = torch.full((2, 1, 4, 6, 6), 3.0), torch.randn(2, 1, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    x[1] += torch.randn(x[1].shape, generator=torch.Generator().manual_seed(1)) * 3
    with torch.no_grad():
        squared_B = layers.ghost_squared_norm(module, x, g)
        lost_B = layers.ghost_lost_digits(module, x, g, squared_B)
        held_B = layers.per_unit_gradients(module, x, g, ["weight"])["weight"].square().sum(1)
    assert lost_B.tolist() == [True, False]
    torch.testing.assert_close(squared_B[~lost_B], held_B[~lost_B], rtol=1e-4, atol=0)
