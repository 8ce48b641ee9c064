"""Per-unit parameter gradients of one layer, from its input and the gradient at its output.

A *unit* is what is clipped as one: a record with all its views. Tensors here carry units in front and views after, so
that x_BV... of a layer is (units, views, *what the layer sees of one image*); a unit's gradient is the sum over its
views. Each layer has up to three exact ways to the same numbers:

- `per_unit_gradients`: the gradient of every unit, held for the weighted sum;
- `ghost_squared_norm`: the squared norm of a weight's gradient without the gradient itself (Goodfellow 2015; for
  convolutions by the Gram matrices of input and output gradient, Rochette et al. 2020, Bu et al. 2022);
- `weighted_weight_gradient`: the sum over units of weight x gradient, as costly as a batch's ordinary gradient.

The Gram matrix of a convolution's unfolded input is a sum of shifted copies of the Gram matrix of its pixels, along
one axis after the other, so nothing is unfolded: on small feature maps this makes the norm far cheaper
than the gradient.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilemma.models.weight_standardisation import WeightStandardisedConv2d
from trilemma.privacy import standardised

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Normalisation = nn.GroupNorm | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d

#: Exactly these types, not their subclasses, whose forward may do something else; of those only one has a rule.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMALISATIONS = (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
SUPPORTED = (nn.Linear, *CONVOLUTIONS, WeightStandardisedConv2d, *NORMALISATIONS, nn.LayerNorm, nn.Embedding)

#: Numbers of a Gram matrix that are worked on at once: half of a core's second-level cache, so that shifting is cheap.
GRAM_NUMBERS = 1 << 17

#: A ghost norm this much smaller (squared) than what may have been added up and cancelled may have lost its digits. Of
#: float32's 1e-2 leaves a relative error of the norm below 1e-5 (measured: 7e-6; 1e-4 left 5e-4).
CANCELLATION = 1e-2

#: Standardised weights of a layer that may be 0 by chance, as of millions a few are; each is looked at on its own.
FEW_ZEROS = 16

# Nanoseconds on one AVX-512 core, measured; only their proportions matter, and only for speed.
_GRAM_PRODUCT, _GRAM_NUMBER = 0.014, 1.6  # a multiply-add of a Gram matrix; shifting and multiplying one of its numbers
_HELD_NUMBER = 2.0  # writing a number of a unit's gradient and reading it for norm and sum


def why_unsupported(module: nn.Module) -> str | None:
    """Returns why the parameters that a module holds itself have no rule here, or None if they have."""
    if type(module) not in SUPPORTED:
        return f"{type(module).__name__} has no rule"
    if isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.max_norm is not None or module.sparse):
        return "an Embedding with scale_grad_by_freq, max_norm or sparse has no gradient of a single record"
    if getattr(module, "track_running_stats", False):
        return "running statistics mix records"
    return None


def per_unit_gradients(module: nn.Module, x: Tensor, g: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Returns the gradients (B, P_name) of the parameters `names` ("weight", "bias", "gain") of every unit.

    Args:
        module: One of `SUPPORTED`.
        x: Its input, (B, V, ...).
        g: The gradient at its output, (B, V, ...); in bfloat16 the products of a weight are taken in bfloat16 too.
        names: Which of its parameters.
    """
    if isinstance(module, NORMALISATIONS):
        return _pick(_normalisation(module, full(x), full(g)), names)
    if isinstance(module, nn.LayerNorm):
        return _pick(_layer_norm(module, full(x), full(g)), names)
    gradients = {}
    if "bias" in names:
        channel = 2 if isinstance(module, CONVOLUTIONS) else g.ndim - 1
        gradients["bias"] = full(g).sum([dim for dim in range(1, g.ndim) if dim != channel])
    if isinstance(module, WeightStandardisedConv2d):
        if "weight" in names:
            effective_BP = full(_convolution_by_kernel(module, x.to(g.dtype), g))
            gradients |= standardised.through_standardisation(module, effective_BP)
        elif "gain" in names:
            gradients["gain"] = standardised.gain_gradients(module, full(x), full(g))
        return _pick(gradients, names)
    if "weight" in names:
        if isinstance(module, CONVOLUTIONS):
            gradients["weight"] = full(_convolution_by_kernel(module, x.to(g.dtype), g))
        elif isinstance(module, nn.Embedding):
            gradients["weight"] = _embedding(module, x, full(g))
        else:
            assert isinstance(module, nn.Linear)
            x = x.to(g.dtype)
            gradients["weight"] = full(torch.bmm(_positions(g).transpose(1, 2), _positions(x)).flatten(1))
    return gradients


def full(x: Tensor) -> Tensor:
    """Returns a tensor with the digits of float32 at least."""
    return x.float() if x.dtype == torch.bfloat16 else x


def ghost_pays(module: nn.Module, x: Tensor, g: Tensor) -> bool:
    """Returns whether norm and weighted sum apart cost less than holding every unit's weight gradient.

    Decided by shapes alone, so that equal runs give equal numbers, and by how many standardised weights are 0.
    """
    if isinstance(module, nn.Embedding):
        return True
    num_views = x.shape[1]
    if isinstance(module, nn.Linear):
        positions = math.prod(x.shape[1:-1])
        return positions * (module.in_features + module.out_features) < module.in_features * module.out_features
    if not isinstance(module, CONVOLUTIONS):
        return False
    if isinstance(module, WeightStandardisedConv2d) and standardised.has_zeros(module, more_than=FEW_ZEROS):
        return False
    outputs = math.prod(g.shape[3:])
    per_group_in, per_group_out = x.shape[2] // module.groups, g.shape[2] // module.groups
    inputs = math.prod(x.shape[3:])
    gram_g, gram_x = (num_views * outputs) ** 2, (num_views * inputs) ** 2
    products = gram_g * per_group_out + gram_x * per_group_in
    ghost = module.groups * (_GRAM_PRODUCT * products + _GRAM_NUMBER * (gram_g + gram_x))
    # The gradient itself costs the same held as summed; who holds it pays for the memory.
    return ghost < _HELD_NUMBER * module.weight.numel()


def ghost_squared_norm(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """Returns the squared norm (B,) of every unit's weight gradient, without forming it."""
    if isinstance(module, WeightStandardisedConv2d):
        longer_B = _convolution_ghost(module, x, standardised.ahead(module, g))
        return longer_B - standardised.taken_out(module, x, g)
    if isinstance(module, CONVOLUTIONS):
        return _convolution_ghost(module, x, g)
    if isinstance(module, nn.Embedding):
        index_BL, g_BLM = x.flatten(1), _positions(g)
        same_BLL = (index_BL[:, :, None] == index_BL[:, None]).to(g.dtype)
        if module.padding_idx is not None:
            same_BLL = same_BLL * (index_BL != module.padding_idx)[:, None]
        return (same_BLL * torch.bmm(g_BLM, g_BLM.transpose(1, 2))).sum((1, 2))
    x_BLK, g_BLM = _positions(x), _positions(g)
    if x_BLK.shape[1] == 1:
        return x_BLK.square().sum((1, 2)) * g_BLM.square().sum((1, 2))
    gram_BLL = torch.bmm(x_BLK, x_BLK.transpose(1, 2))
    return (gram_BLL * torch.bmm(g_BLM, g_BLM.transpose(1, 2))).sum((1, 2))


def ghost_lost_digits(module: nn.Module, x: Tensor, g: Tensor, squared_B: Tensor) -> Tensor:
    """Returns of which units (B,) the ghost norm is what large numbers left over that cancelled.

    None whose norm is not finite: nothing would make it finite.
    """
    if isinstance(module, nn.Embedding):  # as if all gradients of one row pointed the same way
        largest_B = ghost_squared_norm(module, x, torch.linalg.vector_norm(g, dim=-1, keepdim=True))
    else:
        g = standardised.ahead(module, g) if isinstance(module, WeightStandardisedConv2d) else g
        largest_B = x.flatten(1).square().sum(1) * g.flatten(1).square().sum(1)
    lost_B = squared_B < CANCELLATION * largest_B
    if isinstance(module, nn.Linear) and lost_B.any():
        # That bound is far off where there are many positions; what was really added is as dear as the norm.
        x_BLK, g_BLM = _positions(x[lost_B]), _positions(g[lost_B])
        grams = torch.bmm(x_BLK, x_BLK.transpose(1, 2)), torch.bmm(g_BLM, g_BLM.transpose(1, 2))
        lost_B[lost_B.clone()] = squared_B[lost_B] < CANCELLATION * (grams[0] * grams[1]).abs().sum((1, 2))
    return lost_B


def weighted_weight_gradient(module: nn.Module, x: Tensor, g: Tensor, weight_B: Tensor) -> Tensor:
    """Returns the sum over units of weight x weight gradient, flat (P,)."""
    if isinstance(module, nn.Embedding):
        g = g * _spread(weight_B, g)
        padding = -1 if module.padding_idx is None else module.padding_idx
        return torch.ops.aten.embedding_dense_backward(
            g.flatten(0, -2), x.flatten(), module.num_embeddings, padding, False
        ).flatten()
    # The smaller one of the two is scaled.
    if x.numel() < g.numel():
        x = x * _spread(weight_B, x)
    else:
        g = g * _spread(weight_B, g)
    if isinstance(module, CONVOLUTIONS):
        total_P = _kernel(module, *_padded(module, x.flatten(0, 1)), g.flatten(0, 1)).flatten()
        if isinstance(module, WeightStandardisedConv2d):
            return standardised.through_standardisation(module, total_P[None])["weight"][0]
        return total_P
    return (g.flatten(0, -2).T @ x.flatten(0, -2)).flatten()


def _pick(gradients: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {name: gradients[name] for name in names}


def _spread(weight_B: Tensor, like: Tensor) -> Tensor:
    return weight_B.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _positions(x: Tensor) -> Tensor:
    """Returns (B, positions, features) of (B, V, ..., features)."""
    return x.flatten(1, -2)


def _embedding(module: nn.Embedding, x: Tensor, g: Tensor) -> Tensor:
    index_BL, g_BLM = x.flatten(1), _positions(g)
    if module.padding_idx is not None:
        g_BLM = g_BLM * (index_BL != module.padding_idx)[..., None]
    total = g.new_zeros(len(g), module.num_embeddings, g.shape[-1])
    return total.scatter_add_(1, index_BL[..., None].expand_as(g_BLM), g_BLM).flatten(1)


def _layer_norm(module: nn.LayerNorm, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    normed = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    over = list(range(1, g.ndim - len(module.normalized_shape)))
    return {"weight": (g * normed).sum(over).flatten(1), "bias": g.sum(over).flatten(1)}


def _normalisation(module: Normalisation, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Group and instance normalisation, by torch's own kernel: all images' channels side by side are one image's."""
    num_images, channels = x.shape[0] * x.shape[1], x.shape[2]
    groups = module.num_groups if isinstance(module, nn.GroupNorm) else channels
    positions = x.shape[3:].numel()
    x_1CL, g_1CL = (tensor.reshape(1, num_images * channels, positions) for tensor in (x, g))
    shape = 1, num_images * channels, positions, num_images * groups
    _, mean, rstd = torch.ops.aten.native_group_norm(x_1CL, None, None, *shape, module.eps)
    _, weight_C, bias_C = torch.ops.aten.native_group_norm_backward(
        g_1CL, x_1CL, mean, rstd, x.new_ones(shape[1]), *shape, [False, True, True]
    )
    each = (x.shape[0], x.shape[1], channels)
    return {"weight": weight_C.view(each).sum(1), "bias": bias_C.view(each).sum(1)}


def _padded(module: Convolution, x_NCL: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Returns the input and the symmetric zero padding that the kernel still has to add to it."""
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return x_NCL, tuple(int(p) for p in module.padding)
    around = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x_NCL, around, mode=mode), (0,) * len(module.kernel_size)


def _kernel(module: Convolution, x_NCL: Tensor, padding: tuple[int, ...], g_NML: Tensor, copies: int = 1) -> Tensor:
    """The convolution's own weight gradient, summed over its input's first axis.

    Args:
        module: The convolution.
        x_NCL: Its input; with `copies`, that many inputs side by side as channels.
        padding: Of zeros around it.
        g_NML: The gradient at its output, side by side likewise.
        copies: Each is a group of channels of one wide grouped convolution, with a weight gradient of its own.
    """
    weight = module.weight.to(g_NML.dtype)
    weight = weight.expand(copies, *weight.shape).flatten(0, 1) if copies > 1 else weight
    return torch.ops.aten.convolution_backward(
        g_NML,
        x_NCL,
        weight,
        None,
        module.stride,
        padding,
        module.dilation,
        False,
        [0] * len(padding),
        copies * module.groups,
        [False, True, False],
    )[1]


def _convolution_by_kernel(module: Convolution, x: Tensor, g: Tensor) -> Tensor:
    """Every unit's gradient by one call: units are groups of channels (Lee & Kifer 2020), views are the batch."""
    num_units, num_views = x.shape[:2]
    x_NCL, padding = _padded(module, x.flatten(0, 1))
    x_VCL = x_NCL.unflatten(0, (num_units, num_views)).transpose(0, 1).flatten(1, 2)
    return _kernel(module, x_VCL, padding, g.transpose(0, 1).flatten(1, 2), num_units).view(num_units, -1)


def _convolution_ghost(module: Convolution, x: Tensor, g: Tensor) -> Tensor:
    x_NCL, padding = _padded(module, x.flatten(0, 1))
    num_units, num_views = x.shape[:2]
    x_UCVL = _by_group(x_NCL.unflatten(0, (num_units, num_views)), module.groups)
    g_UMVL = _by_group(g, module.groups)
    numbers = max(x_UCVL.shape[2:].numel(), g_UMVL.shape[2:].numel()) ** 2
    chunk = max(1, GRAM_NUMBERS // numbers)
    parts = []
    for x_part, g_part in zip(x_UCVL.split(chunk), g_UMVL.split(chunk), strict=True):
        gram = _gram(x_part)
        for axis, (kernel, stride, dilation, pad) in enumerate(
            zip(module.kernel_size, module.stride, module.dilation, padding, strict=True)
        ):
            gram = _slide(gram, axis, g_part.shape[3 + axis], kernel, stride, dilation, pad)
        # vecdot adds pairwise; a product of matrices loses digits over as many numbers.
        parts.append(torch.linalg.vecdot(gram.flatten(1), _gram(g_part).flatten(1)))
    return torch.cat(parts).unflatten(0, (num_units, module.groups)).sum(1)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Returns (B x groups, C / groups, V, ...) of (B, V, C, ...)."""
    return x.unflatten(2, (groups, -1)).movedim(1, 3).flatten(0, 1)


def _gram(x: Tensor) -> Tensor:
    """Returns (U, V, ..., V, ...), the products over channels of every two positions of (U, C, V, ...)."""
    positions = x.shape[2:]
    x_UCL = x.flatten(2)
    return torch.bmm(x_UCL.transpose(1, 2), x_UCL).unflatten(2, positions).unflatten(1, positions)


def _slide(gram: Tensor, axis: int, outputs: int, kernel: int, stride: int, dilation: int, pad: int) -> Tensor:
    """Replaces the pixels of one spatial axis by the windows of a kernel: both positions move together."""
    rank = (gram.ndim - 1) // 2
    first, second = 2 + axis, 2 + axis + rank  # after the units and the views
    size = gram.shape[first]
    if kernel == stride == 1 and pad == 0:
        return gram
    reach = []  # of each offset: the outputs whose pixel lies inside, and these pixels
    for offset in range(kernel):
        shift = offset * dilation - pad
        start, stop = max(0, -(shift // stride)), min(outputs, (size - 1 - shift) // stride + 1)
        if start < stop:
            pixels = slice(start * stride + shift, (stop - 1) * stride + shift + 1, stride)
            reach.append((slice(start, stop), pixels))
    # An offset that reaches every output saves filling with zeros.
    reach.sort(key=lambda pair: pair[0].start - pair[0].stop)
    if reach and reach[0][0] == slice(0, outputs):
        windows = gram[_at(rank, axis, reach.pop(0)[1])].clone(memory_format=torch.contiguous_format)
    else:
        shape = list(gram.shape)
        shape[first] = shape[second] = outputs
        windows = gram.new_zeros(shape)
    for inside, pixels in reach:
        windows[_at(rank, axis, inside)] += gram[_at(rank, axis, pixels)]
    return windows


def _at(rank: int, axis: int, chosen: slice) -> tuple[slice, ...]:
    both = [slice(None)] * (1 + axis + 1), [slice(None)] * (rank - 1)
    return (*both[0], chosen, *both[1], chosen)
