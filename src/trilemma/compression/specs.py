"""What a study may say about compression."""

import copy
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from trilemma.compression.fake_quantisation import quantise, quantised_skeleton
from trilemma.compression.folding import fold_weight_standardisation
from trilemma.compression.pruning import prune
from trilemma.models.classifier import Classifier
from trilemma.spec import Spec

_PRIVATE_SPLITS = {"train": "the training images", "val": "the validation images"}


class NoCompression(Spec):
    """The float32 model as it was trained."""

    kind: Literal["none"] = "none"

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return "fp32"

    @property
    def needs_calibration(self) -> bool:
        """Returns whether `apply` needs images."""
        return False

    @property
    def private_data(self) -> str | None:
        """Returns which private data it reads, as a phrase, or None."""
        return None

    def apply(self, classifier: Classifier, calibration_x: Tensor | None = None) -> Classifier:
        """Returns the classifier itself."""
        return classifier

    def skeleton(self, classifier: Classifier) -> Classifier:
        """Returns a network with the layers of `apply`'s, into which its stored state can be loaded."""
        return copy.deepcopy(classifier)


class MagnitudePruning(Spec):
    """Sets the smallest weights of the whole network to zero (Han et al., 2015); no image is read.

    The weights are stored densely, so the file keeps its size: what it buys is sparsity, not bytes.

    Attributes:
        sparsity: Share of the convolution and linear weights to set to zero, between 0 and 1.
    """

    kind: Literal["prune"] = "prune"
    sparsity: float = Field(default=0.5, gt=0, lt=1)

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return f"pruned {100 * self.sparsity:.4g} %"

    @property
    def needs_calibration(self) -> bool:
        """Returns whether `apply` needs images."""
        return False

    @property
    def private_data(self) -> str | None:
        """Returns which private data it reads, as a phrase, or None."""
        return None

    def apply(self, classifier: Classifier, calibration_x: Tensor | None = None) -> Classifier:
        """Returns a pruned copy."""
        return prune(classifier, self.sparsity)

    def skeleton(self, classifier: Classifier) -> Classifier:
        """Returns a network with the layers of `apply`'s, into which its stored state can be loaded."""
        skeleton = copy.deepcopy(classifier)
        fold_weight_standardisation(skeleton)
        return skeleton


class Int8(Spec):
    """Post-training quantisation of weights and activations to 8 bits (Jacob et al., 2018).

    Attributes:
        calibration: Whose images set the activation ranges: "public" (phantoms), "train" or "val". The last two are
            private: the ranges are raw extrema of private activations, so a privacy guarantee is void.
        num_calibration: Number of calibration images, from 1 to 100000.
    """

    kind: Literal["int8"] = "int8"
    calibration: Literal["public", "train", "val"] = "public"
    num_calibration: int = Field(default=256, ge=1, le=100_000)

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return "int8" if self.calibration == "public" else f"int8 ({self.calibration} calibration)"

    @property
    def needs_calibration(self) -> bool:
        """Returns whether `apply` needs images."""
        return True

    @property
    def private_data(self) -> str | None:
        """Returns which private data it reads, as a phrase, or None."""
        split = _PRIVATE_SPLITS.get(self.calibration)
        return None if split is None else f"int8 calibration reads {split}"

    def apply(self, classifier: Classifier, calibration_x: Tensor | None = None) -> Classifier:
        """Returns the int8 twin.

        Raises:
            ValueError: Without calibration images.
        """
        if calibration_x is None:
            raise ValueError("int8 needs at least one image to calibrate on.")
        return quantise(classifier, calibration_x[: self.num_calibration])

    def skeleton(self, classifier: Classifier) -> Classifier:
        """Returns a network with the layers of `apply`'s, into which its stored state can be loaded."""
        return quantised_skeleton(classifier)


CompressionSpec = Annotated[NoCompression | MagnitudePruning | Int8, Field(discriminator="kind")]
