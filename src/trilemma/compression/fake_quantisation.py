"""Post-training int8 quantisation: a network that computes in float what its int8 file computes, up to single levels.

Activations are uint8 with one scale and zero point per tensor, weights int8 with one scale per output channel and no
zero point, biases int32 with the product of the two scales (Jacob et al., 2018, section 2). The rounding passes
gradients straight through (Bengio et al., 2013), so the network can be attacked as it is shipped; a converted int8
network has no input gradient, and an attack that does not notice calls it robust.

Weights use the levels -64 ... 64 and not -127 ... 127: processors without VNNI add two uint8 x int8 products in 16
bits, and 2 * 255 * 64 = 32640 is the largest sum of two that cannot saturate. One bit of a weight buys the same
numbers on every processor.

Numbers are rounded once on their way from layer to layer: levels of what only a ReLU reads start at zero, and who reads
numbers unchanged reads them on the levels that they have (`rounding_flow`). Without norms of activations the file then
computes in integers from the image to the last pooling, sums included.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.compression.calibration import ACTIVATION_LEVELS, Range, RangeRule, grid_of, rounding
from trilemma.compression.folding import fold_batch_norms, plain_copy
from trilemma.models.classifier import Classifier

#: Largest absolute level of a weight; see above.
WEIGHT_LEVELS = 64
#: Largest absolute level of a bias, far enough from the end of int32 to leave room for the sum it is added to.
BIAS_LEVELS = 2**28

_SMALLEST_SCALE = 1e-12
_FOLDING_IMAGES = 2
_GRID_OF_RELU = ".output_grid.scale"


class ActivationGrid(nn.Module):
    """Rounds an activation to 256 levels; gradients pass as if it did not, also where values are clamped.

    The true gradient at a clamped value is zero, which would stop a gradient attack at a pixel that left the range
    seen in calibration; an attack must not profit from that.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, device: torch.device | None = None):
        super().__init__()
        self.register_buffer("scale", torch.ones((), device=device))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32, device=device))

    def fit(self, observed: Range) -> None:
        """Sets the scale so that the levels span the observed range and zero, which is always a level."""
        scale, zero_point = grid_of(observed)
        self.scale.fill_(scale)
        self.zero_point.fill_(zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the nearest level of every value."""
        if torch.onnx.is_in_onnx_export():
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, 0, ACTIVATION_LEVELS)
        return _Rounded.apply(x, self.scale, self.zero_point)  # pyright: ignore[reportReturnType]


class _Rounded(torch.autograd.Function):
    """What torch.fake_quantize_per_tensor_affine returns, bit for bit; that takes 30 times as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        low = -float(zero_point)  # clamping to numbers is several times faster than to tensors
        return torch.mul(x, 1 / scale).round_().clamp_(low, low + ACTIVATION_LEVELS).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


class QuantConv2d(nn.Conv2d):
    """A convolution whose input, weights, bias and output lie on int8 grids; its weights are fixed."""

    input_grid: ActivationGrid
    output_grid: ActivationGrid
    weight_scale: Tensor

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _add_grids(self, self.out_channels)

    def forward(self, input: Tensor) -> Tensor:
        """Returns the rounded convolution of the rounded input."""
        return self.output_grid(self._conv_forward(self.input_grid(input), _weight(self), self.bias))


class QuantReLU(nn.ReLU):
    """A ReLU whose output lies on an int8 grid: where a residual network adds up, so that it adds integers next."""

    output_grid: ActivationGrid

    def __init__(self, device: torch.device | None = None):
        super().__init__()
        self.output_grid = ActivationGrid(device)

    def forward(self, input: Tensor) -> Tensor:
        """Returns what is positive, rounded."""
        return self.output_grid(super().forward(input))


class QuantLinear(nn.Linear):
    """A linear layer whose input, weights, bias and output lie on int8 grids; its weights are fixed."""

    input_grid: ActivationGrid
    output_grid: ActivationGrid
    weight_scale: Tensor

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _add_grids(self, self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        """Returns the rounded product of the rounded input."""
        return self.output_grid(nn.functional.linear(self.input_grid(input), _weight(self), self.bias))


def quantise(
    classifier: Classifier, calibration_x: Tensor, rule: RangeRule = "min_max", percentile: float = 99.99
) -> Classifier:
    """Returns an int8 twin of a classifier: convolutions, linear layers and ReLUs of sums rounded, all else in float.

    A non-finite weight becomes zero, as int8 has no other way to hold it; non-finite activations are left out of
    the observed ranges; a layer that calibration never reached keeps its input to [0, 1].

    Args:
        classifier: The network; unchanged. Standardised weights are folded, and batch norms where that is possible.
        calibration_x: Images (N, C, H, W) in [0, 1], N at least 1, whose activations set the ranges.
        rule: How they do; see `observe`.
        percentile: For the rule "percentile".

    Raises:
        ValueError: Without a calibration image.
    """
    if len(calibration_x) == 0:
        raise ValueError("int8 needs at least one image to calibrate on.")
    folded = plain_copy(classifier).eval()
    fold_batch_norms(folded, calibration_x[:_FOLDING_IMAGES].to(classifier.device))
    ranges = rounding(folded, [layer for _, layer in _layers(folded)], calibration_x, rule, percentile)
    relus = {name: module for name, module in folded.named_modules() if type(module) is nn.ReLU and module in ranges}
    twin = _quantised_copy(folded, relus)
    quantised = dict(twin.named_modules(remove_duplicate=False))
    with torch.no_grad():
        for name, relu in relus.items():
            rounded = quantised[name]
            assert isinstance(rounded, QuantReLU)
            rounded.output_grid.fit(ranges[relu].outside)
        for name, layer in _layers(folded):
            fitted = quantised[name]
            assert isinstance(fitted, (QuantConv2d, QuantLinear))
            fitted.input_grid.fit(ranges[layer].inside)
            fitted.output_grid.fit(ranges[layer].outside)
            _fit_weights(fitted, layer)
    return twin


def quantised_skeleton(classifier: Classifier, stored: Iterable[str] = ()) -> Classifier:
    """Returns a copy with the layers of an int8 twin and meaningless numbers, for a stored state to be loaded into.

    Args:
        classifier: The network; unchanged.
        stored: The names of the state, which tell the ReLUs that round.
    """
    return _quantised_copy(classifier, {name.removesuffix(_GRID_OF_RELU) for name in stored})


def _quantised_copy(classifier: Classifier, rounding_relus: Collection[str]) -> Classifier:
    twin = plain_copy(classifier).eval()
    relus = [(name, module) for name, module in _named(twin) if type(module) is nn.ReLU and name in rounding_relus]
    replacements: dict[int, nn.Module] = {}  # a layer that stands in two places stays one layer
    for _, relu in relus:
        replacements[id(relu)] = QuantReLU(twin.device)
    for _, layer in _layers(twin):
        if id(layer) not in replacements:
            replacements[id(layer)] = _quantised_layer(layer)
    for name, module in _named(twin):
        if id(module) in replacements:
            parent, _, attribute = name.rpartition(".")
            setattr(twin.get_submodule(parent), attribute, replacements[id(module)])
    return twin.eval()


def _named(classifier: Classifier) -> list[tuple[str, nn.Module]]:
    return list(classifier.named_modules(remove_duplicate=False))


def _layers(classifier: Classifier) -> list[tuple[str, nn.Conv2d | nn.Linear]]:
    """Returns the layers to quantise by name: plain ones only, as a subclass may compute something else."""
    modules = _named(classifier)
    return [(name, module) for name, module in modules if type(module) in (nn.Conv2d, nn.Linear)]  # pyright: ignore[reportReturnType]


def _quantised_layer(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    # Made without storage and then filled, as the usual initialisation would draw from the global random generator.
    if isinstance(layer, nn.Linear):
        quantised = QuantLinear(layer.in_features, layer.out_features, device="meta")
    else:
        shape = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
        size = (layer.in_channels, layer.out_channels, layer.kernel_size)
        quantised = QuantConv2d(*size, **shape, device="meta")
    quantised.to_empty(device=layer.weight.device)
    for name, tensor in quantised.state_dict().items():
        tensor.fill_(1 if name.endswith("scale") else 0)
    for parameter in quantised.parameters():
        parameter.requires_grad_(False)
    return quantised


def _add_grids(layer: nn.Module, num_outputs: int) -> None:
    device = next(layer.parameters()).device
    layer.input_grid = ActivationGrid(device)
    layer.output_grid = ActivationGrid(device)
    layer.register_buffer("weight_scale", torch.ones(num_outputs, device=device))


def _weight(layer: QuantConv2d | QuantLinear) -> Tensor:
    """Returns the weights, which lie on their grid already; an export must see that they do."""
    if not torch.onnx.is_in_onnx_export():
        return layer.weight
    zero_points = torch.zeros_like(layer.weight_scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(layer.weight, layer.weight_scale, zero_points, 0, -128, 127)


def _fit_weights(quantised: QuantConv2d | QuantLinear, layer: nn.Conv2d | nn.Linear) -> None:
    """Rounds weights and bias of a float layer onto the grids of its quantised twin."""
    weight = layer.weight.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    bias_C = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.nan_to_num(0.0, 0.0, 0.0)
    input_scale = quantised.input_grid.scale
    # A channel of tiny weights would need more levels than int32 has for its bias: its scale is no smaller than that.
    for_bias_C = bias_C.abs() / (input_scale * BIAS_LEVELS)
    scale_C = torch.maximum(weight.flatten(1).abs().amax(1) / WEIGHT_LEVELS, for_bias_C).clamp_min(_SMALLEST_SCALE)
    scale = scale_C.reshape(-1, *[1] * (weight.dim() - 1))
    quantised.weight_scale.copy_(scale_C)
    quantised.weight.copy_(torch.round(weight / scale).clamp(-WEIGHT_LEVELS, WEIGHT_LEVELS) * scale)
    bias_scale_C = (input_scale * scale_C).double()
    assert quantised.bias is not None
    quantised.bias.copy_(torch.round(bias_C.double() / bias_scale_C) * bias_scale_C)
