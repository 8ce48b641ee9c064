"""Weights stored in few bits and computed with in float: int4 in groups, int8 by output channel, bfloat16.

Activations stay float, so nothing is calibrated and nothing gets faster; what shrinks is the file. A network with such
weights is an ordinary network whose weights lie on their grids, so it can be attacked as it is shipped.
"""

import copy
from collections.abc import Mapping
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from trilemma.models.classifier import Classifier

Bits = Literal[4, 8, 16]

#: Largest absolute level: symmetric, so that zero is a level and -w is stored as well as w.
LEVELS = {4: 7, 8: 127}
_PREFIX = "stored."


class Stored(NamedTuple):
    """A weight as it is stored.

    Attributes:
        bits: 4, 8 or 16 (bfloat16).
        levels_OGg: Whole numbers, output channels x groups x members; the last group is filled up with zeros. Under 16
            bits the bfloat16 weights themselves.
        scale_OG: What a level is worth, a float16 number; None under 16 bits.
        shape: Of the weight.
    """

    bits: Bits
    levels_OGg: Tensor
    scale_OG: Tensor | None
    shape: torch.Size

    def weight(self) -> Tensor:
        """Returns the weight, float32, in its own shape: the same numbers wherever it is computed."""
        if self.scale_OG is None:
            return self.levels_OGg.to(torch.float32).reshape(self.shape)
        spread = self.levels_OGg.to(torch.float32) * self.scale_OG.to(torch.float32)[..., None]
        return spread.flatten(1)[:, : self.shape[1:].numel()].reshape(self.shape)

    @property
    def num_bytes(self) -> int:
        """Returns the bytes of levels and scales."""
        scales = 0 if self.scale_OG is None else 2 * self.scale_OG.numel()
        return -(-self.levels_OGg.numel() * self.bits // 8) + scales


def store(weight: Tensor, bits: Bits, group_size: int | None = None) -> Stored:
    """Returns a weight rounded to few bits; what is not finite becomes zero.

    No weight is off by more than half of what a level is worth. Float16 ends both ways: weights above 65504 times the
    largest level are cut off, and those far below its smallest number (6e-8) become zero.

    Args:
        weight: Output channels in front.
        bits: 4 or 8 for symmetric levels with a float16 scale for each group; 16 for bfloat16.
        group_size: Consecutive weights of an output channel that share a scale; None: all of them.
    """
    finite = weight.detach().to("cpu", torch.float32).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if bits == 16:
        largest = torch.finfo(torch.bfloat16).max  # a little below float32's, which would be rounded to infinity
        return Stored(bits, finite.clamp(-largest, largest).to(torch.bfloat16).flatten(1)[:, None], None, weight.shape)
    flat_On = finite.flatten(1)
    size = min(group_size or flat_On.shape[1], flat_On.shape[1])
    padded = nn.functional.pad(flat_On, (0, -flat_On.shape[1] % size)).unflatten(1, (-1, size))
    largest = LEVELS[bits]
    # Rounded up to float16 before it divides: a scale rounded down would cut the largest weight off.
    scale_OG = (padded.abs().amax(-1) / largest).to(torch.float16)
    low = scale_OG.to(torch.float32) * largest < padded.abs().amax(-1)
    scale_OG = torch.where(low, torch.nextafter(scale_OG, torch.tensor(torch.inf, dtype=torch.float16)), scale_OG)
    scale_OG = scale_OG.clamp(max=torch.finfo(torch.float16).max)
    divisor = torch.where(scale_OG > 0, scale_OG, torch.ones_like(scale_OG)).to(torch.float32)
    levels = (padded / divisor[..., None]).round().clamp(-largest, largest).to(torch.int8)
    return Stored(bits, levels, scale_OG, weight.shape)


class StoredWeights(nn.Module):
    """What a network's weights are stored as, beside the network: buffers that travel in its state.

    They are called by numbers, for a module's name may hold no dots: first the name of the weight, as bytes.
    """

    def __init__(self, stored: dict[str, Stored]):
        super().__init__()
        for number, (name, one) in enumerate(stored.items()):
            self.register_buffer(f"name_{number}", torch.tensor(list(name.encode()), dtype=torch.uint8))
            self.register_buffer(f"bits_{number}", torch.tensor(one.bits))
            self.register_buffer(f"shape_{number}", torch.tensor(one.shape))
            self.register_buffer(f"levels_{number}", one.levels_OGg)
            if one.scale_OG is not None:
                self.register_buffer(f"scale_{number}", one.scale_OG)

    def read(self) -> dict[str, Stored]:
        """Returns name of a weight -> as it is stored."""
        buffers, found, number = dict(self.named_buffers()), {}, 0
        while f"name_{number}" in buffers:
            name, bits, shape, levels, scale = (
                buffers.get(f"{part}_{number}") for part in ("name", "bits", "shape", "levels", "scale")
            )
            assert name is not None and bits is not None and shape is not None and levels is not None
            kept = None if scale is None else scale.cpu()
            whole = Stored(cast(Bits, int(bits)), levels.cpu(), kept, torch.Size(shape.tolist()))
            found[bytes(name.tolist()).decode()] = whole
            number += 1
        return found


def empty_places(state: Mapping[str, Tensor]) -> StoredWeights:
    """Returns places for what a network's state holds of `StoredWeights`, with meaningless numbers."""
    places = StoredWeights({})
    for name, value in state.items():
        if name.startswith(_PREFIX):
            places.register_buffer(name.removeprefix(_PREFIX), torch.zeros_like(value))
    return places


def stored_weights(classifier: Classifier) -> dict[str, Stored]:
    """Returns name of a weight -> as it is stored; empty for a network that stores none in few bits."""
    places = getattr(classifier, "stored", None)
    return places.read() if isinstance(places, StoredWeights) else {}


def store_weights(classifier: Classifier, bits_of: dict[str, Bits], group_size: int) -> Classifier:
    """Returns a copy whose weights lie on the grids that they are stored on, and which knows how.

    Args:
        classifier: The network, batch norms folded; unchanged.
        bits_of: Name of a convolution's or linear layer's weight -> its bits.
        group_size: For 4 bits; 8 bits have one scale for each output channel.
    """
    twin = copy.deepcopy(classifier).eval()
    stored = {
        name: store(twin.get_parameter(name), bits, group_size if bits == 4 else None) for name, bits in bits_of.items()
    }
    with torch.no_grad():
        for name, one in stored.items():
            twin.get_parameter(name).copy_(one.weight())
    twin.stored = StoredWeights(stored).to(classifier.device)
    return twin
