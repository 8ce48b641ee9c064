"""Structured pruning: whole channels leave, and what stays is a smaller dense network of the same layers.

A channel's importance is that of the filters that write it (Li et al., 2017), as a share of what is left of their
layers (Molchanov et al., 2017, section 2.2, normalise by layer and weigh by cost too), so a network is never cut
through: the fewer filters a layer has left, the more each is worth. Nothing but the weights is read.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from trilemma.compression.channel_spaces import ChannelSpaces, channel_spaces, is_plain
from trilemma.compression.multiply_adds import multiply_adds_by_layer
from trilemma.models.classifier import Classifier

_TOLERANCE = 1e-3


def prune_channels(
    classifier: Classifier, keep_multiply_adds: float, image_shape: tuple[int, int, int], multiple: int = 1
) -> Classifier:
    """Returns a copy with fewer channels, whose layers have the names that they had.

    It computes exactly what the network would if the filters, biases, affine parameters and readers' columns of the
    channels that left were zero. The unit is a channel, or as many as hold whole groups of every group
    normalisation that looks at them (see `channel_spaces`), so the statistics of the groups that stay are what they
    were; with a `multiple`, where the channels are one, so many of similar importance that what stays is a multiple
    of it. One by one the unit leaves whose importance per saved multiply-add is the least: the sum, over the layers
    that write it, of its filters' share of the layer's remaining squared L2 norm. The last to leave is, of all that
    would do, the one that saves the least; then what still fits comes back, the last to leave first, so no single
    unit more could have stayed. At least one unit of each space stays, and all image channels and logits.

    Args:
        classifier: The network; unchanged.
        keep_multiply_adds: Largest share of the multiply-adds that may be left, in (0, 1]; 1 gives an equal network.
        image_shape: C, H and W of an image.
        multiple: At least 1: the channels of a place stay a multiple of it, and of whole groups, where they are one and
            more than that; elsewhere they leave one unit after the other.

    Raises:
        ValueError: For a share outside (0, 1], one that cannot be reached, or a network that cannot be traced.
    """
    if not 0 < keep_multiply_adds <= 1:
        raise ValueError(f"The share of multiply-adds to keep must lie in (0, 1], not {keep_multiply_adds}.")
    spaces = channel_spaces(classifier, image_shape)
    layers = dict(classifier.named_modules())
    counts = multiply_adds_by_layer(classifier, image_shape)
    units = [_units(spaces, layers, space, multiple) for space in range(len(spaces.spaces))]
    choice = _Choice(spaces, units, counts)
    at_most = keep_multiply_adds * sum(counts.values())
    while choice.total() > at_most:
        if not choice.remove(at_most):
            least = choice.total() / sum(counts.values())
            problem = f"share {keep_multiply_adds:.3g} of the multiply-adds cannot be reached"
            together = f", {multiple} together," if multiple > 1 else ""
            raise ValueError(f"The {problem}: with one unit of channels{together} in each place {least:.3g} are left.")
    choice.give_back(at_most)
    kept = [choice.channels(space) for space in range(len(spaces.spaces))]
    small = _restricted(classifier, spaces, kept)
    _check(classifier, small, spaces, kept, image_shape)
    return small


def shrunken(classifier: Classifier, shapes: Mapping[str, Size]) -> Classifier:
    """Returns a copy whose layers have the sizes of a stored state and meaningless numbers, for it to be loaded into.

    Plain convolutions, linear layers, batch and group normalisations are resized; the size of a group stays, so their
    number shrinks. Everything else stays as it is.

    Args:
        classifier: The network that the state's was made of; unchanged.
        shapes: Name within the classifier -> shape, of every tensor of the state.

    Raises:
        ValueError: For a shape that no pruning of this network can have.
    """
    small = copy.deepcopy(classifier)
    for name, layer in small.named_modules():
        tensor = "running_mean" if getattr(layer, "weight", None) is None else "weight"
        if not is_plain(layer, nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.GroupNorm) or f"{name}.{tensor}" not in shapes:
            continue
        old, new = tuple(getattr(layer, tensor).shape), tuple(shapes[f"{name}.{tensor}"])
        groups = getattr(layer, "groups", 1)
        fits = len(old) == len(new) and all(1 <= n <= o for o, n in zip(old, new, strict=True)) and new[2:] == old[2:]
        if isinstance(layer, nn.GroupNorm):
            fits = fits and new[0] % (layer.num_channels // layer.num_groups) == 0
        if not fits or (groups > 1 and new != old):
            raise ValueError(f"{name}.{tensor} has shape {new} in the stored state, and {old} cannot be pruned to it.")
        _restrict(layer, torch.arange(new[0]), torch.arange(new[1]) if len(new) > 1 else None)
    return small


class _Units(NamedTuple):
    """The units of one space.

    Attributes:
        channels_UC: Places of the channels of each.
        energies_LU: Squared L2 norms of their filters in every layer that writes the space, float64.
    """

    channels_UC: Tensor
    energies_LU: Tensor


class _Choice:
    """Which units of each space stay, and what the network then costs.

    Args:
        spaces: What shares channels.
        units: Of each space.
        counts: Multiply-adds of every layer, with all channels.
    """

    def __init__(self, spaces: ChannelSpaces, units: list[_Units], counts: dict[str, int]):
        self._spaces = spaces.spaces
        self._units = units
        self._kept = [torch.ones(len(own.channels_UC), dtype=torch.bool) for own in units]
        self._width = [space.size for space in spaces.spaces]
        self._fixed = sum(count for name, count in counts.items() if name not in spaces.layers)
        #: Space read, space written, multiply-adds of one pair of channels.
        self._pairs = []
        for name, (read, written) in spaces.layers.items():
            self._pairs.append((read, written, counts[name] // (self._width[read] * self._width[written])))
        self._touching = [[pair for pair in self._pairs if space in pair[:2]] for space in range(len(self._width))]
        self._least = [self._weakest(space) for space in range(len(self._width))]
        self._gone: list[tuple[int, int]] = []

    def total(self) -> int:
        """Returns the multiply-adds of what is kept."""
        return self._fixed + self._cost(self._pairs)

    def channels(self, space: int) -> Tensor:
        """Returns the places of the channels of a space that stay, in ascending order."""
        return self._units[space].channels_UC[self._kept[space]].flatten().sort().values

    def remove(self, at_most: float) -> bool:
        """Takes out the unit of the least importance per saved multiply-add; False where every space is at its end.

        Where that reaches `at_most`, the unit that reaches it with the least saving goes instead.
        """
        saved = [self._saved(space) for space in range(len(self._width))]
        able = [space for space, count in enumerate(saved) if count > 0 and self._least[space] is not None]
        if not able:
            return False
        space = min(able, key=lambda space: self._least[space][0] / saved[space])
        excess = self.total() - at_most
        if saved[space] >= excess:
            space = min((space for space in able if saved[space] >= excess), key=lambda space: saved[space])
        self._put(space, self._least[space][1], stays=False)
        self._gone.append((space, self._least[space][1]))
        self._least[space] = self._weakest(space)
        return True

    def give_back(self, at_most: float) -> None:
        """Puts back what fits, the last that left first; what does not fit now fits no better later."""
        for space, unit in reversed(self._gone):
            self._put(space, unit, stays=True)
            if self.total() > at_most:
                self._put(space, unit, stays=False)

    def _put(self, space: int, unit: int, stays: bool) -> None:
        self._kept[space][unit] = stays
        self._width[space] += self._step(space) if stays else -self._step(space)

    def _step(self, space: int) -> int:
        return self._units[space].channels_UC.shape[1]

    def _cost(self, pairs: list[tuple[int, int, int]]) -> int:
        return sum(self._width[read] * self._width[written] * count for read, written, count in pairs)

    def _saved(self, space: int) -> int:
        """Returns the multiply-adds that leave with one unit of a space."""
        before = self._cost(self._touching[space])
        self._width[space] -= self._step(space)
        after = self._cost(self._touching[space])
        self._width[space] += self._step(space)
        return before - after

    def _weakest(self, space: int) -> Any:
        """Returns importance and place of the unit that would leave next, the first of equal ones; None at the end."""
        kept = self._kept[space]
        if self._spaces[space].frozen or int(kept.sum()) <= 1:
            return None
        importances = _importances(self._units[space].energies_LU[:, kept])
        weakest = int(importances.argmin())
        return float(importances[weakest]), int(kept.nonzero()[weakest])


def _units(spaces: ChannelSpaces, layers: Mapping[str, Any], space: int, multiple: int) -> _Units:
    """Returns the units of a space: its own, or as many of similar importance as leave a multiple of channels."""
    size, unit, _ = spaces.spaces[space]
    rows = []
    for name, (_, written) in spaces.layers.items():
        if written == space:
            weight = layers[name].weight.detach().cpu().double().nan_to_num(0.0, 0.0, 0.0)
            rows.append(weight.flatten(1).square().sum(1).reshape(-1, unit).sum(1))
    energies_LU = torch.stack(rows) if rows else torch.zeros(0, size // unit, dtype=torch.float64)
    channels_UC = torch.arange(size).reshape(-1, unit)
    together = math.lcm(unit, multiple) // unit
    if together == 1 or len(channels_UC) % together or len(channels_UC) == together:
        return _Units(channels_UC, energies_LU)
    order_UT = _importances(energies_LU).argsort(stable=True).reshape(-1, together)
    return _Units(channels_UC[order_UT].flatten(1), energies_LU[:, order_UT].sum(2))


def _importances(energies_LU: Tensor) -> Tensor:
    """Returns the importance of each unit: the sum over layers of its share of the layer's squared norm."""
    return (energies_LU / energies_LU.sum(1, keepdim=True).clamp_min(torch.finfo(energies_LU.dtype).tiny)).sum(0)


def _restricted(classifier: Classifier, spaces: ChannelSpaces, kept: list[Tensor]) -> Classifier:
    """Returns a copy that has the kept channels of every space and no others."""
    small = copy.deepcopy(classifier)
    layers = dict(small.named_modules())
    for name, (read, written) in spaces.layers.items():
        _restrict(layers[name], kept[written], kept[read])
    for name, space in spaces.norms.items():
        _restrict(layers[name], kept[space], None)
    return small


def _restrict(layer: nn.Module, out_C: Tensor, in_C: Tensor | None) -> None:
    """Takes the outputs `out_C`, and of a layer with inputs the inputs `in_C`, in place; all tensors are new ones."""
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if tensor.dim() == 0:
            continue
        part = tensor.detach().index_select(0, out_C.to(tensor.device))
        if name == "weight" and in_C is not None:
            part = part.index_select(1, in_C.to(tensor.device))
        if isinstance(tensor, nn.Parameter):
            setattr(layer, name, nn.Parameter(part.contiguous(), requires_grad=tensor.requires_grad))
        else:
            setattr(layer, name, part.contiguous())
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.BatchNorm2d):
        layer.num_features = len(out_C)
    elif isinstance(layer, nn.GroupNorm):
        layer.num_groups = len(out_C) * layer.num_groups // layer.num_channels
        layer.num_channels = len(out_C)


def _check(
    classifier: Classifier,
    small: Classifier,
    spaces: ChannelSpaces,
    kept: list[Tensor],
    image_shape: tuple[int, int, int],
) -> None:
    """Runs both networks once: a network's own code may depend on its channels in a way that no graph shows.

    Raises:
        ValueError: If the small one does not compute what the large one does without what left.
    """
    large = _zeroed(classifier, spaces, kept).eval()
    values = torch.linspace(0, 1, 2 * Size(image_shape).numel(), device=classifier.device)
    x_BCHW = values.reshape(2, *image_shape)
    training = small.training
    try:
        with torch.no_grad():
            expected, found = large(x_BCHW), small.eval()(x_BCHW)
        scale = float(expected.abs().nan_to_num(0.0, 0.0, 0.0).max())
        same = torch.allclose(found, expected, rtol=0, atol=_TOLERANCE * max(scale, 1e-6), equal_nan=True)
    except Exception:  # whatever the network's own code raises at sizes that it does not expect
        same = False
    small.train(training)
    if not same:
        raise ValueError("The network's code depends on the number of its channels, so none of them can leave.")


def _zeroed(classifier: Classifier, spaces: ChannelSpaces, kept: list[Tensor]) -> Classifier:
    """Returns a copy in which what writes, normalises or reads channels that are not kept is zero."""
    large = copy.deepcopy(classifier)
    layers: dict[str, Any] = dict(large.named_modules())
    gone = [torch.ones(space.size, dtype=torch.bool) for space in spaces.spaces]
    for mask, places in zip(gone, kept, strict=True):
        mask[places] = False
    with torch.no_grad():
        for name, (read, written) in spaces.layers.items():
            layers[name].weight[gone[written]] = 0
            layers[name].weight[:, gone[read]] = 0
            if layers[name].bias is not None:
                layers[name].bias[gone[written]] = 0
        for name, space in spaces.norms.items():
            for tensor in (layers[name].weight, layers[name].bias):
                if tensor is not None:
                    tensor[gone[space]] = 0
    return large
