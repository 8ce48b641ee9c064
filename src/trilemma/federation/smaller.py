"""What a study may say about training a model for the small form in which it will ship."""

from typing import Literal

from pydantic import Field, model_validator

from trilemma.models.specs import ModelSpec
from trilemma.spec import Spec


class GradualPruning(Spec):
    """The smallest weights become zero while the federation trains, more of them from round to round.

    The share follows a cubic (Zhu and Gupta 2017, equation 1): most leave early, when the others can still make up for
    it. Pruned weights stay zero. Which they are is read from the server's model, so it costs no privacy.

    Attributes:
        sparsity: Share of the convolution and linear weights that are zero in the end.
        first: Share of the rounds after which pruning begins.
        last: Share of the rounds after which all of `sparsity` is reached.
    """

    kind: Literal["gradual"] = "gradual"
    sparsity: float = Field(default=0.9, gt=0, lt=1)
    first: float = Field(default=0.2, ge=0, lt=1)
    last: float = Field(default=0.7, gt=0, le=1)

    @model_validator(mode="after")
    def _in_order(self) -> "GradualPruning":
        if self.first >= self.last:
            raise ValueError(f"pruning begins at {self.first:g} and ends at {self.last:g}: first must be below last")
        return self

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return f"pruned to {100 * self.sparsity:.4g} %"

    def share(self, rounds_done: int, rounds: int) -> float:
        """Returns the share of the weights that are zero after so many of all rounds."""
        time = (rounds_done / rounds - self.first) / (self.last - self.first)
        return self.sparsity * (1 - (1 - min(max(time, 0.0), 1.0)) ** 3)


class Int8Training(Spec):
    """Quantisation-aware training for int8 (Jacob et al., 2018, section 3): clients train the rounded network.

    Weights and activations are rounded as in the int8 file, and gradients pass straight through. The activation ranges
    come from phantoms and the round's model alone, so it costs no privacy.

    Attributes:
        first: Share of the rounds after which rounding begins; the network must have learnt something to be rounded.
        num_calibration: Phantoms that set the activation ranges, anew in every round.
    """

    kind: Literal["int8"] = "int8"
    first: float = Field(default=0.5, ge=0, lt=1)
    num_calibration: int = Field(default=64, ge=16, le=10_000)

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return "trained for int8"

    def acts(self, rounds_done: int, rounds: int) -> bool:
        """Returns whether the round after so many of all rounds trains the rounded network."""
        return rounds_done >= self.first * rounds


class Teacher(Spec):
    """A larger network that the hospitals train first, and whose answers the model then learns beside the labels.

    Both are trained on the hospitals' own images, and a guarantee counts the steps of both. The teacher is trained as
    the model is, with its local steps, defence, privacy, rule and codec, but without downlink, pruning, quantisation
    and early stopping, which are for what ships.

    Attributes:
        model: The teacher's network.
        rounds: Of its training, before the model's own.
        share: How much of what the model learns is the teacher's answer; the rest is the label.
    """

    model: ModelSpec
    rounds: int = Field(ge=1)
    share: float = Field(default=0.5, gt=0, le=1)

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        share = "" if self.share == 0.5 else f", share {self.share:g}"
        return f"taught by {self.model.label}, {self.rounds} rounds{share}"
