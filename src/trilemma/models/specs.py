"""The networks that a study may name."""

import copy
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator
from torch import nn

from trilemma.errors import UserError
from trilemma.models.classifier import Classifier
from trilemma.models.layers import ActivationKind, NormKind, Style
from trilemma.models.resnet9 import SMALLEST_IMAGE, ResNet9
from trilemma.models.resnet18 import ResNet18, StemKind
from trilemma.monai_bridge import monai_network
from trilemma.randomness import global_seed
from trilemma.spec import Spec

_NORM_LABELS = {"group": "GN", "weight": "WS", "batch": "BN", "none": "no norm"}


def _check_groups(norm: NormKind, groups: int | None, width: int) -> None:
    if groups is None:
        return
    if norm != "group":
        raise ValueError(f"groups = {groups} belongs to norm = 'group', but norm is '{norm}'; leave groups out")
    if width % groups:
        raise ValueError(f"groups = {groups} does not divide width = {width}; choose a divisor, or leave groups out")


class Resnet9(Spec):
    """ResNet-9, the network of Usynin et al. (2022).

    Attributes:
        width: Feature maps of the first convolution.
        norm: "group" or "weight" (both safe under differential privacy), "batch" or "none". "weight" standardises
            weights and no activation, and is folded into plain convolutions when the model ships.
        groups: Groups of the group normalisation; None: min(32, channels / 4).
        activation: "relu" or "mish".
        mean: Subtracted from pixels in [0, 1]; public.
        std: Divides the difference; public.
    """

    kind: Literal["resnet9"] = "resnet9"
    width: int = Field(default=64, ge=1, le=4096)
    norm: NormKind = "group"
    groups: int | None = Field(default=None, ge=1)
    activation: ActivationKind = "relu"
    mean: float = Field(default=0.5, ge=0, le=1)
    std: float = Field(default=0.25, ge=0.01, le=10)

    @model_validator(mode="after")
    def _groups_divide(self) -> "Resnet9":
        _check_groups(self.norm, self.groups, self.width)
        return self

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        return _label(f"ResNet-9 w{self.width}", self.norm, self.activation)

    def make(self, channels: int, image_size: int, num_classes: int, seed: int) -> Classifier:
        """Returns the initialised classifier; the same seed gives the same weights.

        Raises:
            UserError: If the images are smaller than three poolings need.
        """
        if image_size < SMALLEST_IMAGE:
            raise UserError(
                "model",
                f"resnet9 needs images of at least {SMALLEST_IMAGE} pixels, not {image_size}",
                "use larger images",
            )
        with global_seed(seed, "initialisation"):
            module = ResNet9(channels, num_classes, self.width, Style(self.norm, self.groups, self.activation))
        return Classifier(module, num_classes, self.mean, self.std)


class Resnet18(Spec):
    """ResNet-18 (He et al., 2016).

    Attributes:
        width: Feature maps of the stem; 64 as published.
        norm: "group" or "weight" (both safe under differential privacy), "batch" or "none". "weight" standardises
            weights and no activation, and is folded into plain convolutions when the model ships.
        groups: Groups of the group normalisation; None: min(32, channels / 4).
        activation: "relu" or "mish".
        stem: "small" for images of up to about 64 pixels, "large" for 224 pixels.
        mean: Subtracted from pixels in [0, 1]; public.
        std: Divides the difference; public.
    """

    kind: Literal["resnet18"] = "resnet18"
    width: int = Field(default=64, ge=1, le=4096)
    norm: NormKind = "group"
    groups: int | None = Field(default=None, ge=1)
    activation: ActivationKind = "relu"
    stem: StemKind = "small"
    mean: float = Field(default=0.5, ge=0, le=1)
    std: float = Field(default=0.25, ge=0.01, le=10)

    @model_validator(mode="after")
    def _groups_divide(self) -> "Resnet18":
        _check_groups(self.norm, self.groups, self.width)
        return self

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        return _label(f"ResNet-18 w{self.width}", self.norm, self.activation)

    def make(self, channels: int, image_size: int, num_classes: int, seed: int) -> Classifier:
        """Returns the initialised classifier for images of any size; the same seed gives the same weights."""
        style = Style(self.norm, self.groups, self.activation)
        with global_seed(seed, "initialisation"):
            module = ResNet18(channels, num_classes, self.width, style, self.stem)
        return Classifier(module, num_classes, self.mean, self.std)


class Monai(Spec):
    """A 2-D classification network of MONAI, by its name there.

    Attributes:
        network: Such as "DenseNet121", "EfficientNetBN", "resnet18", "SEResNet50" or "ViT".
        arguments: Its keyword arguments, except channels, classes and image size, which the data decide.
        mean: Subtracted from pixels in [0, 1]; public.
        std: Divides the difference; public.
    """

    kind: Literal["monai"] = "monai"
    network: str
    arguments: dict[str, JsonValue] = {}
    mean: float = Field(default=0.5, ge=0, le=1)
    std: float = Field(default=0.25, ge=0.01, le=10)

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        said = ", ".join(f"{name}={value}" for name, value in sorted(self.arguments.items()))
        return f"{self.network} ({said})" if said else self.network

    def make(self, channels: int, image_size: int, num_classes: int, seed: int) -> Classifier:
        """Returns the initialised classifier; the same seed gives the same weights.

        Raises:
            UserError: If the name or an argument is wrong, or the network does not fit the images.
        """
        with global_seed(seed, "initialisation"):
            module: nn.Module = monai_network(
                self.network, channels, image_size, num_classes, copy.deepcopy(self.arguments)
            )
        return Classifier(module, num_classes, self.mean, self.std)


ModelSpec = Annotated[Resnet9 | Resnet18 | Monai, Field(discriminator="kind")]


def _label(name: str, norm: NormKind, activation: ActivationKind) -> str:
    mish = " Mish" if activation == "mish" else ""
    return f"{name} {_NORM_LABELS[norm]}{mish}"
