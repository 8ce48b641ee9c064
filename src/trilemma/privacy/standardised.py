"""What a convolution with standardised weights adds to a plain one's per-unit gradients.

Standardising is the same function for every unit, so a unit's gradient of weight and gain is the transpose of that
function's Jacobian at the layer's weights, applied to the unit's gradient of the standardised weights. With c the
centred weights of a filter, n their number, f = 1 / sqrt(|c|^2 + eps), s = gain * scale, u = c * f, e = 1 / sqrt(n)
in each of them, and v the gradient of the standardised weights s * u, without those of weights that are 0:

    weight: s * f * (v - <e, v> e - <u, v> u)        gain: scale * <u, v>

e and u are orthogonal, so the squared norm of the first is (s * f)^2 * (|v|^2 - <e, v>^2 - (2 - |u|^2) <u, v>^2). And
<w, v> is what the layer with weights w puts out, times the gradient at the output: neither needs v itself. What the
layer may round afterwards changes nothing: gradients pass straight through.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from trilemma.models.weight_standardisation import WeightStandardisedConv2d, centred


def through_standardisation(module: WeightStandardisedConv2d, effective_BP: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of weight (B, P) and gain (B, M) of every unit.

    Args:
        module: The layer.
        effective_BP: The gradients (B, P) of the weights that it computes with, before any rounding; overwritten.
    """
    unit_MK, present_MK, count_M1, factor_M1 = _filters(module)
    v_BMK = effective_BP.unflatten(1, unit_MK.shape)
    if has_zeros(module):
        v_BMK *= present_MK
    basis_MK2 = torch.stack([present_MK * count_M1.rsqrt(), unit_MK], 2)
    v_MBK = v_BMK.transpose(0, 1)
    inner_MB2 = torch.bmm(v_MBK, basis_MK2)
    for filter_BK, inner_B2, basis_K2 in zip(v_MBK, inner_MB2, basis_MK2, strict=True):
        filter_BK.addmm_(inner_B2, basis_K2.T, alpha=-1)
    v_BMK *= _slope(module, factor_M1)
    return {"weight": v_BMK.flatten(1), "gain": module.scale * inner_MB2[:, :, 1].T}


def gain_gradients(module: WeightStandardisedConv2d, x: Tensor, g: Tensor) -> Tensor:
    """Returns the gradient of the gain (B, M) of every unit, from input and output gradient alone."""
    return module.scale * _inner(module, _filters(module)[0], x, g)


def ahead(module: WeightStandardisedConv2d, g: Tensor) -> Tensor:
    """Returns the output gradient (B, V, M, H, W), times what standardising multiplies a filter's gradient by."""
    return g * _slope(module, _filters(module)[3])[:, :, None]


def taken_out(module: WeightStandardisedConv2d, x: Tensor, g: Tensor) -> Tensor:
    """Returns by how much (B,) standardising shortens the squared norm of what it is given.

    Each weight that is 0 is looked at on its own, so there should be few.
    """
    unit_MK, present_MK, count_M1, factor_M1 = _filters(module)
    absent = (module.weight == 0).nonzero().tolist()
    along_BM = _inner(module, unit_MK, x, g)
    mean_BM = _inner(module, present_MK if absent else present_MK[: module.groups], x, g)
    each_BM = mean_BM.square() / count_M1.T + (2 - unit_MK.square().sum(1)) * along_BM.square()
    for place in absent:
        each_BM[:, place[0]] += _gradient_at(module, place, x, g).square()
    return each_BM @ _slope(module, factor_M1).square().squeeze(1)


def has_zeros(module: WeightStandardisedConv2d, more_than: int = 0) -> bool:
    """Returns whether (more than so many) weights are exactly 0, and so take no part."""
    return module.weight.numel() - int(module.weight.count_nonzero()) > more_than


def _filters(module: WeightStandardisedConv2d) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns u and the weights that are there, (M, K), n and f, (M, 1)."""
    rest = centred(module.weight)
    unit = rest.weight_MCHW * rest.factor_M111
    return unit.flatten(1), rest.present_MCHW.flatten(1), rest.count_M111.flatten(1), rest.factor_M111.flatten(1)


def _slope(module: WeightStandardisedConv2d, factor_M1: Tensor) -> Tensor:
    return module.scale * module.gain[:, None] * factor_M1


def _inner(module: WeightStandardisedConv2d, weight_MK: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """Returns <w, v> (B, M) of every filter; `weight_MK` may hold one filter for each group, (G, K)."""
    weight = weight_MK.view(-1, *module.weight.shape[1:])
    y = module._conv_forward(x.flatten(0, 1), weight, None).unflatten(0, x.shape[:2])
    by_group = g.unflatten(2, (module.groups, -1)) * y.unflatten(2, (module.groups, -1))
    return by_group.sum((1, 4, 5)).flatten(1)


def _gradient_at(module: WeightStandardisedConv2d, place: list[int], x: Tensor, g: Tensor) -> Tensor:
    """Returns one number (B,) of v: filter, channel, row and column of a weight."""
    filter_, channel, *offsets = place
    channel += filter_ // (module.out_channels // module.groups) * module.weight.shape[1]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    pixels = F.pad(x[:, :, channel], module._reversed_padding_repeated_twice, mode=mode)
    for axis, (offset, step, spread) in enumerate(zip(offsets, module.stride, module.dilation, strict=True), start=2):
        seen = torch.arange(g.shape[axis + 1], device=x.device) * step + offset * spread
        pixels = pixels.index_select(axis, seen)
    return (pixels * g[:, :, filter_]).sum((1, 2, 3))
