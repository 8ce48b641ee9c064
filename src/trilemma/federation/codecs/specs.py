"""What a study may say about how updates cross the network."""

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from trilemma.federation.codecs.codec import Codec, Memory, Shapes, Written, head_and_rest, num_values
from trilemma.federation.codecs.low_rank import factors, matrices
from trilemma.federation.codecs.numbers import Numbers, num_bytes, read_numbers, write_numbers
from trilemma.federation.codecs.positions import read_positions, write_positions

_SEED_BYTES = 8
_START = "start"


class Dense(Codec):
    """Every number of the update is sent.

    Attributes:
        numbers: How: "float32" and "float16" round to the nearest; "int8" and "int4" to one of the two nearest levels
            of their block, so that they are right on average (QSGD, Alistarh et al. 2017); "sign" sends one bit for
            each and a mean magnitude for each block, and goes astray without error feedback (Karimireddy et al. 2019).
        error_feedback: What rounding took away is added to the next update.
    """

    number: ClassVar[int] = 1
    kind: Literal["dense"] = "dense"
    numbers: Numbers = "int8"
    error_feedback: bool = False

    @property
    def name(self) -> str:
        """Returns nothing: how the numbers are written says all."""
        return ""

    def write(self, values_P: Tensor, memory: Memory, draws: torch.Generator, shapes: Shapes) -> Written:
        """Returns values as bytes."""
        return write_numbers(values_P, self.numbers, draws), {}

    def decode(self, payload: bytes, shapes: Shapes) -> Tensor:
        """Returns the update of some bytes."""
        return read_numbers(payload, self.numbers, num_values(shapes))

    def largest(self, shapes: Shapes) -> int:
        """Returns how many bytes a payload has at most."""
        return num_bytes(self.numbers, num_values(shapes))


class TopK(Codec):
    """The largest numbers of the update are sent, with their positions (Aji and Heafield 2017; Stich et al. 2018).

    Attributes:
        numbers: How each of them is written.
        share: Of the numbers that are sent.
        error_feedback: The others are added to the next update. Without it small ones are never said.
    """

    number: ClassVar[int] = 2
    kind: Literal["top_k"] = "top_k"
    share: float = Field(default=0.02, gt=0, le=1)
    error_feedback: bool = True

    @property
    def name(self) -> str:
        """Returns the codec and its share."""
        return f"top {100 * self.share:g} %"

    def write(self, values_P: Tensor, memory: Memory, draws: torch.Generator, shapes: Shapes) -> Written:
        """Returns values as bytes."""
        count = _count(self.share, len(values_P))
        # What is no number counts as the largest: it must not be left out unseen.
        chosen_K = values_P.abs().nan_to_num(nan=torch.inf).topk(count, sorted=False).indices.sort().values
        return write_numbers(values_P[chosen_K], self.numbers, draws) + write_positions(chosen_K.numpy()), {}

    def decode(self, payload: bytes, shapes: Shapes) -> Tensor:
        """Returns the update of some bytes."""
        size = num_values(shapes)
        count = _count(self.share, size)
        numbers, positions = head_and_rest(payload, num_bytes(self.numbers, count))
        values_P = torch.zeros(size)
        values_P[torch.from_numpy(read_positions(positions, count, size))] = read_numbers(numbers, self.numbers, count)
        return values_P

    def largest(self, shapes: Shapes) -> int:
        """Returns how many bytes a payload has at most."""
        size = num_values(shapes)
        count = _count(self.share, size)
        return num_bytes(self.numbers, count) + count + size // 255 + 1


class RandomK(Codec):
    """Numbers at random positions are sent; the positions are drawn anew in each round, and a seed says which.

    Attributes:
        numbers: How each of them is written.
        share: Of the numbers that are sent.
        error_feedback: The others are added to the next update. Without it those that are sent are made larger, so that
            the update is right on average (Konecny et al. 2016).
    """

    number: ClassVar[int] = 3
    kind: Literal["random_k"] = "random_k"
    share: float = Field(default=0.1, gt=0, le=1)
    error_feedback: bool = True

    @property
    def name(self) -> str:
        """Returns the codec and its share."""
        return f"random {100 * self.share:g} %"

    def write(self, values_P: Tensor, memory: Memory, draws: torch.Generator, shapes: Shapes) -> Written:
        """Returns values as bytes."""
        seed = _drawn_seed(draws)
        values_K = values_P[self._positions(seed, len(values_P))]
        if not bool(values_P.isfinite().all()):  # also where it was not drawn: the server must see that it is there
            values_K = torch.full_like(values_K, torch.nan)
        return seed + write_numbers(values_K, self.numbers, draws), {}

    def decode(self, payload: bytes, shapes: Shapes) -> Tensor:
        """Returns the update of some bytes."""
        seed, numbers = head_and_rest(payload, _SEED_BYTES)
        size = num_values(shapes)
        count = _count(self.share, size)
        values_P = torch.zeros(size)
        values_P[self._positions(seed, size)] = read_numbers(numbers, self.numbers, count)
        return values_P if self.error_feedback else values_P * (size / count)

    def largest(self, shapes: Shapes) -> int:
        """Returns how many bytes a payload has at most."""
        return _SEED_BYTES + num_bytes(self.numbers, _count(self.share, num_values(shapes)))

    def _positions(self, seed: bytes, size: int) -> Tensor:
        return torch.randperm(size, generator=_seeded(seed))[: _count(self.share, size)]


class RandomProjection(Codec):
    """Random sums of the update are sent: each number is added, with a random sign, to one of k sums (count sketch).

    Attributes:
        numbers: How each sum is written.
        share: How many sums there are, over the number of parameters.
        error_feedback: What the sums do not tell is added to the next update. Without it the update is right on
            average, and far noisier.

    References: Charikar et al. (2002); for updates Rothchild et al. (2020).
    """

    number: ClassVar[int] = 4
    kind: Literal["random_projection"] = "random_projection"
    share: float = Field(default=0.1, gt=0, le=1)
    error_feedback: bool = True

    @property
    def name(self) -> str:
        """Returns the codec and its share."""
        return f"projection {100 * self.share:g} %"

    def write(self, values_P: Tensor, memory: Memory, draws: torch.Generator, shapes: Shapes) -> Written:
        """Returns values as bytes."""
        seed = _drawn_seed(draws)
        sums_P, signs_P = self._sketch(seed, len(values_P))
        sums_K = torch.zeros(_count(self.share, len(values_P))).index_add_(0, sums_P, signs_P * values_P)
        return seed + write_numbers(sums_K, self.numbers, draws), {}

    def decode(self, payload: bytes, shapes: Shapes) -> Tensor:
        """Returns the update of some bytes."""
        seed, numbers = head_and_rest(payload, _SEED_BYTES)
        size = num_values(shapes)
        count = _count(self.share, size)
        sums_P, signs_P = self._sketch(seed, size)
        values_P = signs_P * read_numbers(numbers, self.numbers, count)[sums_P]
        # A sum holds size / count numbers besides the noise of each other: shortened like this the error is least.
        return values_P * (count / (count + size)) if self.error_feedback else values_P

    def largest(self, shapes: Shapes) -> int:
        """Returns how many bytes a payload has at most."""
        return _SEED_BYTES + num_bytes(self.numbers, _count(self.share, num_values(shapes)))

    def _sketch(self, seed: bytes, size: int) -> tuple[Tensor, Tensor]:
        """Returns to which sum each number goes, and with which sign."""
        draws = _seeded(seed)
        sums_P = torch.randint(_count(self.share, size), (size,), generator=draws)
        return sums_P, torch.randint(2, (size,), generator=draws, dtype=torch.float32) * 2 - 1


class PowerSgd(Codec):
    """Each matrix of the update is sent as the product of two thin ones (PowerSGD, Vogels et al. 2019).

    Attributes:
        numbers: How the thin matrices' numbers are written.
        rank: Columns of the thin matrices. Vectors, and matrices that would not get smaller, are sent in float32.
        error_feedback: What the products leave out is added to the next update.
    """

    number: ClassVar[int] = 5
    kind: Literal["power_sgd"] = "power_sgd"
    rank: int = Field(default=2, ge=1, le=1024)
    error_feedback: bool = True

    @property
    def name(self) -> str:
        """Returns the codec and its rank."""
        return f"PowerSGD {self.rank}"

    def write(self, values_P: Tensor, memory: Memory, draws: torch.Generator, shapes: Shapes) -> Written:
        """Returns values as bytes, and the thin matrices from which the next round starts."""
        starts, plain, thin, kept = self._starts(memory, draws, shapes), [], [], []
        for part, size, start_Ck in zip(_parts(values_P, shapes), matrices(shapes, self.rank), starts, strict=True):
            if size is None or start_Ck is None:
                plain.append(part)
                continue
            left_Rk, right_Ck = factors(part.reshape(size), start_Ck)
            thin += [left_Rk.flatten(), right_Ck.flatten()]
            kept.append(right_Ck.flatten())
        payload = write_numbers(_joined(plain), "float32", draws) + write_numbers(_joined(thin), self.numbers, draws)
        return payload, {_START: _joined(kept).nan_to_num(0.0, 0.0, 0.0)}

    def decode(self, payload: bytes, shapes: Shapes) -> Tensor:
        """Returns the update of some bytes."""
        sizes = matrices(shapes, self.rank)
        num_plain, num_thin = self._counts(shapes)
        first, second = head_and_rest(payload, num_bytes("float32", num_plain))
        plain_K, thin_K = read_numbers(first, "float32", num_plain), read_numbers(second, self.numbers, num_thin)
        parts = []
        for shape, size in zip(shapes, sizes, strict=True):
            if size is None:
                count = torch.Size(shape).numel()
                part, plain_K = plain_K[:count], plain_K[count:]
                parts.append(part)
                continue
            left, right = size[0] * self.rank, size[1] * self.rank
            left_Rk, right_Ck = thin_K[:left].reshape(-1, self.rank), thin_K[left : left + right].reshape(-1, self.rank)
            parts.append((left_Rk @ right_Ck.T).flatten())
            thin_K = thin_K[left + right :]
        return _joined(parts)

    def largest(self, shapes: Shapes) -> int:
        """Returns how many bytes a payload has at most."""
        num_plain, num_thin = self._counts(shapes)
        return num_bytes("float32", num_plain) + num_bytes(self.numbers, num_thin)

    def _counts(self, shapes: Shapes) -> tuple[int, int]:
        """Returns how many numbers are sent as they are, and how many the thin matrices have."""
        sizes = matrices(shapes, self.rank)
        plain = sum(torch.Size(shape).numel() for shape, size in zip(shapes, sizes, strict=True) if size is None)
        return plain, self.rank * sum(rows + columns for rows, columns in filter(None, sizes))

    def _starts(self, memory: Memory, draws: torch.Generator, shapes: Shapes) -> list[Tensor | None]:
        """Returns where each matrix's iteration starts: at the last round's thin matrix, at first at noise."""
        sizes = matrices(shapes, self.rank)
        columns = [0 if size is None else size[1] * self.rank for size in sizes]
        start_K = memory[_START].cpu() if _START in memory else torch.zeros(sum(columns))
        found: list[Tensor | None] = []
        for size, part in zip(sizes, start_K.split(columns), strict=True):
            if size is None:
                found.append(None)
                continue
            # A start without length would find nothing, also where all that was sent before was zero.
            start_Ck = part if bool(part.any()) else torch.randn(len(part), generator=draws)
            found.append(start_Ck.reshape(-1, self.rank))
        return found


CodecSpec = Annotated[Dense | TopK | RandomK | RandomProjection | PowerSgd, Field(discriminator="kind")]


def _count(share: float, size: int) -> int:
    """Returns how many of some numbers a share is: at least one, where there is one."""
    return min(size, max(1, round(share * size)))


def _drawn_seed(draws: torch.Generator) -> bytes:
    return int(torch.randint(2**62, (), generator=draws)).to_bytes(_SEED_BYTES, "little")


def _seeded(seed: bytes) -> torch.Generator:
    """Returns a generator from a frame's seed, which may be any eight bytes."""
    return torch.Generator().manual_seed(int(np.frombuffer(seed, "<u8")[0]) % 2**63)


def _parts(values_P: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    return values_P.split([torch.Size(shape).numel() for shape in shapes])


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0)
