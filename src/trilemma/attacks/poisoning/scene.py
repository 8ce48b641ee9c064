"""What malicious clients have in a round when they choose what to send."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

#: What the malicious clients remember from round to round, by name.
Memory = Mapping[str, Tensor]

#: What they send, one for each of them; of any shape.
Sent = tuple[Tensor, ...]


class Scene(NamedTuple):
    """A round as malicious clients see it, who may all act as one.

    Attributes:
        own_MP: What their own training made, poisoned where their records are; one row for each that takes part.
        honest_NP: What the honest clients of the round send, as far as the server will let it in; no row for a threat
            that does not see others.
        num_honest: How many honest clients there are in the round; where that is secret, how many are expected.
        share: By how much the model moves along what they all send: their share of the mean, times the server's
            learning rate.
        senders: Their positions in the federation.
        aggregate: What the server makes of one row for each honest and then each malicious client: updates_KP ->
            update_P, as it would in this round, but for its random draws and its noise.
        draws: Source of their randomness.
        memory: What they remember; empty at first.
    """

    own_MP: Tensor
    honest_NP: Tensor
    num_honest: int
    share: float
    senders: tuple[int, ...]
    aggregate: Callable[[Tensor], Tensor]
    draws: torch.Generator
    memory: Memory
