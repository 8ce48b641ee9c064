"""The train-time threats on a malicious client's records."""

from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from trilemma.attacks.budget import Budget, Norm, check_radius
from trilemma.attacks.poisoning.adversarial_samples import adversarial_samples
from trilemma.attacks.poisoning.backdoor import backdoor, clean_label_backdoor
from trilemma.attacks.poisoning.label_flip import FlipMode, label_flip
from trilemma.attacks.poisoning.threat import Boost, Threat, boost_label, refuse_small_boost
from trilemma.attacks.poisoning.triggers import Patch, TriggerSpec, part_of
from trilemma.data.records import Records
from trilemma.models.classifier import Classifier
from trilemma.spec import Radius


class LabelFlip(Threat):
    """Malicious clients change labels.

    Attributes:
        num_malicious: That many clients, the last ones; give this or `clients`.
        clients: The malicious clients' indices, counted from 0.
        when: The rounds in which they act; None: all.
        mode: "random": any other class. "next": the following class. "targeted": the class `target`.
        share: Fraction of a malicious client's records that are changed, of those that may be.
        source: Only records of this class may be; None: of any.
        target: The class of a targeted flip.
        boost: Factor of its update, or "replace" for one as large as makes the mean its own; None: 1.
    """

    kind: Literal["label_flip"] = "label_flip"
    mode: FlipMode = "random"
    share: float = Field(default=1.0, gt=0, le=1)
    source: int | None = Field(default=None, ge=0)
    target: int | None = Field(default=None, ge=0)
    boost: Boost | None = None

    @model_validator(mode="after")
    def _possible(self) -> "LabelFlip":
        if (self.mode == "targeted") != (self.target is not None):
            raise ValueError("target is the class of mode = 'targeted': give both or neither")
        if self.target is not None and self.source == self.target:
            raise ValueError(f"source and target are both {self.target}: no label would change")
        refuse_small_boost(self.boost)
        return self

    @property
    def name(self) -> str:
        """Returns the threat and its numbers."""
        to = {"random": "", "next": " to next", "targeted": f" to class {self.target}"}[self.mode]
        source = "" if self.source is None else f" of class {self.source}"
        return f"label flip{source}{to} {100 * self.share:g} %{boost_label(self.boost)}"

    def may_change(self, labels_N: np.ndarray) -> np.ndarray:
        """Returns which are of the source, where there is one, and not of the target."""
        of_source_N = np.full(len(labels_N), True) if self.source is None else labels_N == self.source
        return of_source_N if self.target is None else of_source_N & (labels_N != self.target)

    def poison(
        self,
        records: Records,
        classifier: Classifier,
        num_classes: int,
        generator: torch.Generator,
        drawn: np.ndarray | None = None,
        position: tuple[int, int] = (0, 1),
    ) -> Records:
        """Returns a malicious client's records as it trains on them; the classifier plays no part."""
        return label_flip(
            records,
            num_classes,
            generator,
            mode=self.mode,
            share=self.share,
            source=self.source,
            target=self.target,
        )


class AdversarialSamples(Threat):
    """Malicious clients train on adversarial images with the model's labels (Usynin et al., 2022).

    Attributes:
        num_malicious: That many clients, the last ones; give this or `clients`.
        clients: The malicious clients' indices, counted from 0.
        when: The rounds in which they act; None: all.
        share: Fraction of a malicious client's records that are replaced.
        norm: "linf" or "l2".
        radius: In pixel units; may be written as "8/255".
        steps: PGD steps per image.
        boost: Factor of its update, or "replace" for one as large as makes the mean its own; None: 1.
    """

    kind: Literal["adversarial_samples"] = "adversarial_samples"
    share: float = Field(default=0.5, gt=0, le=1)
    norm: Norm = "linf"
    radius: Radius = 8 / 255
    steps: int = Field(default=10, ge=1)
    boost: Boost | None = None

    @model_validator(mode="after")
    def _possible(self) -> "AdversarialSamples":
        check_radius(self.norm, self.radius)
        refuse_small_boost(self.boost)
        return self

    @property
    def name(self) -> str:
        """Returns the threat and its numbers."""
        ball = Budget(self.norm, self.radius).label
        return f"adversarial samples {ball} {100 * self.share:g} %{boost_label(self.boost)}"

    def poison(
        self,
        records: Records,
        classifier: Classifier,
        num_classes: int,
        generator: torch.Generator,
        drawn: np.ndarray | None = None,
        position: tuple[int, int] = (0, 1),
    ) -> Records:
        """Returns a malicious client's records as it trains on them in a round that starts from `classifier`."""
        budget = Budget(self.norm, self.radius)
        return adversarial_samples(
            records, classifier, budget, generator, share=self.share, steps=self.steps, drawn=drawn
        )


class Backdoor(Threat):
    """Malicious clients teach the model to give images with a trigger the class that they want.

    Attributes:
        num_malicious: That many clients, the last ones; give this or `clients`.
        clients: The malicious clients' indices, counted from 0.
        when: The rounds in which they act; None: all.
        trigger: What is laid over the images.
        target: The class that they shall be given.
        share: Fraction of a malicious client's records that get the trigger: of those of other classes, or with
            `clean_label` of the target's own.
        clean_label: The labels stay true; the images are made hard to tell first (Turner et al. 2019).
        distributed: Each malicious client lays a part of the trigger over its images, and together they make it whole
            (Xie et al. 2020).
        radius: With `clean_label`: of the PGD that makes images hard to tell, L-infinity.
        steps: Of that PGD.
        boost: Factor of its update, or "replace" for one as large as makes the mean its own; None: 1.
    """

    kind: Literal["backdoor"] = "backdoor"
    trigger: TriggerSpec = Patch()
    target: int = Field(default=0, ge=0)
    share: float = Field(default=0.5, gt=0, le=1)
    clean_label: bool = False
    distributed: bool = False
    radius: Radius = 8 / 255
    steps: int = Field(default=10, ge=1)
    boost: Boost | None = None

    @model_validator(mode="after")
    def _possible(self) -> "Backdoor":
        check_radius("linf", self.radius)
        refuse_small_boost(self.boost)
        return self

    @property
    def name(self) -> str:
        """Returns the threat and its numbers."""
        how = "distributed " * self.distributed + "clean-label " * self.clean_label
        to = f"to class {self.target} {100 * self.share:g} %"
        return f"{how}backdoor by {self.trigger.label} {to}{boost_label(self.boost)}"

    def check(self, num_classes: int, image_size: int) -> None:
        """Refuses a class that the data do not have, and a trigger for which their images have no room.

        Raises:
            ValueError: Naming the class or the size.
        """
        super().check(num_classes, image_size)
        num_pixels = int((self.trigger.mark(image_size).cover_HW > 0).sum())
        num_parts = self.num_malicious or len(self.clients or ())
        if self.distributed and num_parts > num_pixels:
            raise ValueError(f"a trigger of {num_pixels} pixels cannot be divided among {num_parts} clients")

    def may_change(self, labels_N: np.ndarray) -> np.ndarray:
        """Returns which are of other classes than the target, or with `clean_label` which are of it."""
        return (labels_N == self.target) == self.clean_label

    def poison(
        self,
        records: Records,
        classifier: Classifier,
        num_classes: int,
        generator: torch.Generator,
        drawn: np.ndarray | None = None,
        position: tuple[int, int] = (0, 1),
    ) -> Records:
        """Returns a malicious client's records as it trains on them in a round that starts from `classifier`."""
        mark = self.trigger.mark(records.images_NCHW.shape[-1])
        if self.distributed:
            mark = part_of(mark, *position)
        if not self.clean_label:
            return backdoor(records, mark, self.target, generator, share=self.share)
        return clean_label_backdoor(
            records,
            classifier,
            mark,
            self.target,
            generator,
            share=self.share,
            budget=Budget("linf", self.radius),
            steps=self.steps,
            drawn=drawn,
        )


class InflatedCount(Threat):
    """Malicious clients say that they hold more records than they do, where updates are weighted by records.

    Attributes:
        num_malicious: That many clients, the last ones; give this or `clients`.
        clients: The malicious clients' indices, counted from 0.
        when: Not for this threat: the counts are told once.
        factor: By which the count is too high.
        share: Fraction of their labels that are flipped at random, so that the weight does harm.
    """

    kind: Literal["inflated_count"] = "inflated_count"
    when: None = None  # pyright: ignore[reportIncompatibleVariableOverride] - it can only be left out here
    factor: float = Field(default=100.0, gt=1, le=1e12)
    share: float = Field(default=1.0, gt=0, le=1)

    @property
    def name(self) -> str:
        """Returns the threat and its numbers."""
        return f"counts {self.factor:g}x, label flip {100 * self.share:g} %"

    def claimed(self, num_records: int) -> int:
        """Returns the count times the factor."""
        return round(self.factor * num_records)

    def poison(
        self,
        records: Records,
        classifier: Classifier,
        num_classes: int,
        generator: torch.Generator,
        drawn: np.ndarray | None = None,
        position: tuple[int, int] = (0, 1),
    ) -> Records:
        """Returns a malicious client's records as it trains on them; the classifier plays no part."""
        return label_flip(records, num_classes, generator, share=self.share)
