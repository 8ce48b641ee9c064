"""What a study may say about fewer bits."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from trilemma.compression.calibration import RangeRule
from trilemma.compression.fake_quantisation import quantise, quantised_skeleton
from trilemma.compression.folding import fold_batch_norms, plain_copy
from trilemma.compression.mixed_precision import bits_by_sensitivity
from trilemma.compression.step import ImageShape, Looks, Material, Source, Step, weight_names
from trilemma.compression.stored_weights import Bits, empty_places, store_weights
from trilemma.data.specs import DataSpec
from trilemma.models.classifier import Classifier
from trilemma.randomness import generator


class _Calibrated(Step):
    """A step that looks at images.

    Attributes:
        calibration: Whose images: "public" (those that `data` names, or phantoms), "phantom", "synthetic" (made from
            the model alone), "train" or "val". The last two are private: a privacy guarantee is void.
        num_calibration: Number of images, from 1 to 100000.
        data: Public images for "public"; None: phantoms.
    """

    calibration: Source = "public"
    num_calibration: int = Field(default=256, ge=1, le=100_000)
    data: DataSpec | None = None

    @model_validator(mode="after")
    def _data_is_public(self) -> "_Calibrated":
        if self.data is not None and self.calibration != "public":
            raise ValueError(f"data names public images, and calibration is '{self.calibration}'; use 'public'")
        return self

    @property
    def looks(self) -> tuple[Looks, ...]:
        """Returns the calibration images."""
        return (Looks(self.calibration, self.num_calibration, self.data),)

    @property
    def last(self) -> bool:
        """Returns True."""
        return True

    def _told(self) -> str:
        """Returns which images these are, for the label; nothing for phantoms."""
        if self.data is not None:
            return f"{self.data.label} calibration"
        return "" if self.calibration in ("public", "phantom") else f"{self.calibration} calibration"


class Int8(_Calibrated):
    """Quantisation of weights and activations to 8 bits (Jacob et al., 2018).

    Attributes:
        calibration: Whose images set the activation ranges: "public" (those that `data` names, or phantoms), "phantom",
            "synthetic" (made from the model alone), "train" or "val". The last two are private: the ranges are raw
            extrema of private activations, so a privacy guarantee is void.
        num_calibration: Number of calibration images, from 1 to 100000.
        data: Public images for "public"; None: phantoms.
        ranges: How activations set a range: "min_max" (the same as None), "percentile" or "mse" (the least squared
            error of the levels).
        percentile: For "percentile": what of the values lies within each end; None: 99.99.
    """

    kind: Literal["int8"] = "int8"
    ranges: RangeRule | None = None
    percentile: float | None = Field(default=None, gt=50, lt=100)

    @model_validator(mode="after")
    def _percentile_is_used(self) -> "Int8":
        if self.percentile is not None and self.ranges != "percentile":
            raise ValueError("percentile belongs to ranges = 'percentile'; set it, or leave percentile out")
        return self

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        ranges = {"percentile": f"percentile {self._percentile:g}", "mse": "least error"}.get(self.ranges or "", "")
        told = ", ".join(text for text in (ranges, self._told()) if text)
        return f"int8 ({told})" if told else "int8"

    @property
    def label_of_reader(self) -> str:
        """Returns what reads the images."""
        return "int8 calibration"

    @property
    def _percentile(self) -> float:
        return 99.99 if self.percentile is None else self.percentile

    def apply(self, classifier: Classifier, material: Material) -> Classifier:
        """Returns the int8 twin."""
        images = material.images(self.looks[0])
        return quantise(classifier, images, self.ranges or "min_max", self._percentile)

    def skeleton(self, classifier: Classifier, stored: Mapping[str, Tensor], image_shape: ImageShape) -> Classifier:
        """Returns a network with the layers of the twin."""
        return quantised_skeleton(classifier, stored)


class _FewBits(Step):
    """A step after which weights are stored in few bits and everything is computed in float."""

    @property
    def last(self) -> bool:
        """Returns True."""
        return True

    def skeleton(self, classifier: Classifier, stored: Mapping[str, Tensor], image_shape: ImageShape) -> Classifier:
        """Returns a network with places for the stored levels and scales."""
        return _with_places(classifier, stored)


class Int4(_FewBits):
    """Weights in 4 bits with a float16 scale for every group of weights; activations stay float, and no image is read.

    Attributes:
        group_size: Weights in a row of one output channel that share a scale.
    """

    kind: Literal["int4"] = "int4"
    group_size: int = Field(default=32, ge=4, le=4096)

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return "int4 weights" if self.group_size == 32 else f"int4 weights in groups of {self.group_size}"

    def apply(self, classifier: Classifier, material: Material) -> Classifier:
        """Returns a network whose weights lie on their grids."""
        return _in_bits(classifier, material, _every(4), self.group_size)


class BFloat16(_FewBits):
    """Weights in bfloat16; activations stay float, and no image is read."""

    kind: Literal["bfloat16"] = "bfloat16"

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return "bfloat16 weights"

    def apply(self, classifier: Classifier, material: Material) -> Classifier:
        """Returns a network of rounded weights."""
        return _in_bits(classifier, material, _every(16), 1)


class MixedPrecision(_Calibrated):
    """Weights in 4, 8 or 16 bits, layer by layer: what harms the logits least within a budget of bytes.

    Attributes:
        calibration: On whose images the harm is measured; see int8.
        num_calibration: Number of images, from 1 to 100000.
        data: Public images for "public"; None: phantoms.
        budget: Bytes of the weights, as a share of what they take in float32; 4 bits everywhere take about a seventh.
        group_size: Weights that share a scale, for 4 bits.
    """

    kind: Literal["mixed"] = "mixed"
    budget: float = Field(default=0.2, gt=0, lt=1)
    group_size: int = Field(default=32, ge=4, le=4096)

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        groups = "" if self.group_size == 32 else f"groups of {self.group_size}"
        images = "" if self.num_calibration == 256 else f"{self.num_calibration} images"
        return ", ".join(filter(None, [f"mixed bits in {100 * self.budget:.4g} %", groups, images, self._told()]))

    @property
    def label_of_reader(self) -> str:
        """Returns what reads the images."""
        return "mixed precision"

    def apply(self, classifier: Classifier, material: Material) -> Classifier:
        """Returns a network whose weights lie on their grids.

        Raises:
            ValueError: If the budget is too small, or there is no image.
        """
        x_NCHW = material.images(self.looks[0])

        def chosen(folded: Classifier) -> dict[str, Bits]:
            names = weight_names(folded)
            in_full = 4 * sum(folded.get_parameter(name).numel() for name in names)
            return bits_by_sensitivity(folded, names, x_NCHW, int(self.budget * in_full), self.group_size)

        return _in_bits(classifier, material, chosen, self.group_size)

    def rehearsed(self) -> "MixedPrecision":
        """Returns one that measures the harm on a single image."""
        return self.model_copy(update={"num_calibration": 1})

    def skeleton(self, classifier: Classifier, stored: Mapping[str, Tensor], image_shape: ImageShape) -> Classifier:
        """Returns a network with places for the stored levels and scales."""
        return _with_places(classifier, stored)


def _in_bits(
    classifier: Classifier, material: Material, bits_of: Callable[[Classifier], dict[str, Bits]], group_size: int
) -> Classifier:
    """Returns the network with its norms folded and its weights stored in the bits that are chosen for it."""
    folded = plain_copy(classifier).eval()
    draws = generator(material.seed, "folding")
    fold_batch_norms(folded, torch.rand(2, *material.image_shape, generator=draws).to(classifier.device))
    return store_weights(folded, bits_of(folded), group_size)


def _with_places(classifier: Classifier, stored: Mapping[str, Tensor]) -> Classifier:
    """Returns the network with places for levels and scales, and for the biases that folding gave its layers."""
    twin = plain_copy(classifier).eval()
    for name, layer in twin.named_modules():
        bias_C = stored.get(f"{name}.bias")
        if isinstance(layer, nn.Conv2d) and layer.bias is None and bias_C is not None:
            layer.bias = nn.Parameter(torch.zeros_like(bias_C))
    twin.stored = empty_places(stored)
    return twin


def _every(bits: Bits) -> Callable[[Classifier], dict[str, Bits]]:
    return lambda folded: dict.fromkeys(weight_names(folded), bits)
