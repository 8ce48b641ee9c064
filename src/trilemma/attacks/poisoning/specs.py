"""The train-time threats that a study may name."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trilemma.attacks.poisoning.on_records import AdversarialSamples, Backdoor, InflatedCount, LabelFlip
from trilemma.attacks.poisoning.on_updates import (
    Adaptive,
    Alie,
    Gaussian,
    InnerProduct,
    Malformed,
    Mimic,
    MinMax,
    MinSum,
    Scaling,
    SignFlip,
)
from trilemma.attacks.poisoning.threat import Threat


class NoThreat(Threat):
    """Every client is honest."""

    kind: Literal["none"] = "none"
    num_malicious: None = None  # pyright: ignore[reportIncompatibleVariableOverride] - it can only be left out here
    clients: None = None  # pyright: ignore[reportIncompatibleVariableOverride] - it can only be left out here
    when: None = None  # pyright: ignore[reportIncompatibleVariableOverride] - it can only be left out here

    @model_validator(mode="after")
    def _one_choice(self) -> "NoThreat":
        return self

    @property
    def name(self) -> str:
        """Returns a short name for tables."""
        return "none"

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        return "none"

    def malicious(self, num_clients: int) -> tuple[int, ...]:
        """Returns no client."""
        return ()


ThreatSpec = Annotated[
    NoThreat
    | LabelFlip
    | AdversarialSamples
    | Backdoor
    | SignFlip
    | Gaussian
    | Scaling
    | Alie
    | InnerProduct
    | MinMax
    | MinSum
    | Mimic
    | Adaptive
    | Malformed
    | InflatedCount,
    Field(discriminator="kind"),
]
