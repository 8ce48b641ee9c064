"""The rules of aggregation that a study may name."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from trilemma.federation.aggregation.coordinates import coordinate_median, robust_learning_rate, trimmed_mean
from trilemma.federation.aggregation.distances import bulyan, geometric_median, krum, multi_krum
from trilemma.federation.aggregation.rule import Memory, Received
from trilemma.federation.aggregation.rule_spec import Rule
from trilemma.federation.aggregation.weighing_specs import (
    CentredClipping,
    DivideAndConquer,
    FlTrust,
    FoolsGold,
    NormClipping,
)


class Mean(Rule):
    """The weighted mean of the updates (McMahan et al. 2017): one of them moves it without bound.

    Attributes:
        before: What happens to the updates before the rule looks at them; None: nothing.
    """

    kind: Literal["mean"] = "mean"

    @property
    def name(self) -> str:
        """Returns the rule."""
        return "mean"

    def sensitivity(self, clip: float, n: int) -> float | None:
        """Returns 2 clip / n, for equal weights."""
        return 2 * clip / n if self.before is None else None

    def combine(self, received: Received, memory: Memory) -> tuple[Tensor, Memory]:
        """Returns the weighted mean."""
        return received.updates.combined(received.weights_N), memory


class Median(Rule):
    """The median of every coordinate (Yin et al. 2018); fewer than half of the updates may be an attacker's.

    Attributes:
        before: What happens to the updates before the rule looks at them; None: nothing.
    """

    kind: Literal["median"] = "median"

    @property
    def name(self) -> str:
        """Returns the rule."""
        return "median"

    def combine(self, received: Received, memory: Memory) -> tuple[Tensor, Memory]:
        """Returns the median of every coordinate."""
        return coordinate_median(received.updates), memory


class TrimmedMean(Rule):
    """The mean of every coordinate without its f largest and f smallest values (Yin et al. 2018); needs n > 2 f.

    Attributes:
        before: What happens to the updates before the rule looks at them; None: nothing.
        num_byzantine: f, the number of attackers that it is made for.
    """

    kind: Literal["trimmed_mean"] = "trimmed_mean"
    num_byzantine: int = Field(ge=1)

    @property
    def name(self) -> str:
        """Returns the rule and its numbers."""
        return f"trimmed mean {self.num_byzantine}"

    @property
    def attackers(self) -> int:
        """Returns f."""
        return self.num_byzantine

    @property
    def least_rows(self) -> int:
        """Returns 2 f + 1."""
        return 2 * self.num_byzantine + 1

    def combine(self, received: Received, memory: Memory) -> tuple[Tensor, Memory]:
        """Returns the trimmed mean."""
        return trimmed_mean(received.updates, self.num_byzantine), memory


class GeometricMedian(Rule):
    """The point with the least weighted sum of distances to the updates (Pillutla et al. 2022); needs n > 2 f.

    Attributes:
        before: What happens to the updates before the rule looks at them; None: nothing.
    """

    kind: Literal["geometric_median"] = "geometric_median"

    @property
    def name(self) -> str:
        """Returns the rule."""
        return "geometric median"

    def combine(self, received: Received, memory: Memory) -> tuple[Tensor, Memory]:
        """Returns the geometric median."""
        return geometric_median(received.updates, received.weights_N), memory


class Krum(Rule):
    """The update that is nearest to its n - f - 2 nearest others (Blanchard et al. 2017); needs n > 2 f + 2.

    Attributes:
        before: What happens to the updates before the rule looks at them; None: nothing.
        num_byzantine: f, the number of attackers that it is made for.
    """

    kind: Literal["krum"] = "krum"
    num_byzantine: int = Field(ge=1)

    @property
    def name(self) -> str:
        """Returns the rule and its numbers."""
        return f"Krum {self.num_byzantine}"

    @property
    def attackers(self) -> int:
        """Returns f."""
        return self.num_byzantine

    @property
    def least_rows(self) -> int:
        """Returns 2 f + 3."""
        return 2 * self.num_byzantine + 3

    def combine(self, received: Received, memory: Memory) -> tuple[Tensor, Memory]:
        """Returns Krum's choice."""
        return krum(received.updates, self.num_byzantine), memory


class MultiKrum(Rule):
    """The mean of the n - f updates with the lowest scores of Krum (Blanchard et al. 2017); needs n > 2 f + 2.

    Attributes:
        before: What happens to the updates before the rule looks at them; None: nothing.
        num_byzantine: f, the number of attackers that it is made for.
        num_kept: Updates in the mean; None: n - f.
    """

    kind: Literal["multi_krum"] = "multi_krum"
    num_byzantine: int = Field(ge=1)
    num_kept: int | None = Field(default=None, ge=1)

    @property
    def name(self) -> str:
        """Returns the rule and its numbers."""
        kept = "" if self.num_kept is None else f" keeping {self.num_kept}"
        return f"multi-Krum {self.num_byzantine}{kept}"

    @property
    def attackers(self) -> int:
        """Returns f."""
        return self.num_byzantine

    @property
    def least_rows(self) -> int:
        """Returns 2 f + 3, or what is kept and f more: nobody chooses well among all."""
        return max(2 * self.num_byzantine + 3, (self.num_kept or 0) + self.num_byzantine)

    def combine(self, received: Received, memory: Memory) -> tuple[Tensor, Memory]:
        """Returns the mean of those that Krum prefers."""
        return multi_krum(received.updates, self.num_byzantine, self.num_kept), memory


class Bulyan(Rule):
    """A mean around the median of the updates that Krum prefers (El Mhamdi et al. 2018); needs n >= 4 f + 3.

    Attributes:
        before: What happens to the updates before the rule looks at them; None: nothing.
        num_byzantine: f, the number of attackers that it is made for.
    """

    kind: Literal["bulyan"] = "bulyan"
    num_byzantine: int = Field(ge=1)

    @property
    def name(self) -> str:
        """Returns the rule and its numbers."""
        return f"Bulyan {self.num_byzantine}"

    @property
    def attackers(self) -> int:
        """Returns f."""
        return self.num_byzantine

    @property
    def least_rows(self) -> int:
        """Returns 4 f + 3."""
        return 4 * self.num_byzantine + 3

    def combine(self, received: Received, memory: Memory) -> tuple[Tensor, Memory]:
        """Returns Bulyan's mean."""
        return bulyan(received.updates, self.num_byzantine), memory


class RobustLearningRate(Rule):
    """The weighted mean, turned round in coordinates on whose sign too few updates agree (Ozdayi et al. 2021).

    Against backdoors, which move coordinates that the honest do not care about.

    Attributes:
        before: What happens to the updates before the rule looks at them; None: nothing.
        threshold: Updates that must outweigh the others' signs, at least f + 1.
    """

    kind: Literal["robust_learning_rate"] = "robust_learning_rate"
    threshold: int = Field(ge=1)

    @property
    def name(self) -> str:
        """Returns the rule and its numbers."""
        return f"robust learning rate {self.threshold}"

    @property
    def least_rows(self) -> int:
        """Returns the threshold: with fewer rows every coordinate would be turned round."""
        return self.threshold

    def combine(self, received: Received, memory: Memory) -> tuple[Tensor, Memory]:
        """Returns the mean with its turned coordinates."""
        return robust_learning_rate(received.updates, received.weights_N, self.threshold), memory


AggregationSpec = Annotated[
    Mean
    | Median
    | TrimmedMean
    | GeometricMedian
    | Krum
    | MultiKrum
    | Bulyan
    | NormClipping
    | CentredClipping
    | DivideAndConquer
    | FlTrust
    | FoolsGold
    | RobustLearningRate,
    Field(discriminator="kind"),
]
