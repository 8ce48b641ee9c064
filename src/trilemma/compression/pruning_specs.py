"""What a study may say about pruning a trained model."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from trilemma.compression.channels import prune_channels, shrunken
from trilemma.compression.folding import plain_copy
from trilemma.compression.pruning import prune, prune_n_of_m
from trilemma.compression.step import ImageShape, Material, Step
from trilemma.models.classifier import Classifier


class MagnitudePruning(Step):
    """Sets the smallest weights of the whole network to zero (Han et al., 2015); no image is read.

    The file is stored sparsely and counted so; no processor computes faster for it.

    Attributes:
        sparsity: Share of the convolution and linear weights to set to zero, between 0 and 1.
    """

    kind: Literal["prune"] = "prune"
    sparsity: float = Field(default=0.5, gt=0, lt=1)

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return f"pruned {100 * self.sparsity:.4g} %"

    def apply(self, classifier: Classifier, material: Material) -> Classifier:
        """Returns a pruned copy."""
        return prune(classifier, self.sparsity)


class NOfM(Step):
    """Keeps the `n` largest of every `m` weights in a row (Zhou et al., 2021); no image is read.

    2 of 4 is what sparse tensor cores of GPUs compute twice as fast; a CPU does not.

    Attributes:
        n: Weights that stay.
        m: Of so many in a row.
    """

    kind: Literal["n_of_m"] = "n_of_m"
    n: int = Field(default=2, ge=1)
    m: int = Field(default=4, ge=2, le=256)

    @model_validator(mode="after")
    def _some_leave(self) -> "NOfM":
        if self.n >= self.m:
            raise ValueError(f"n = {self.n} of m = {self.m} weights stay: nothing would leave; give a smaller n")
        return self

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return f"pruned {self.n}:{self.m}"

    def apply(self, classifier: Classifier, material: Material) -> Classifier:
        """Returns a pruned copy."""
        return prune_n_of_m(classifier, self.n, self.m)


class ChannelPruning(Step):
    """Removes whole channels until a share of the multiply-adds is left: a smaller dense network; no image is read.

    Residual connections keep their channels in step, and group norm loses whole groups. What is left of the accuracy
    without training again is little: distil after it.

    Attributes:
        multiply_adds: Share of the multiply-adds that may be left, at most.
        multiple: Channels leave so many at a time that a multiple of it stays, wherever a layer has a multiple of it to
            begin with and more than one; elsewhere they leave one by one. A processor computes 8 or 16 at once, and a
            few that are left over cost it as much. 1: one by one everywhere.
    """

    kind: Literal["channels"] = "channels"
    multiply_adds: float = Field(default=0.5, gt=0, lt=1)
    multiple: int = Field(default=8, ge=1, le=1024)

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        together = {8: "", 1: ", one by one"}.get(self.multiple, f", {self.multiple} at a time")
        return f"channels for {100 * self.multiply_adds:.4g} % of multiply-adds{together}"

    def apply(self, classifier: Classifier, material: Material) -> Classifier:
        """Returns a smaller copy.

        Raises:
            ValueError: If the network cannot be traced, or not be made so small.
        """
        return prune_channels(plain_copy(classifier), self.multiply_adds, material.image_shape, self.multiple)

    def skeleton(self, classifier: Classifier, stored: Mapping[str, Tensor], image_shape: ImageShape) -> Classifier:
        """Returns a network with the sizes of the stored state."""
        return shrunken(plain_copy(classifier), {name: value.shape for name, value in stored.items()})
