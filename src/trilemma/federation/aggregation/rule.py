"""What every rule of aggregation is: a function of a round's updates, closed over its numbers."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from trilemma.federation.aggregation.updates import Updates

#: What a rule remembers from round to round, by name.
Memory = Mapping[str, Tensor]


class Received(NamedTuple):
    """What the server has of a round.

    Attributes:
        updates: One row of changes of the trainable parameters for each client, finite; nothing else that a client says
            of itself.
        weights_N: The server's own, positive, and sum to 1.
        senders: Positions in the federation of the clients that the rows are of.
        draws: Source of a rule's randomness.
        root_P: The server's own update, for a rule that trusts its own images; None for the others.
    """

    updates: Updates
    weights_N: Tensor
    senders: tuple[int, ...]
    draws: torch.Generator
    root_P: Tensor | None = None


class Aggregation(NamedTuple):
    """A rule closed over its numbers.

    Attributes:
        apply: (received, memory) -> (update_P, memory). The memory is empty before the first round.
        sensitivity: (clip, n) -> largest move of the result when one row of norm <= clip is replaced, or None
            where no bound is known and central noise can promise nothing.
    """

    apply: Callable[[Received, Memory], tuple[Tensor, Memory]]
    sensitivity: Callable[[float, int], float | None]
