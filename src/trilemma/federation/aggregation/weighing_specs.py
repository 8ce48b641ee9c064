"""The rules that shorten whole updates, trust some more than others, or leave them out."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from trilemma.data.specs import DataSpec
from trilemma.federation.aggregation.lengths import centred_clipping, fltrust, norm_clipping
from trilemma.federation.aggregation.outliers import divide_and_conquer, folded, foolsgold
from trilemma.federation.aggregation.rule import Memory, Received
from trilemma.federation.aggregation.rule_spec import Rule


class NormClipping(Rule):
    """The weighted mean of updates that are shortened to a length (Sun et al. 2019), with noise where that is wanted.

    Attributes:
        before: What happens to the updates before the rule looks at them; None: nothing.
        bound: Greatest length of an update.
        noise: Standard deviation of the noise on every parameter over the bound; nothing is promised for it. 0: none.
    """

    kind: Literal["norm_clipping"] = "norm_clipping"
    bound: float = Field(gt=0)
    noise: float = Field(default=0.0, ge=0)

    @property
    def name(self) -> str:
        """Returns the rule and its numbers."""
        return f"norm clipping {self.bound:g}{f', noise {self.noise:g}' if self.noise else ''}"

    def sensitivity(self, clip: float, n: int) -> float | None:
        """Returns 2 min(clip, bound) / n, for equal weights."""
        return 2 * min(clip, self.bound) / n if self.before is None else None

    def combine(self, received: Received, memory: Memory) -> tuple[Tensor, Memory]:
        """Returns the clipped mean."""
        update_P = norm_clipping(received.updates, received.weights_N, self.bound)
        if self.noise:
            noise_P = torch.randn(update_P.shape, generator=received.draws, device=received.draws.device)
            update_P = update_P + self.noise * self.bound * noise_P.to(update_P)
        return update_P, memory


class CentredClipping(Rule):
    """A point that each update pulls by no more than a radius, from where it was (Karimireddy et al. 2021).

    Attributes:
        before: What happens to the updates before the rule looks at them; None: nothing.
        radius: The paper's tau, in the units of an update.
        steps: Iterations in a round.
    """

    kind: Literal["centred_clipping"] = "centred_clipping"
    radius: float = Field(gt=0)
    steps: int = Field(default=1, ge=1)

    @property
    def name(self) -> str:
        """Returns the rule and its numbers."""
        return f"centred clipping {self.radius:g}{f' x{self.steps}' if self.steps > 1 else ''}"

    def combine(self, received: Received, memory: Memory) -> tuple[Tensor, Memory]:
        """Returns the point, which is remembered."""
        start_P = memory.get("point", torch.zeros_like(received.updates.matrix_NP[0]))
        point_P = centred_clipping(received.updates, received.weights_N, start_P, self.radius, self.steps)
        return point_P, {"point": point_P}


class DivideAndConquer(Rule):
    """The mean of the updates that never lie far out where updates differ most (Shejwalkar and Houmansadr 2021).

    Attributes:
        before: What happens to the updates before the rule looks at them; None: nothing.
        num_byzantine: f, the number of attackers that it is made for; needs n > 2 f. An attacker who is huge in a few
            of many parameters is seen only in rounds that draw these.
        rounds: How often coordinates are drawn; in each, `filter_factor` f updates are left out.
        num_coordinates: That are drawn, at most.
        filter_factor: The paper's c.
    """

    kind: Literal["divide_and_conquer"] = "divide_and_conquer"
    num_byzantine: int = Field(ge=1)
    rounds: int = Field(default=5, ge=1)
    num_coordinates: int = Field(default=10_000, ge=1)
    filter_factor: float = Field(default=1.0, gt=0)

    @property
    def name(self) -> str:
        """Returns the rule and its numbers."""
        return f"divide and conquer {self.num_byzantine}"

    @property
    def attackers(self) -> int:
        """Returns f."""
        return self.num_byzantine

    @property
    def least_rows(self) -> int:
        """Returns 2 f + 1."""
        return 2 * self.num_byzantine + 1

    def combine(self, received: Received, memory: Memory) -> tuple[Tensor, Memory]:
        """Returns the mean of those that are left."""
        update_P = divide_and_conquer(
            received.updates,
            self.num_byzantine,
            received.draws,
            num_coordinates=self.num_coordinates,
            rounds=self.rounds,
            filter_factor=self.filter_factor,
        )
        return update_P, memory


class FlTrust(Rule):
    """The mean of the updates, trusted as far as they point where the server's own does (Cao et al. 2021).

    The server trains on a few images of its own in every round. Nothing is assumed of the number of attackers; the
    statistics of batch norm, which it does not judge, are medians, and need more honest clients than others.

    Attributes:
        before: What happens to the updates before the rule looks at them; None: nothing.
        data: Public images with the study's classes, of which some are drawn from the training split; None: the study's
            own validation images, which are not public: refused under differential privacy.
        num_images: The server's.
    """

    kind: Literal["fltrust"] = "fltrust"
    data: DataSpec | None = None
    num_images: int = Field(default=100, ge=2)

    @property
    def name(self) -> str:
        """Returns the rule and its images."""
        return f"FLTrust {self.num_images} {'validation images' if self.data is None else f'of {self.data.label}'}"

    def combine(self, received: Received, memory: Memory) -> tuple[Tensor, Memory]:
        """Returns the trusted mean."""
        if received.root_P is None:
            raise ValueError("aggregation 'fltrust' needs the server's own update")
        return fltrust(received.updates, received.root_P), memory


class FoolsGold(Rule):
    """A mean in which clients count the less the more alike they have pushed so far (Fung et al. 2020).

    Against several attackers with one aim, among clients whose data differ. What a client has sent is remembered as
    65536 sums of its numbers with random signs.

    Attributes:
        before: Not for this rule: it must know whose update is whose.
    """

    kind: Literal["foolsgold"] = "foolsgold"
    before: None = None  # pyright: ignore[reportIncompatibleVariableOverride] - it can only be left out here

    @property
    def name(self) -> str:
        """Returns the rule."""
        return "FoolsGold"

    def combine(self, received: Received, memory: Memory) -> tuple[Tensor, Memory]:
        """Returns the mean, and remembers what each client has sent."""
        folded_KF = folded(received.updates)
        histories = dict(memory)
        for row, sender in enumerate(received.senders):
            histories[str(sender)] = histories.get(str(sender), torch.zeros_like(folded_KF[0])) + folded_KF[row]
        histories_KF = torch.stack([histories[str(sender)] for sender in received.senders])
        return foolsgold(received.updates, histories_KF), histories
