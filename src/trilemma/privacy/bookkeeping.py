"""Per-unit clipped gradient sums by book-keeping: the fast engine (Bu et al. 2023, Algorithm 1).

One forward pass notes every layer's input; one backward pass, to the activations only, gives the gradient at every
layer's output. From these two come the norm of each unit's gradient, layer by layer, and, once the clipping factors are
known, the weighted sum: no second backward pass. Gradients of single units are held for one pass, and only of those
parameters where that is cheaper than their norms and sum apart. Networks that have a layer without a rule go to the
reference in `clipping.py`, which gives the same numbers.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trilemma.models.classifier import Classifier
from trilemma.privacy import clipping, layers
from trilemma.privacy.clipping import ClippedSum, RecordLoss
from trilemma.privacy.clipping_rules import Clipper, Flat, row_norms, total_norms
from trilemma.randomness import global_seed

#: Numbers of layer inputs that one pass notes at most, 4 bytes each: bounds memory at any batch size, and what stays in
#: a cache is faster than what does not.
NOTED_NUMBERS = 8_000_000

#: Images in one pass at most, whatever the network.
MAX_IMAGES = 256

_Edge = torch.autograd.graph.GradientEdge


class _Call(NamedTuple):
    """One call of a layer: its input, and the edge of the graph where its output's gradient arrives.

    An edge and not the output: a later layer that works in place would change what the output's gradient means.
    """

    x: Tensor
    output: _Edge


class _Part(NamedTuple):
    """One parameter's share: of every unit's squared norm, and of the sum once the units' weights are known."""

    squared_norm_B: Tensor
    weighted_sum: Callable[[Tensor], Tensor]


def clipped_gradient_sum(
    classifier: Classifier, loss: RecordLoss, x_BVCHW: Tensor, y_B: Tensor, clipper: Clipper
) -> ClippedSum:
    """Returns the sum of clipped gradients: what `clipping.clipped_gradient_sum` returns, to float accuracy, faster.

    Args:
        classifier: As there; its parameters keep what gradients they have.
        loss: As there.
        x_BVCHW: As there.
        y_B: As there.
        clipper: As there.
    """
    verdict = _verdict(classifier, x_BVCHW.shape[2:])
    if verdict.reason is not None:
        return clipping.clipped_gradient_sum(classifier, loss, x_BVCHW, y_B, clipper)
    group_sizes = clipper.group_sizes(classifier)
    group_of = _group_of_each_parameter(classifier, group_sizes)
    total_P = torch.zeros(sum(group_sizes), device=y_B.device, dtype=x_BVCHW.dtype)
    norms, losses = [total_P.new_zeros(0, len(group_sizes))], [total_P.new_zeros(0)]
    chunk = max(1, verdict.images // x_BVCHW.shape[1])
    for x, y in zip(x_BVCHW.split(chunk), y_B.split(chunk), strict=True):
        left_B = torch.ones(len(y), dtype=torch.bool, device=y.device)
        norm_BG, loss_B = total_P.new_zeros(len(y), len(group_sizes)), total_P.new_zeros(len(y))
        while left_B.any():
            parts, loss_B[left_B] = _parts(classifier, loss, x[left_B], y[left_B])
            norm_BG[left_B] = own_BG = _norms(parts, group_of, len(group_sizes))
            if own_BG.isfinite().all():
                total_P += _weighted_sum(parts, clipper.weights(own_BG)[:, group_of])
                break
            # 0 times infinity is no number: such a unit counts as zero, and the others are done again without it, for
            # norms and sum must come from one pass. Where the network draws (dropout), that pass draws anew, from the
            # same distribution.
            left_B &= norm_BG.isfinite().all(1)
        norms.append(norm_BG)
        losses.append(loss_B)
    norms_BG = torch.cat(norms)
    return ClippedSum(total_P, total_norms(norms_BG), torch.cat(losses), norms_BG)


def why_slow(classifier: Classifier, image_shape: torch.Size) -> str | None:
    """Returns why a network needs the reference engine, or None if it does not.

    Structure is looked at first; then both engines are given the same few random images and a perturbed copy of the
    network in double precision, once, and must agree on every parameter. That finds what structure does not show:
    weights that are used without calling their layer, batches that are folded or turned within the network, layers
    that mix records.
    """
    return _verdict(classifier, image_shape).reason


class _Verdict(NamedTuple):
    """Why a network needs the reference, if it does, and how many images are fast in one pass."""

    reason: str | None
    images: int = 1


#: What a verdict holds for: the shape of images, training or evaluation, and which parameters are trainable.
_Circumstances = tuple[torch.Size, bool, tuple[bool, ...]]

_VERDICTS: WeakKeyDictionary[nn.Module, dict[_Circumstances, _Verdict]] = WeakKeyDictionary()


def _verdict(classifier: Classifier, image_shape: torch.Size) -> _Verdict:
    verdicts = _VERDICTS.setdefault(classifier, {})
    trainable = tuple(parameter.requires_grad for parameter in classifier.parameters())
    circumstances = image_shape, classifier.training, trainable
    if circumstances not in verdicts:
        reason = _structural_reason(classifier)
        # A network may draw in its forward pass; the training's draws must not depend on whether it was probed before.
        with global_seed(0, "probe"):
            verdicts[circumstances] = _Verdict(reason) if reason is not None else _probed(classifier, image_shape)
    return verdicts[circumstances]


def _structural_reason(classifier: Classifier) -> str | None:
    owners: dict[int, str] = {}
    for name, module in classifier.named_modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            reason = layers.why_unsupported(module)
            if reason is not None:
                return f"layer '{name}': {reason}"
            if id(parameter) in owners:
                return f"layers '{owners[id(parameter)]}' and '{name}' share a parameter"
            owners[id(parameter)] = name
    return None


def _probed(classifier: Classifier, image_shape: torch.Size) -> _Verdict:
    draws = torch.Generator().manual_seed(0)
    probe = _perturbed_copy(classifier, draws)
    x_BVCHW = torch.rand(3, 2, *image_shape, generator=draws, dtype=torch.float64).to(probe.device)
    y_B = torch.arange(3, device=probe.device) % probe.num_classes
    try:
        with _noted_calls(probe) as calls:
            probe(x_BVCHW.flatten(0, 1))
        parts, _ = _parts(probe, _probe_loss, x_BVCHW, y_B)
        agree = all(_agrees(probe, parts, x_BVCHW, y_B, unit) for unit in range(len(y_B)))
    except Exception as error:  # whatever a foreign network does that was not foreseen, the reference may know better
        return _Verdict(f"the fast engine cannot follow its forward pass ({type(error).__name__}: {error})")
    if not agree:
        return _Verdict("the fast engine's gradients differ from the reference's")
    noted = sum(call.x.numel() for each in calls.values() for call in each) / x_BVCHW.shape[:2].numel()
    return _Verdict(None, max(1, min(MAX_IMAGES, int(NOTED_NUMBERS / max(1, noted)))))


def _perturbed_copy(classifier: Classifier, draws: torch.Generator) -> Classifier:
    """Returns a copy in double precision, without the zeros that would hide a gradient and without dropout."""
    probe = copy.deepcopy(classifier).double()
    with torch.no_grad():
        for parameter in probe.parameters():
            noise = torch.randn(parameter.shape, generator=draws, dtype=torch.float64).to(parameter.device)
            parameter.add_(0.1 * noise * (parameter.std(correction=0) + 0.1))
    for module in probe.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    return probe


def _agrees(probe: Classifier, parts: list[_Part], x_BVCHW: Tensor, y_B: Tensor, unit: int) -> bool:
    """Returns whether one unit's norm and gradient are the reference's, parameter by parameter."""
    alone_B = torch.zeros(len(y_B), dtype=x_BVCHW.dtype, device=x_BVCHW.device)
    alone_B[unit] = 1.0
    one = slice(unit, unit + 1)
    exact = clipping.clipped_gradient_sum(probe, _probe_loss, x_BVCHW[one], y_B[one], Flat(torch.inf))
    sizes = [parameter.numel() for parameter in probe.parameters() if parameter.requires_grad]
    floor = 1e-9 * float(exact.norms_B)  # what is no gradient but rounding, as of a bias before a normalisation
    for part, exact_P in zip(parts, exact.sum_P.split(sizes), strict=True):
        norm = float(exact_P.norm())
        own_P = _weighted_sum([part], alone_B[:, None])
        if float((own_P - exact_P).norm()) > 1e-6 * norm + floor:
            return False
        if abs(float(part.squared_norm_B[unit].clamp_min(0).sqrt()) - norm) > 1e-6 * norm + 1e3 * floor:
            return False
    return True


def _probe_loss(logits_BVK: Tensor, y_B: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_BVK.mean(1), y_B, reduction="none")


class _Unforeseen(Exception):
    """A forward pass used the layers in a way that has no rule."""


def _parts(classifier: Classifier, loss: RecordLoss, x_BVCHW: Tensor, y_B: Tensor) -> tuple[list[_Part], Tensor]:
    """Returns every trainable parameter's part, in `named_parameters` order, and each unit's loss."""
    num_units, num_views = x_BVCHW.shape[:2]
    with _noted_calls(classifier) as calls:
        logits_BVK = classifier(x_BVCHW.flatten(0, 1)).unflatten(0, (num_units, num_views))
    loss_B = loss(logits_BVK, y_B)
    edges = [call.output for each in calls.values() for call in each]
    gradients = iter(torch.autograd.grad(loss_B.sum(), edges, allow_unused=True))
    by_parameter: dict[int, _Part] = {}
    for module, each in calls.items():
        pairs = []
        for call in each:
            g = next(gradients)
            if len(call.x) != num_units * num_views or (g is not None and len(g) != num_units * num_views):
                raise _Unforeseen(f"a {type(module).__name__} layer does not see one row per image")
            if g is not None:
                pairs.append(tuple(tensor.unflatten(0, (num_units, num_views)) for tensor in (call.x, g)))
        by_parameter |= _layer_parts(module, pairs)
    nothing = loss_B.new_zeros(num_units)
    parts = [
        by_parameter.get(id(parameter)) or _unused(parameter, nothing)
        for parameter in classifier.parameters()
        if parameter.requires_grad
    ]
    return parts, loss_B.detach()


@contextmanager
def _noted_calls(classifier: Classifier) -> Iterator[dict[nn.Module, list[_Call]]]:
    """Notes the calls of every layer that holds trainable parameters, within the block only."""
    calls: dict[nn.Module, list[_Call]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.setdefault(module, []).append(_Call(inputs[0].detach(), torch.autograd.graph.get_gradient_edge(output)))

    handles = [
        module.register_forward_hook(note)
        for module in classifier.modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _layer_parts(module: nn.Module, pairs: list[tuple[Tensor, ...]]) -> dict[int, _Part]:
    """Returns the parts of a layer's own parameters, from the inputs and output gradients of its calls."""
    names = [name for name, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]
    parts = {}
    if not pairs:
        return parts
    if "weight" in names and len(pairs) == 1 and layers.ghost_pays(module, *pairs[0]):
        # The norm and the sum come from different sums here, so both need all digits: a sum that was rounded to fewer
        # would change, for one unit more, by more than that unit's clipped gradient.
        x, g = (layers.full(tensor) for tensor in pairs[0])
        names.remove("weight")
        parts[id(module.weight)] = _ghost(module, x, g)
    calls = [layers.per_unit_gradients(module, x, g, names) for x, g in pairs]
    for name in names:
        parts[id(getattr(module, name))] = _held(sum((call[name] for call in calls[1:]), calls[0][name]))
    return parts


def _ghost(module: nn.Module, x: Tensor, g: Tensor) -> _Part:
    """Returns a weight's part without any unit's gradient, but for units whose ghost norm lost its digits."""
    squared_B = layers.ghost_squared_norm(module, x, g)
    lost_B = layers.ghost_lost_digits(module, x, g, squared_B)
    if not lost_B.any():
        return _Part(squared_B, lambda weight_B: layers.weighted_weight_gradient(module, x, g, weight_B))
    held = _held(layers.per_unit_gradients(module, x[lost_B], g[lost_B], ["weight"])["weight"])

    def weighted_sum(weight_B: Tensor) -> Tensor:
        others_P = layers.weighted_weight_gradient(module, x, g, weight_B.masked_fill(lost_B, 0.0))
        return others_P + held.weighted_sum(weight_B[lost_B])

    return _Part(squared_B.masked_scatter(lost_B, held.squared_norm_B), weighted_sum)


def _norms(parts: list[_Part], group_of: list[int], num_groups: int) -> Tensor:
    """Returns the norm of each group of each unit's gradient, shape (B, G)."""
    squared_BT = torch.stack([part.squared_norm_B for part in parts], dim=1)
    groups_T = torch.tensor(group_of, device=squared_BT.device)
    squared_BG = squared_BT.new_zeros(len(squared_BT), num_groups).index_add_(1, groups_T, squared_BT)
    # Rounding may leave the product of two Gram matrices a little below 0.
    return squared_BG.clamp_min(0.0).sqrt()


@torch.no_grad()
def _weighted_sum(parts: list[_Part], weight_BT: Tensor) -> Tensor:
    return torch.cat([part.weighted_sum(weight_BT[:, position]) for position, part in enumerate(parts)])


def _group_of_each_parameter(classifier: Classifier, group_sizes: tuple[int, ...]) -> list[int]:
    ends = torch.tensor(group_sizes).cumsum(0)
    sizes = torch.tensor([parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad])
    return torch.searchsorted(ends, sizes.cumsum(0)).tolist()


def _held(gradients_BP: Tensor) -> _Part:
    return _Part(row_norms(gradients_BP).square(), lambda weight_B: weight_B @ gradients_BP)


def _unused(parameter: nn.Parameter, nothing_B: Tensor) -> _Part:
    return _Part(nothing_B, lambda weight_B: weight_B.new_zeros(parameter.numel()))
