"""The train-time threats that a study may name."""

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from trilemma.attacks.budget import Budget, Norm, check_radius
from trilemma.attacks.poisoning.adversarial_samples import adversarial_samples
from trilemma.attacks.poisoning.label_flip import FlipMode, label_flip
from trilemma.attacks.poisoning.selection import check_choice, choose_clients
from trilemma.data.records import Records
from trilemma.models.classifier import Classifier
from trilemma.spec import Radius, Spec


class NoThreat(Spec):
    """Every client is honest."""

    kind: Literal["none"] = "none"

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        return "none"

    def malicious(self, num_clients: int) -> tuple[int, ...]:
        """Returns no client."""
        return ()

    def poison(
        self,
        records: Records,
        classifier: Classifier,
        num_classes: int,
        generator: torch.Generator,
        drawn: np.ndarray | None = None,
    ) -> Records:
        """Returns the records themselves."""
        return records


class LabelFlip(Spec):
    """Malicious clients change labels.

    Attributes:
        num_malicious: That many clients, the last ones; give this or `clients`.
        clients: The malicious clients' indices, counted from 0.
        mode: "random": any other class. "next": the following class.
        share: Fraction of a malicious client's records that are changed.
    """

    kind: Literal["label_flip"] = "label_flip"
    num_malicious: int | None = Field(default=None, ge=1)
    clients: tuple[int, ...] | None = None
    mode: FlipMode = "random"
    share: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _one_choice(self) -> "LabelFlip":
        check_choice(self.num_malicious, self.clients)
        return self

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        mode = " to next" if self.mode == "next" else ""
        return f"label flip{mode} {100 * self.share:g} % by {_who(self.num_malicious, self.clients)}"

    def malicious(self, num_clients: int) -> tuple[int, ...]:
        """Returns the malicious clients' indices, ascending.

        Raises:
            ValueError: If there are more of them than clients.
        """
        return choose_clients(self.num_malicious, self.clients, num_clients)

    def poison(
        self,
        records: Records,
        classifier: Classifier,
        num_classes: int,
        generator: torch.Generator,
        drawn: np.ndarray | None = None,
    ) -> Records:
        """Returns a malicious client's records as it trains on them; the classifier plays no part."""
        return label_flip(records, num_classes, generator, mode=self.mode, share=self.share)


class AdversarialSamples(Spec):
    """Malicious clients train on adversarial images with the model's labels (Usynin et al., 2022).

    Attributes:
        num_malicious: That many clients, the last ones; give this or `clients`.
        clients: The malicious clients' indices, counted from 0.
        share: Fraction of a malicious client's records that are replaced.
        norm: "linf" or "l2".
        radius: In pixel units; may be written as "8/255".
        steps: PGD steps per image.
    """

    kind: Literal["adversarial_samples"] = "adversarial_samples"
    num_malicious: int | None = Field(default=None, ge=1)
    clients: tuple[int, ...] | None = None
    share: float = Field(default=0.5, gt=0, le=1)
    norm: Norm = "linf"
    radius: Radius = 8 / 255
    steps: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _possible(self) -> "AdversarialSamples":
        check_choice(self.num_malicious, self.clients)
        check_radius(self.norm, self.radius)
        return self

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        ball = Budget(self.norm, self.radius).label
        return f"adversarial samples {ball} {100 * self.share:g} % by {_who(self.num_malicious, self.clients)}"

    def malicious(self, num_clients: int) -> tuple[int, ...]:
        """Returns the malicious clients' indices, ascending.

        Raises:
            ValueError: If there are more of them than clients.
        """
        return choose_clients(self.num_malicious, self.clients, num_clients)

    def poison(
        self,
        records: Records,
        classifier: Classifier,
        num_classes: int,
        generator: torch.Generator,
        drawn: np.ndarray | None = None,
    ) -> Records:
        """Returns a malicious client's records as it trains on them in a round that starts from `classifier`.

        Only the positions in `drawn`, which the round looks at, need to be what the threat makes of them; None: all.
        """
        budget = Budget(self.norm, self.radius)
        return adversarial_samples(
            records, classifier, budget, generator, share=self.share, steps=self.steps, drawn=drawn
        )


ThreatSpec = Annotated[NoThreat | LabelFlip | AdversarialSamples, Field(discriminator="kind")]


def _who(num_malicious: int | None, clients: tuple[int, ...] | None) -> str:
    if clients is not None:
        return f"client{'s' if len(clients) > 1 else ''} {', '.join(map(str, clients))}"
    return f"{num_malicious} client{'s' if num_malicious != 1 else ''}"
