"""What a study may say about privacy."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trilemma.privacy.accounting import noise_multiplier
from trilemma.privacy.plan import PrivacyPlan
from trilemma.spec import Spec


class NoPrivacy(Spec):
    """Training without differential privacy; nothing may be claimed."""

    kind: Literal["none"] = "none"

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return "no DP"


class DpSgd(Spec):
    """DP-SGD at every client, before anything leaves it.

    Attributes:
        unit: What the guarantee protects: one image.
        trust: Who adds the noise: each client its own.
        epsilon: Target over all rounds; the noise is calibrated to it. Or give `noise_multiplier`.
        noise_multiplier: Standard deviation of the noise over `clip`. Or give `epsilon`.
        delta: Probability with which the bound may fail; below 1 / (records of the smallest client).
        clip: Clipping norm of one record's gradient.
    """

    kind: Literal["dp_sgd"] = "dp_sgd"
    unit: Literal["example"] = "example"
    trust: Literal["local"] = "local"
    epsilon: float | None = Field(default=None, gt=0)
    noise_multiplier: float | None = Field(default=None, gt=0)
    delta: float = Field(gt=0, lt=1)
    clip: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _one_target(self) -> "DpSgd":
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give either epsilon (the noise is calibrated to it) or noise_multiplier, and not both")
        return self

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        if self.epsilon is not None:
            return f"DP epsilon {self.epsilon:g}"
        return f"DP noise {self.noise_multiplier:g}"

    def make(self, num_records: int, batch_size: int, steps: int) -> PrivacyPlan:
        """Returns the plan of a client for all the steps that it will run.

        Args:
            num_records: The client's records, a published number.
            batch_size: Expected batch size; also the denominator.
            steps: Steps over all rounds.

        Raises:
            ValueError: If the batch exceeds the records, delta is not below 1 / records, or epsilon is out of reach.
        """
        if batch_size > num_records:
            raise ValueError(f"local.batch_size {batch_size} exceeds its {num_records} records")
        if self.delta >= 1 / num_records:
            raise ValueError(
                f"privacy.delta {self.delta:g} is not below 1 / {num_records} records, so it would allow publishing one"
            )
        rate = batch_size / num_records
        noise = self.noise_multiplier
        if noise is None:
            assert self.epsilon is not None  # the validator's promise
            noise = noise_multiplier(self.epsilon, self.delta, rate, max(1, steps))
        return PrivacyPlan(num_records, rate, float(batch_size), self.clip, noise)


PrivacySpec = Annotated[NoPrivacy | DpSgd, Field(discriminator="kind")]
