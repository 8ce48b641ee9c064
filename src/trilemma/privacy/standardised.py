"""Per-unit gradients of a convolution with standardised weights, from those of the weights that it computes with.

Standardising is the same function for every unit, so a unit's gradient of weight and gain is the transpose of that
function's Jacobian at the layer's weights, applied to the unit's gradient of the standardised weights. What the layer
may round afterwards changes nothing: gradients pass straight through.
"""

from torch import Tensor

from trilemma.models.weight_standardisation import WeightStandardisedConv2d, centred


def through_standardisation(module: WeightStandardisedConv2d, effective_BP: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of weight (B, P) and gain (B, M) of every unit.

    With c the centred weights of a filter, f = 1 / sqrt(|c|^2 + eps), s = gain * scale and v the gradient of the
    standardised weights s * f * c, without its own mean over the weights that are there:

        weight: s * f * (v - f^2 * <c, v> * c)        gain: scale * f * <c, v>

    Args:
        module: The layer.
        effective_BP: The gradients (B, P) of the weights that it computes with, before any rounding.
    """
    rest = centred(module.weight)
    c_MK, present_MK, count_M1, factor_M1 = (tensor.flatten(1) for tensor in rest)
    v_BMK = effective_BP.unflatten(1, c_MK.shape) * present_MK
    v_BMK = (v_BMK - v_BMK.sum(2, keepdim=True) / count_M1) * present_MK
    along_BM1 = (c_MK * v_BMK).sum(2, keepdim=True) * factor_M1
    weight_BMK = (v_BMK - along_BM1 * (c_MK * factor_M1)) * (module.scale * module.gain[:, None] * factor_M1)
    return {"weight": weight_BMK.flatten(1), "gain": module.scale * along_BM1.squeeze(2)}
