"""What the specs of all codecs have in common: an update becomes bytes and comes back as another update near it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from trilemma.federation.codecs.numbers import Numbers
from trilemma.spec import Spec

#: What a sender keeps between rounds: what it has not said yet, and where a low-rank codec starts from.
Memory = Mapping[str, Tensor]
#: A payload, and what its sender remembers.
Written = tuple[bytes, dict[str, Tensor]]
#: Shapes of the parameters that an update is of, in its order.
Shapes = Sequence[Sequence[int]]

_RESIDUE = "residue"


class Codec(Spec, ABC):
    """What the codecs have in common.

    Attributes:
        numbers: How each number is written that is sent: "float32", "float16", "int8", "int4" or "sign".
    """

    #: What names the codec in a frame, from 0 to 255.
    number: ClassVar[int]
    numbers: Numbers = "float32"

    @property
    @abstractmethod
    def name(self) -> str:
        """Returns the codec, without how its numbers are written."""

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return " ".join(word for word in (self.name, self.numbers) if word)

    @property
    def remembers(self) -> bool:
        """Returns whether a sender adds what it could not say to its next update (error feedback)."""
        return getattr(self, "error_feedback", False)

    @abstractmethod
    def write(self, values_P: Tensor, memory: Memory, draws: torch.Generator, shapes: Shapes) -> Written:
        """Returns values as bytes, and what to remember beside what was left unsaid."""

    @abstractmethod
    def decode(self, payload: bytes, shapes: Shapes) -> Tensor:
        """Returns the update of some bytes, float32 (P,) on a CPU.

        Raises:
            ValueError: If no update is written like that.
        """

    @abstractmethod
    def largest(self, shapes: Shapes) -> int:
        """Returns how many bytes a payload has at most."""

    def encode(self, update_P: Tensor, memory: Memory, draws: torch.Generator, shapes: Shapes) -> Written:
        """Returns an update as bytes and what its sender remembers.

        With error feedback what was left unsaid before is added first, and what is left unsaid now is remembered
        (Seide et al. 2014; Karimireddy et al. 2019, Algorithm 1).

        Args:
            update_P: float32.
            memory: Of the sender; nothing at first.
            draws: The sender's source of randomness, on a CPU.
            shapes: Of the parameters.
        """
        whole_P = update_P.detach().cpu()
        if self.remembers and _RESIDUE in memory:
            whole_P = whole_P + memory[_RESIDUE].cpu()
        payload, kept = self.write(whole_P, memory, draws, shapes)
        if self.remembers:
            # What is no number is said once, and refused; it must not be remembered.
            kept[_RESIDUE] = (whole_P - self.decode(payload, shapes)).nan_to_num(0.0, 0.0, 0.0)
        return payload, kept


def num_values(shapes: Shapes) -> int:
    """Returns P, how many numbers an update has."""
    return sum(torch.Size(shape).numel() for shape in shapes)


def head_and_rest(payload: bytes, length: int) -> tuple[bytes, bytes]:
    """Returns the first bytes of a payload, and what is left.

    Raises:
        ValueError: If it is shorter.
    """
    if len(payload) < length:
        raise ValueError(f"is {len(payload)} bytes long, and at least {length} are an update")
    return payload[:length], payload[length:]
