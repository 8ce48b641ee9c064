"""What every compression is: a step from a model to a smaller one, and what it may look at."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trilemma.compression.folding import plain_copy
from trilemma.data.specs import DataSpec
from trilemma.models.classifier import Classifier
from trilemma.spec import Spec

#: Whose images a compression looks at: public ones (drawn phantoms unless others are named), phantoms, images made from
#: the model alone, or the hospitals' own.
Source = Literal["public", "phantom", "synthetic", "train", "val"]

#: C, H and W of an image.
ImageShape = tuple[int, int, int]

_PRIVATE = {"train": "the training images", "val": "the validation images"}


@dataclass(frozen=True)
class Looks:
    """Images that a compression asks for.

    Attributes:
        source: Whose.
        count: How many.
        data: Which public images, where it names some.
    """

    source: Source
    count: int
    data: DataSpec | None = None

    @property
    def private(self) -> str | None:
        """Returns which private images these are, as a phrase, or None."""
        return _PRIVATE.get(self.source)


@dataclass(frozen=True)
class Material:
    """What a compression works with.

    Attributes:
        teacher: The model as it was trained.
        images: Returns the images (N, C, H, W) that are asked for; fewer where there are fewer.
        image_shape: C, H and W.
        seed: Of everything random.
    """

    teacher: Classifier
    images: Callable[[Looks], Tensor]
    image_shape: ImageShape
    seed: int


class Step(Spec):
    """One compression; steps can be chained."""

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        raise NotImplementedError

    @property
    def looks(self) -> tuple[Looks, ...]:
        """Returns the images that it looks at."""
        return ()

    @property
    def last(self) -> bool:
        """Returns whether nothing can come after it, for what it leaves is no ordinary network of floats."""
        return False

    @property
    def private_data(self) -> str | None:
        """Returns which private data it reads, as a phrase, or None."""
        found = [look.private for look in self.looks if look.private]
        return f"{self.label_of_reader} reads {found[0]}" if found else None

    @property
    def label_of_reader(self) -> str:
        """Returns what reads images, for a reason why a guarantee is void."""
        return self.label

    def apply(self, classifier: Classifier, material: Material) -> Classifier:
        """Returns a smaller model; the given one is unchanged.

        Raises:
            ValueError: If it cannot be applied to this model, with a sentence that says why.
        """
        raise NotImplementedError

    def rehearsed(self) -> "Step":
        """Returns the same step with no more work than shows, on an untrained network, whether it can be done."""
        return self

    def skeleton(self, classifier: Classifier, stored: Mapping[str, Tensor], image_shape: ImageShape) -> Classifier:
        """Returns a network with the layers of `apply`'s, into which its stored state can be loaded."""
        return plain_copy(classifier)


def weight_names(classifier: Classifier) -> list[str]:
    """Returns the names of the weights of convolutions and linear layers, each once, in the network's order."""
    names = []
    for name, layer in classifier.named_modules():
        if type(layer) in (torch.nn.Conv2d, torch.nn.Linear):
            names.append(f"{name}.weight")
    return names
