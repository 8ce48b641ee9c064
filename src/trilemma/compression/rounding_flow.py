"""Where the numbers of a layer go next: so that an int8 network rounds each of them once and computes no ReLU.

What a ReLU lets through is all that levels need to span, and levels that start at zero are a ReLU (Jacob et al., 2018,
section 2.4). What a layer reads unchanged from another lies on that one's levels already. Both are found by running
the network; what happens between two modules (a sum of a residual network) is not seen.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trilemma.compression.folding import is_identity
from trilemma.models.classifier import Classifier

#: Modules whose output consists of numbers of their input.
_PASSING = (nn.Identity, nn.MaxPool2d, nn.Dropout, nn.Dropout2d, nn.Flatten)

#: A tensor in one state: its identity, and how often it was written to in place.
_Value = tuple[int, int]


class Flow(NamedTuple):
    """What is known of the numbers in a network.

    Attributes:
        rectified: Layers whose output is read through a ReLU only.
        sums: ReLUs that read what was computed between two modules, each called once.
        sources: Layer -> the layer or ReLU of `sums` whose output it reads, perhaps through other ReLUs and poolings.
    """

    rectified: frozenset[nn.Module]
    sums: frozenset[nn.Module]
    sources: dict[nn.Module, nn.Module]


class _Call(NamedTuple):
    module: nn.Module
    read: _Value
    made: _Value


@torch.no_grad()
def rounding_flow(classifier: Classifier, layers: Iterable[nn.Module], x_BCHW: Tensor) -> Flow:
    """Returns where the outputs of layers go.

    Args:
        classifier: A network in evaluation mode; unchanged.
        layers: Those that are rounded.
        x_BCHW: One or more images to run it on, and to see on whether a ReLU may come earlier.
    """
    layers = set(layers)
    calls, _kept = _calls(classifier, x_BCHW)
    times = {call.module: sum(other.module is call.module for other in calls) for call in calls}
    origins: dict[_Value, nn.Module] = {}
    read_from: dict[nn.Module, set[nn.Module | None]] = {}
    made: set[_Value] = set()
    sums, before_relu = set(), []
    for module, read, written in calls:
        origin = origins.get(read)
        if module in layers:
            read_from.setdefault(module, set()).add(origin)
            origin = module
        elif type(module) is nn.ReLU:
            if origin in layers:
                before_relu.append(origin)
            elif origin is None and read not in made and times[module] == 1:
                sums.add(module)
                origin = module
        elif not (isinstance(module, _PASSING) or is_identity(module)):
            origin = None
        made.add(written)
        if origin is not None:
            origins[written] = origin
    sources = {layer: next(iter(found)) for layer, found in read_from.items() if len(found) == 1}
    known = {layer: source for layer, source in sources.items() if source is not None}
    used = frozenset(sums) & frozenset(known.values())
    known = {layer: source for layer, source in known.items() if source in layers or source in used}
    return Flow(_rectified(classifier, list(dict.fromkeys(before_relu)), x_BCHW), used, known)


def _calls(classifier: Classifier, x_BCHW: Tensor) -> tuple[list[_Call], list[Tensor]]:
    """Returns the calls of modules without children, and their tensors, as an identity is known while they live."""
    calls: list[_Call] = []
    kept: list[Tensor] = []
    reads: dict[nn.Module, _Value] = {}

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            kept.append(inputs[0])
            reads[module] = (id(inputs[0]), inputs[0]._version)

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        read = reads.pop(module, None)
        if read is not None and isinstance(output, Tensor):
            kept.append(output)
            calls.append(_Call(module, read, (id(output), output._version)))

    leaves = [module for module in classifier.modules() if not list(module.children())]
    handles = [leaf.register_forward_pre_hook(before) for leaf in leaves]
    handles += [leaf.register_forward_hook(after) for leaf in leaves]
    try:
        classifier(x_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    return calls, kept


def _rectified(classifier: Classifier, candidates: list[nn.Module], x_BCHW: Tensor) -> frozenset[nn.Module]:
    """Returns the layers below whose zero nobody looks: negative outputs can be made zero, and no logit changes."""
    expected_BK = classifier(x_BCHW)

    def unnoticed(layers: list[nn.Module]) -> bool:
        seen: set[nn.Module] = set()

        def rectify(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if bool((output < 0).any()):
                seen.add(layer)
            return output.clamp_min(0)

        handles = [layer.register_forward_hook(rectify) for layer in layers]
        try:
            same = torch.equal(classifier(x_BCHW), expected_BK)
        finally:
            for handle in handles:
                handle.remove()
        return same and len(seen) == len(layers)

    if unnoticed(candidates):
        return frozenset(candidates)
    return frozenset(layer for layer in candidates if unnoticed([layer]))
