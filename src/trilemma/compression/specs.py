"""What a study may say about compression."""

import copy
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor

from trilemma.compression.distillation_specs import Distillation
from trilemma.compression.pruning_specs import ChannelPruning, MagnitudePruning, NOfM
from trilemma.compression.quantisation_specs import BFloat16, Int4, Int8, MixedPrecision
from trilemma.compression.step import ImageShape, Looks, Material, Step
from trilemma.models.classifier import Classifier


class NoCompression(Step):
    """The float32 model as it was trained."""

    kind: Literal["none"] = "none"

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return "fp32"

    def apply(self, classifier: Classifier, material: Material) -> Classifier:
        """Returns the classifier itself."""
        return classifier

    def skeleton(self, classifier: Classifier, stored: Mapping[str, Tensor], image_shape: ImageShape) -> Classifier:
        """Returns a copy."""
        return copy.deepcopy(classifier)


StepSpec = Annotated[
    MagnitudePruning | NOfM | ChannelPruning | Distillation | Int8 | Int4 | BFloat16 | MixedPrecision,
    Field(discriminator="kind"),
]


class Chain(Step):
    """Several steps, one after the other: prune, then distil, then quantise.

    What one of them does to a guarantee, all that follow inherit.

    Attributes:
        steps: In this order; one that stores weights in fewer bits can only be the last.
    """

    kind: Literal["chain"] = "chain"
    steps: tuple[StepSpec, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _floats_to_the_end(self) -> "Chain":
        for step in self.steps[:-1]:
            if step.last:
                raise ValueError(f"'{step.kind}' leaves no network of floats to the steps after it; put it last")
        students = [number for number, step in enumerate(self.steps) if getattr(step, "student", None) is not None]
        if students and students[-1]:
            raise ValueError(
                "a step before a student's distillation does nothing, for the student starts afresh; put it first"
            )
        return self

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return " + ".join(step.label for step in self.steps)

    @property
    def looks(self) -> tuple[Looks, ...]:
        """Returns the images that its steps look at."""
        return tuple(look for step in self.steps for look in step.looks)

    @property
    def last(self) -> bool:
        """Returns whether its last step is."""
        return self.steps[-1].last

    @property
    def private_data(self) -> str | None:
        """Returns which private data its steps read, as a phrase, or None."""
        return "; ".join(step.private_data for step in self.steps if step.private_data) or None

    def apply(self, classifier: Classifier, material: Material) -> Classifier:
        """Returns what the last step makes of what the steps before it made.

        Raises:
            ValueError: If one of them cannot be applied.
        """
        for step in self.steps:
            classifier = step.apply(classifier, material)
        return classifier

    def rehearsed(self) -> "Chain":
        """Returns the chain of what its steps would rehearse.

        Which channels leave depends on the weights, and with them the fewest bytes that the others can take: a budget
        after them is as large as can be.
        """
        steps = [step.rehearsed() for step in self.steps]
        if any(isinstance(step, ChannelPruning) for step in steps) and isinstance(steps[-1], MixedPrecision):
            steps[-1] = steps[-1].model_copy(update={"budget": 0.999})
        return self.model_copy(update={"steps": tuple(steps)})

    def skeleton(self, classifier: Classifier, stored: Mapping[str, Tensor], image_shape: ImageShape) -> Classifier:
        """Returns a network with the layers that the last step leaves."""
        for step in self.steps:
            classifier = step.skeleton(classifier, stored, image_shape)
        return classifier


CompressionSpec = Annotated[
    NoCompression
    | MagnitudePruning
    | NOfM
    | ChannelPruning
    | Distillation
    | Int8
    | Int4
    | BFloat16
    | MixedPrecision
    | Chain,
    Field(discriminator="kind"),
]
