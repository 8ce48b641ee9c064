"""Which range of its values an activation's 256 levels shall span, from images that it was watched on.

The extremes lose nothing and waste levels on what hardly occurs; a percentile cuts tails off; the least squared error
weighs both (Krishnamoorthi 2018, section 2; Nagel et al. 2021, section 2.3.1).
"""

from collections.abc import Callable, Collection, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from trilemma.compression.rounding_flow import rounding_flow
from trilemma.models.classifier import Classifier

RangeRule = Literal["min_max", "percentile", "mse"]

#: Levels of an activation: uint8.
ACTIVATION_LEVELS = 255
#: Bins of the histogram that the tails and the error are read from.
BINS = 2048
#: Values that torch counts at once: it counts in float32, which ends at so many in one bin.
_COUNTED_AT_ONCE = 2**24
#: Shares of the observed range that the least error is looked for among.
_SHARES = torch.linspace(1.0, 0.2, 81)
_BATCH = 64
_FLOW_IMAGES = 2


class Range(NamedTuple):
    """The smallest and largest value that levels span."""

    low: float
    high: float


class Watched(NamedTuple):
    """A layer's input and output over the calibration images."""

    inside: Range
    outside: Range


#: For a layer that no calibration image reaches.
NEVER_REACHED = Watched(Range(0.0, 1.0), Range(0.0, 1.0))

#: Called with a layer and its input and output in one batch.
_See = Callable[[nn.Module, Tensor, Tensor], None]


def rounding(
    classifier: Classifier,
    layers: Collection[nn.Module],
    x_NCHW: Tensor,
    rule: RangeRule = "min_max",
    percentile: float = 99.99,
) -> dict[nn.Module, Watched]:
    """Returns what an int8 network rounds, and to which ranges: layers, and the ReLUs of sums, whose input stays as is.

    What only a ReLU reads spans what that lets through, and who reads numbers unchanged takes the range that they have.
    A layer that calibration never reached keeps to [0, 1].

    Args:
        classifier: The network, in evaluation mode.
        layers: Its convolutions and linear layers.
        x_NCHW: Images in [0, 1].
        rule: See `observe`.
        percentile: See `observe`.
    """
    flow = rounding_flow(classifier, layers, x_NCHW[:_FLOW_IMAGES].to(classifier.device))
    seen = observe(classifier, [*layers, *flow.sums], x_NCHW, rule, percentile, flow.rectified)
    found = {relu: seen[id(relu)] for relu in flow.sums}
    for layer in layers:
        inside, outside = seen.get(id(layer), NEVER_REACHED)
        source = flow.sources.get(layer)
        found[layer] = Watched(inside if source is None else seen[id(source)].outside, outside)
    return found


def observe(
    classifier: Classifier,
    layers: Iterable[nn.Module],
    x_NCHW: Tensor,
    rule: RangeRule = "min_max",
    percentile: float = 99.99,
    rectified: Collection[nn.Module] = (),
) -> dict[int, Watched]:
    """Returns the range of every layer's input and output, by the layer's identity; none of layers never reached.

    Values that are not finite are left out.

    Args:
        classifier: The network, in evaluation mode.
        layers: Which of its layers.
        x_NCHW: Images in [0, 1].
        rule: "min_max", "percentile" or "mse".
        percentile: For "percentile": at most 100 - percentile per cent of the values lie beyond either end.
        rectified: Layers of whose output only what a ReLU lets through counts.
    """
    layers = list(layers)
    extremes: dict[int, Watched] = {}

    def widen(layer: nn.Module, inside: Tensor, outside: Tensor) -> None:
        outside = outside.clamp_min(0) if layer in rectified else outside
        found = Watched(_finite_range(inside), _finite_range(outside))
        before = extremes.get(id(layer), found)
        extremes[id(layer)] = Watched(*(_union(a, b) for a, b in zip(before, found, strict=True)))

    _watch(classifier, layers, x_NCHW, widen)
    if rule == "min_max":
        return extremes
    empty = torch.zeros(BINS, dtype=torch.float64)
    counts: dict[int, tuple[Tensor, Tensor]] = {key: (empty.clone(), empty.clone()) for key in extremes}

    def count(layer: nn.Module, inside: Tensor, outside: Tensor) -> None:
        outside = outside.clamp_min(0) if layer in rectified else outside
        for counted, values, within in zip(counts[id(layer)], (inside, outside), extremes[id(layer)], strict=True):
            if within.high > within.low:
                for part in values[values.isfinite()].float().split(_COUNTED_AT_ONCE):
                    counted.add_(torch.histc(part, BINS, within.low, within.high).cpu())

    _watch(classifier, layers, x_NCHW, count)
    fitted = (lambda c, r: _percentiles(c, r, percentile)) if rule == "percentile" else _least_error
    return {
        key: Watched(*(fitted(c, r) for c, r in zip(counts[key], watched, strict=True)))
        for key, watched in extremes.items()
    }


def grid_of(observed: Range) -> tuple[float, int]:
    """Returns scale and zero point of 256 levels that span a range and zero, which is always a level."""
    low, high = min(observed.low, 0.0), max(observed.high, 0.0)
    scale = max((high - low) / ACTIVATION_LEVELS or 1.0, 1e-12)
    return scale, min(max(round(-low / scale), 0), ACTIVATION_LEVELS)


def _watch(classifier: Classifier, layers: list[nn.Module], x_NCHW: Tensor, see: _See) -> None:
    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        see(module, inputs[0], output)

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        with torch.no_grad():
            for batch in x_NCHW.split(_BATCH):
                classifier(batch.to(classifier.device))
    finally:
        for handle in handles:
            handle.remove()


def _finite_range(x: Tensor) -> Range:
    low, high = torch.aminmax(x)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        finite = x[torch.isfinite(x)]
        if not finite.numel():
            return Range(0.0, 0.0)
        low, high = torch.aminmax(finite)
    return Range(float(low), float(high))


def _union(one: Range, other: Range) -> Range:
    return Range(min(one.low, other.low), max(one.high, other.high))


def _percentiles(counts: Tensor, within: Range, percentile: float) -> Range:
    """Returns the range without the tails: edges of bins, so that never more than the tails is cut off."""
    total = float(counts.sum())
    if not total:
        return within
    spare = total * (1 - percentile / 100)
    below, above = counts.cumsum(0), counts.flip(0).cumsum(0)
    width = (within.high - within.low) / BINS
    cut_low, cut_high = int((below <= spare).sum()), int((above <= spare).sum())
    if cut_low + cut_high >= BINS:  # everything is a tail of few values
        return within
    return Range(within.low + cut_low * width, within.high - cut_high * width)


def _least_error(counts: Tensor, within: Range) -> Range:
    """Returns the share of the range whose levels lie nearest to the values, in the squared mean."""
    if not float(counts.sum()):
        return within
    width = (within.high - within.low) / BINS
    middle_b = within.low + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)
    best, least = within, float("inf")
    for share in _SHARES.tolist():
        tried = Range(share * within.low, share * within.high)
        scale, zero = grid_of(tried)
        nearest_b = ((middle_b / scale).round().clamp(-zero, ACTIVATION_LEVELS - zero)) * scale
        error = float((counts * (middle_b - nearest_b).square()).sum())
        if error < least:
            best, least = tried, error
    return best
