"""What the specs of all rules have in common, and what may happen to updates before a rule looks at them."""

from abc import ABC, abstractmethod
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from trilemma.federation.aggregation.mixing import bucketing, nearest_neighbour_mixing
from trilemma.federation.aggregation.rule import Aggregation, Memory, Received
from trilemma.federation.aggregation.updates import Updates
from trilemma.spec import Spec


class NearestNeighbourMixing(Spec):
    """Each update becomes the mean of the n - f nearest to it (Allouah et al. 2023).

    Attributes:
        num_byzantine: f, the number of attackers that it is made for.
    """

    kind: Literal["nearest_neighbours"] = "nearest_neighbours"
    num_byzantine: int = Field(ge=1)

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return "nearest neighbours"

    def num_rows(self, num_updates: int) -> int:
        """Returns how many rows are left of some updates."""
        return num_updates

    def check(self, num_updates: int) -> None:
        """Raises ValueError where there are too many attackers for it."""
        _need(self.kind, num_updates, self.num_byzantine, 2 * self.num_byzantine + 1)

    def mix(self, updates: Updates, draws: torch.Generator) -> Updates:
        """Returns the mixtures."""
        return nearest_neighbour_mixing(updates, self.num_byzantine)


class Bucketing(Spec):
    """Updates are averaged in buckets, drawn at random in every round (Karimireddy et al. 2022).

    Attributes:
        size: Updates in a bucket; the rule sees the buckets' means, of which as many may be an attacker's.
    """

    kind: Literal["bucketing"] = "bucketing"
    size: int = Field(default=2, ge=2)

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return f"buckets of {self.size}"

    def num_rows(self, num_updates: int) -> int:
        """Returns how many rows are left of some updates."""
        return -(-num_updates // self.size)

    def check(self, num_updates: int) -> None:
        """Never raises."""

    def mix(self, updates: Updates, draws: torch.Generator) -> Updates:
        """Returns the mixtures."""
        return bucketing(updates, self.size, draws)


#: What happens to updates before a rule looks at them.
MixingSpec = Annotated[NearestNeighbourMixing | Bucketing, Field(discriminator="kind")]


class Rule(Spec, ABC):
    """What the rules have in common.

    Attributes:
        before: What happens to the updates before the rule looks at them; None: nothing.
    """

    before: MixingSpec | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """Returns the rule and its numbers, without what happens before."""

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return self.name if self.before is None else f"{self.name} after {self.before.label}"

    @property
    def least_rows(self) -> int:
        """Returns how many rows the rule needs for the attackers that it is made for."""
        return 1

    @property
    def attackers(self) -> int:
        """Returns how many attackers it is made for; 0 where it does not say."""
        return 0

    def check(self, num_updates: int) -> None:
        """Refuses a round of too few updates for the attackers that the rule is made for.

        Raises:
            ValueError: Naming both numbers.
        """
        if self.before is not None:
            self.before.check(num_updates)
        num_rows = num_updates if self.before is None else self.before.num_rows(num_updates)
        _need(getattr(self, "kind", "this rule"), num_rows, self.attackers, self.least_rows)

    def sensitivity(self, clip: float, n: int) -> float | None:
        """Returns the largest move of the result when one of n rows of norm <= clip is replaced, or None: unknown."""
        return None

    @abstractmethod
    def combine(self, received: Received, memory: Memory) -> tuple[Tensor, Memory]:
        """Returns the update, and what the rule remembers."""

    def make(self) -> Aggregation:
        """Returns the rule with what happens before."""

        def apply(received: Received, memory: Memory) -> tuple[Tensor, Memory]:
            if self.before is None:
                return self.combine(received, memory)
            rows = self.before.mix(received.updates, received.draws)
            equal_K = torch.full((len(rows),), 1 / len(rows), device=received.weights_N.device)
            weights_K = received.weights_N if len(rows) == len(received.weights_N) else equal_K
            return self.combine(received._replace(updates=rows, weights_N=weights_K), memory)

        return Aggregation(apply, self.sensitivity)


def _need(kind: str, num_rows: int, attackers: int, least: int) -> None:
    if num_rows < least:
        against = f" against {attackers} attackers" if attackers else ""
        raise ValueError(f"aggregation '{kind}' needs {least} updates{against}, and a round has {num_rows}")
