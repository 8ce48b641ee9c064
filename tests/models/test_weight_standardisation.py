"""A convolution with standardised weights: what it computes, what it leaves at zero, and what it is in the end."""

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from trilemma.models import resnet18
from trilemma.models.layers import Style
from trilemma.models.norms import batch_norm_layers
from trilemma.models.specs import Resnet9, Resnet18
from trilemma.models.weight_standardisation import MISH_SCALE, RELU_SCALE, WeightStandardisedConv2d
from trilemma.randomness import global_seed


def seeded(*args, seed=0, **kwargs) -> WeightStandardisedConv2d:
    """A layer with uneven gains and biases, in double precision."""
    with global_seed(seed, "layer"):
        layer = WeightStandardisedConv2d(*args, **kwargs).double()
        with torch.no_grad():
            layer.gain.uniform_(-2, 2)
    return layer


def naive(layer) -> np.ndarray:
    """The standardised weights, filter by filter, from the numbers that are not 0 alone."""
    weight, gain = layer.weight.detach().numpy(), layer.gain.detach().numpy()
    result = np.zeros_like(weight)
    for m in range(len(weight)):
        there = weight[m] != 0
        if there.any():
            w = weight[m][there]
            result[m][there] = gain[m] * layer.scale * (w - w.mean()) / np.sqrt(w.var() * w.size + 1e-4)
    return result


@settings(deadline=None, max_examples=40)
@given(
    channels=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    groups=st.sampled_from([1, 2]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    zeros=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    scale=st.sampled_from([1.0, RELU_SCALE]),
    seed=st.integers(0, 99),
)
def test_the_weights_are_those_of_a_naive_twin_and_zeros_are_not_there(channels, groups, kernel, zeros, scale, seed):
    into, out = (groups * number for number in channels)
    layer = seeded(into, out, kernel, groups=groups, scale=scale, seed=seed)
    pruned = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) < zeros
    with torch.no_grad():
        layer.weight.masked_fill_(pruned, 0.0)
    effective = layer.effective_weight()
    np.testing.assert_allclose(effective.detach().numpy(), naive(layer), rtol=1e-9, atol=1e-12)
    assert (effective[pruned] == 0).all()
    effective.square().sum().backward()
    for gradient in (layer.weight.grad, layer.gain.grad):
        assert torch.isfinite(gradient).all()
    assert (layer.weight.grad[pruned] == 0).all()  # so what was pruned stays pruned


def test_a_filter_of_zeros_gives_zeros_and_gradients_of_zero():
    layer = seeded(2, 3, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    output = layer(torch.rand(4, 2, 5, 5, dtype=torch.float64))
    assert torch.equal(output[:, 1], layer.bias[1].expand(4, 3, 3))
    output.square().sum().backward()
    assert not layer.weight.grad[1].any() and layer.gain.grad[1] == 0
    assert layer.weight.grad[0].any() and layer.gain.grad[0] != 0


def test_filters_add_up_to_nothing_and_their_squares_to_the_gain():
    layer = seeded(4, 6, 3)
    effective = layer.effective_weight().detach().flatten(1)
    assert effective.sum(1).abs().max() < 1e-12
    expected = (layer.gain.detach() * RELU_SCALE).abs()
    torch.testing.assert_close(effective.norm(dim=1), expected, rtol=1e-3, atol=0)  # but for eps
    with torch.no_grad():
        layer.weight.mul_(100).add_(7)
    torch.testing.assert_close(layer.effective_weight().flatten(1), effective, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("scale", "activation"), [(RELU_SCALE, F.relu), (MISH_SCALE, F.mish)])
def test_the_scale_undoes_what_the_activation_takes_from_the_variance(scale, activation):
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(activation(z).std()) * scale == pytest.approx(1, abs=0.005)


def rounded(weight):
    return (weight * 8).round() / 8


@pytest.mark.parametrize("rounding", [None, rounded])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_folded_it_is_a_plain_convolution_with_the_same_outputs(rounding, bias, mode):
    layer = seeded(4, 6, (3, 1), stride=2, padding=(2, 0), dilation=2, groups=2, bias=bias, padding_mode=mode).eval()
    layer.weight_rounding = rounding
    layer.weight.requires_grad_(False)
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    plain = layer.folded()
    assert torch.equal(torch.rand(1), expected)  # nothing is drawn
    assert type(plain) is nn.Conv2d and not plain.training and not plain.weight.requires_grad
    assert torch.equal(plain(x), layer(x))
    if bias:
        with torch.no_grad():
            plain.bias.add_(1)
        assert not torch.equal(plain(x), layer(x))  # its numbers are its own


def test_rounding_changes_the_outputs_and_no_way_of_a_gradient():
    layer = seeded(2, 3, 3)
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    coefficients = torch.randn(2, 3, 3, 3, dtype=torch.float64)

    def outputs_and_gradients():
        output = layer(x)
        return output.detach(), torch.autograd.grad((output * coefficients).sum(), list(layer.parameters()))

    exact, gradients = outputs_and_gradients()
    layer.weight_rounding = rounded
    rough, through = outputs_and_gradients()
    expected = F.conv2d(x, rounded(layer.effective_weight()), layer.bias)
    torch.testing.assert_close(rough, expected.detach(), rtol=0, atol=1e-12)
    assert not torch.allclose(rough, exact, atol=1e-3)
    for ours, other in zip(through, gradients, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rounding", [None, rounded])
def test_vmap_grad_matches_a_loop_with_zeros_and_rounding(rounding):
    layer = seeded(2, 4, 3)
    layer.weight_rounding = rounding
    with torch.no_grad():
        layer.weight[0, 0] = 0
        layer.weight[2] = 0
    layer = copy.deepcopy(layer)
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    assert set(parameters) == {"weight", "gain", "bias"}

    def loss(parameters, x_CHW):
        return functional_call(layer, parameters, (x_CHW[None],)).square().sum()

    fast = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        gradients = torch.autograd.grad(layer(x[i : i + 1]).square().sum(), list(layer.parameters()))
        for (name, _), gradient in zip(layer.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(fast[name][i], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_the_older_exporter_takes_it_unfolded_too():
    import onnx
    from onnx.reference import ReferenceEvaluator

    layer, buffer = seeded(2, 3, 3).float().eval(), io.BytesIO()
    x = torch.rand(1, 2, 6, 6)
    torch.onnx.export(layer, (x,), buffer, dynamo=False, opset_version=17, input_names=["x"], output_names=["y"])
    (y,) = ReferenceEvaluator(onnx.load_from_string(buffer.getvalue())).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(y, layer(x).detach().numpy(), atol=1e-5)


def variances(spec, size=28) -> dict[str, float]:
    """The mean variance of each channel after each block, for images of independent pixels."""
    classifier, seen = spec.make(1, size, 2, seed=0), {}
    for name, module in classifier.module.named_modules():
        if name.count(".") == 1 and name.startswith("stage"):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: seen.__setitem__(name, float(output.var((0, 2, 3)).mean()))
            )
    with torch.no_grad():
        classifier(torch.rand(32, 1, size, size, generator=torch.Generator().manual_seed(0)))
    return seen


@pytest.mark.parametrize("activation", ["relu", "mish"])
def test_the_signal_keeps_its_size_through_resnet18(activation):
    seen = variances(Resnet18(width=8, norm="weight", activation=activation))
    assert len(seen) == 8
    assert min(seen.values()) > 0.3 and max(seen.values()) < 3
    assert max(seen.values()) / min(seen.values()) < 2


def test_without_a_small_residual_gain_it_would_explode(monkeypatch):
    monkeypatch.setattr(resnet18, "RESIDUAL_GAIN", 1.0)
    seen = list(variances(Resnet18(width=8, norm="weight")).values())
    assert seen[-1] > 30 * seen[0]


@pytest.mark.parametrize("spec", [Resnet9(width=4, norm="weight"), Resnet18(width=4, norm="weight")])
def test_a_network_of_it_has_biases_and_gains_and_no_other_normalisation(spec):
    classifier = spec.make(1, 16, 2, seed=0)
    convolutions = [module for module in classifier.modules() if isinstance(module, nn.Conv2d)]
    assert {type(module) for module in convolutions} == {WeightStandardisedConv2d}
    assert all(module.bias is not None and not module.bias.any() for module in convolutions)
    assert batch_norm_layers(classifier) == []
    assert not list(classifier.buffers())
    kinds = (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)
    assert not any(isinstance(module, kinds) for module in classifier.modules())


def test_the_activation_chooses_the_scale_and_other_norms_no_gain():
    assert Style("weight", None, "relu").make_conv(1, 2, 3).scale == RELU_SCALE
    assert Style("weight", None, "mish").make_conv(1, 2, 3).scale == MISH_SCALE
    assert torch.equal(Style("weight", None, "relu").make_conv(1, 2, 3, gain=0.5).gain, torch.full((2,), 0.5))
    for norm in ("group", "batch", "none"):
        conv = Style(norm, None, "relu").make_conv(1, 2, 3, gain=0.5)
        assert type(conv) is nn.Conv2d and (conv.bias is None) == (norm != "none")
