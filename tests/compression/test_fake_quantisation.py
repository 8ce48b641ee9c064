import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from trilemma.compression.fake_quantisation import (
    BIAS_LEVELS,
    WEIGHT_LEVELS,
    ActivationGrid,
    QuantConv2d,
    QuantLinear,
    Range,
    quantise,
    quantised_skeleton,
)
from trilemma.models.classifier import Classifier

finite = st.floats(-1e4, 1e4, width=32)


@settings(deadline=None, max_examples=60)
@given(a=finite, b=finite, values=st.lists(finite, min_size=1, max_size=20))
def test_a_grid_rounds_to_the_nearest_of_256_levels_that_include_zero(a, b, values):
    grid = ActivationGrid()
    grid.fit(Range(min(a, b), max(a, b)))
    scale, zero = float(grid.scale), int(grid.zero_point)
    x = torch.tensor(values)
    levels = np.clip(np.rint(x.numpy().astype(np.float64) / scale) + zero, 0, 255)  # the naive twin
    got = grid(x).numpy()
    assert 0 <= zero <= 255 and scale > 0
    assert grid(torch.zeros(1)).item() == 0
    np.testing.assert_allclose(got, (levels - zero) * scale, atol=1.001 * scale)  # a tie may fall either way
    inside = (x.numpy() >= min(a, b, 0)) & (x.numpy() <= max(a, b, 0))
    assert (np.abs(got - x.numpy())[inside] <= 1.02 * scale).all()  # half a level, and half for the zero point


@settings(deadline=None, max_examples=30)
@given(low=st.floats(-50, 0), high=st.floats(0, 50), seed=st.integers(0, 100))
def test_a_grid_rounds_bit_for_bit_like_torch(low, high, seed):
    grid = ActivationGrid()
    grid.fit(Range(low, high))
    x = 40 * torch.randn(500, generator=torch.Generator().manual_seed(seed))
    x[:100] = (x[:100] / grid.scale).round() * grid.scale + grid.scale / 2  # ties
    expected = torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero_point, 0, 255)
    assert torch.equal(grid(x), expected)
    assert torch.equal(grid(x.clone().requires_grad_(True)), expected)


def test_gradients_pass_straight_through_also_where_values_are_clamped():
    grid = ActivationGrid()
    grid.fit(Range(-1.0, 1.0))
    x = torch.tensor([-5.0, -0.3, 0.0, 0.7, 5.0], requires_grad=True)
    y = grid(x)
    assert torch.equal(y, grid(x.detach()))  # the detour over the gradient changes no value
    (gradient,) = torch.autograd.grad((y * torch.arange(5.0)).sum(), x)
    assert torch.equal(gradient, torch.arange(5.0))


def test_every_weight_and_bias_lies_on_an_integer_grid_that_cannot_saturate(net, records):
    twin = quantise(net, records.x(slice(64)))
    layers = [module for module in twin.modules() if isinstance(module, (QuantConv2d, QuantLinear))]
    assert len(layers) == sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in net.modules())
    for layer in layers:
        scale = layer.weight_scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
        levels = (layer.weight / scale).detach()
        assert (levels - levels.round()).abs().max() < 1e-4
        assert levels.round().abs().max() <= WEIGHT_LEVELS
        bias_levels = (layer.bias.double() / (layer.input_grid.scale * layer.weight_scale).double()).detach()
        assert bias_levels.abs().max() <= 1.01 * BIAS_LEVELS
    assert 2 * 255 * WEIGHT_LEVELS <= 2**15 - 1


def test_int8_answers_like_float(net, records):
    x = records.x(slice(200, 400))
    twin = quantise(net, records.x(slice(128)))
    with torch.no_grad():
        float_NK, int8_NK = net(x), twin(x)
    assert (float_NK.argmax(1) == records.y(slice(200, 400))).float().mean() > 0.9  # the net has learnt something
    assert (float_NK.argmax(1) == int8_NK.argmax(1)).float().mean() >= 0.985
    assert (float_NK - int8_NK).abs().mean() < 0.05 * float_NK.std()
    assert not torch.equal(float_NK, int8_NK)


def test_every_image_has_a_gradient_in_every_pixel(net, records):
    twin = quantise(net, records.x(slice(64)))
    x = records.x(slice(100, 132)).requires_grad_(True)
    y = records.y(slice(100, 132))

    def gradient(classifier):
        logits_BK = classifier(x)
        margin_B = 2 * logits_BK.gather(1, y[:, None])[:, 0] - logits_BK.sum(1)
        return torch.autograd.grad(margin_B.sum(), x)[0].flatten(1)

    assert (gradient(twin).abs().amax(1) > 0).all()
    assert (gradient(twin) == 0).float().mean() < 0.001
    assert nn.functional.cosine_similarity(gradient(twin), gradient(net)).median() > 0.8


def test_quantising_changes_neither_its_argument_nor_the_global_generator(batch_norm_net, records):
    before = copy.deepcopy(batch_norm_net.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    twin = quantise(batch_norm_net, records.x(slice(16)))
    assert torch.equal(torch.rand(1), expected)
    for name, tensor in batch_norm_net.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not twin.training
    assert not any(module._forward_hooks for module in (*twin.modules(), *batch_norm_net.modules()))


def test_a_stored_state_fits_a_skeleton(net, records):
    twin = quantise(net, records.x(slice(64)))
    restored = quantised_skeleton(copy.deepcopy(net), twin.state_dict())
    stored = save({name: tensor.contiguous() for name, tensor in twin.state_dict().items()})
    restored.load_state_dict(load(stored), strict=True)
    x = records.x(slice(300, 364))
    with torch.no_grad():
        assert torch.equal(restored(x), twin(x))


def test_quantising_twice_gives_the_same_numbers(group_norm_net, records):
    first, second = (quantise(group_norm_net, records.x(slice(64))) for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_a_layer_in_two_places_stays_one_layer():
    shared = nn.Linear(16, 16)
    classifier = Classifier(nn.Sequential(nn.Flatten(), shared, nn.ReLU(), shared), 16)
    twin = quantise(classifier, torch.rand(8, 1, 4, 4))
    assert twin.module[1] is twin.module[3]
    assert isinstance(twin.module[1], QuantLinear)


def test_constant_and_dead_layers_are_survived():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    with torch.no_grad():
        network[0].weight[:2].zero_()
        network[0].bias.fill_(-1.0)  # so that ReLU lets nothing pass and the linear layer sees zeros only
        network[0].weight[2:].mul_(1e-30)
        network[3].bias.copy_(torch.tensor([100.0, -3.0]))
    twin = quantise(Classifier(network, 2), torch.rand(8, 1, 8, 8))
    with torch.no_grad():
        logits = twin(torch.rand(4, 1, 8, 8))
    assert torch.isfinite(logits).all()
    assert torch.allclose(logits, torch.tensor([100.0, -3.0]).expand(4, 2), atol=0.5)


def test_non_finite_weights_and_activations_are_survived():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        network[1].weight[0, 0] = float("nan")
        network[1].weight[1, 1] = float("inf")
        network[2].bias[0] = float("nan")
    twin = quantise(Classifier(network, 2), torch.rand(8, 1, 2, 2))
    assert all(torch.isfinite(tensor).all() for tensor in twin.state_dict().values())
    with torch.no_grad():
        assert torch.isfinite(twin(torch.rand(4, 1, 2, 2))).all()


def test_a_layer_that_computes_something_else_is_left_alone():
    class Odd(nn.Linear):
        def forward(self, input):
            return super().forward(input) ** 2

    classifier = Classifier(nn.Sequential(nn.Flatten(), Odd(4, 4), nn.Linear(4, 2)), 2)
    twin = quantise(classifier, torch.rand(8, 1, 2, 2))
    assert type(twin.module[1]) is Odd
    assert isinstance(twin.module[2], QuantLinear)


def test_no_calibration_image_is_refused(group_norm_net):
    with pytest.raises(ValueError, match="at least one image"):
        quantise(group_norm_net, torch.rand(0, 1, 28, 28))
