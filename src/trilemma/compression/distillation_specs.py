"""What a study may say about distillation."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from trilemma.compression.distillation import distil
from trilemma.compression.folding import plain_copy
from trilemma.compression.step import ImageShape, Looks, Material, Source, Step
from trilemma.data.specs import DataSpec
from trilemma.models.classifier import Classifier
from trilemma.models.specs import ModelSpec


class Distillation(Step):
    """A smaller network that learns to answer as the trained one does (Hinton, Vinyals and Dean 2015).

    Attributes:
        student: The smaller network, which starts from random weights; None: the model as the steps before left it.
        images: On whose images: "public" (those that `data` names, or phantoms), "phantom", "synthetic" (made from the
            model alone), "train" or "val". The last two are private: a privacy guarantee is void.
        num_images: Number of images.
        data: Public images for "public"; None: phantoms.
        epochs: Passes over the images.
        learning_rate: Of Adam, at the start; it falls to zero by a cosine.
        batch_size: Images in a step.
        temperature: Softens the teacher's answers.
    """

    kind: Literal["distil"] = "distil"
    student: ModelSpec | None = None
    images: Source = "public"
    num_images: int = Field(default=2000, ge=2, le=100_000)
    data: DataSpec | None = None
    epochs: int = Field(default=10, ge=1)
    learning_rate: float = Field(default=0.001, gt=0, le=1)
    batch_size: int = Field(default=64, ge=2)
    temperature: float = Field(default=2.0, gt=0, le=1000)

    @model_validator(mode="after")
    def _data_is_public(self) -> "Distillation":
        if self.data is not None and self.images != "public":
            raise ValueError(f"data names public images, and images is '{self.images}'; use 'public'")
        return self

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        whose = self.data.label if self.data else {"public": "phantoms", "phantom": "phantoms"}.get(self.images, "")
        into = f" into {self.student.label}" if self.student else ""
        told = f" ({', '.join(self._told())})" if self._told() else ""
        return f"distilled{into} on {whose or self.images + ' images'}{told}"

    def _told(self) -> list[str]:
        """Returns the numbers that are not the default, for the label."""
        words = {
            "num_images": "{} images",
            "epochs": "{} epochs",
            "learning_rate": "rate {:g}",
            "batch_size": "batches of {}",
            "temperature": "temperature {:g}",
        }
        usual = {name: type(self).model_fields[name].default for name in words}
        told = [words[name].format(getattr(self, name)) for name in words if getattr(self, name) != usual[name]]
        return ["1 epoch" if each == "1 epochs" else each for each in told]

    @property
    def looks(self) -> tuple[Looks, ...]:
        """Returns the images that both networks look at."""
        return (Looks(self.images, self.num_images, self.data),)

    @property
    def label_of_reader(self) -> str:
        """Returns what reads the images."""
        return "distillation"

    def apply(self, classifier: Classifier, material: Material) -> Classifier:
        """Returns the student.

        Raises:
            ValueError: If its weights became infinite, or there are too few images.
        """
        if self.student is None:
            student = plain_copy(classifier)
        else:
            student = self._made(self.student, material.image_shape, classifier, material.seed)
        taught = distil(
            student.to(material.teacher.device),
            material.teacher,
            material.images(self.looks[0]),
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            temperature=self.temperature,
            seed=material.seed,
        )
        return plain_copy(taught)  # a new student with standardised weights trains with them and is folded here

    def rehearsed(self) -> "Distillation":
        """Returns one that hardly learns."""
        return self.model_copy(update={"epochs": 1, "batch_size": 2, "learning_rate": 1e-6})

    def skeleton(self, classifier: Classifier, stored: Mapping[str, Tensor], image_shape: ImageShape) -> Classifier:
        """Returns a network of the student's layers."""
        if self.student is None:
            return plain_copy(classifier)
        return plain_copy(self._made(self.student, image_shape, classifier, 0))

    def _made(self, student: ModelSpec, image_shape: ImageShape, classifier: Classifier, seed: int) -> Classifier:
        return student.make(image_shape[0], image_shape[1], classifier.num_classes, seed)
