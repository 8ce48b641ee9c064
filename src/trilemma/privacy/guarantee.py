"""What may be claimed about the privacy of a model, or why nothing may."""

from decimal import ROUND_CEILING, Decimal
from typing import Literal

from pydantic import BaseModel, ConfigDict


class DpEvent(BaseModel):
    """Steps that ran with one mechanism: Poisson-sampled Gaussian, `steps` times.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        sampling_rate: Probability with which each record took part in a step.
        steps: Number of steps that ran.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    noise_multiplier: float
    sampling_rate: float
    steps: int


class Guarantee(BaseModel):
    """A differential-privacy claim with everything it rests on; it travels with every artefact.

    Attributes:
        unit: What is protected: one image.
        relation: Neighbouring relation of the data sets.
        trust: Who adds the noise: "local" means each client, before anything leaves it; "central" whoever pools the
            images, and must be trusted with them.
        delta: Probability with which the bound may fail; None without DP.
        epsilon_by_client: Client name -> epsilon, composed over every round that ran.
        events_by_client: Client name -> the steps that ran.
        clip: Clipping norm of a record's gradient.
        accountant: The accountant behind epsilon, with its version.
        noise_source: Where the noise came from; seeded noise is for research.
        outside: What the claim does not cover, one phrase each.
        void: Why nothing may be claimed; empty where the claim stands.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    unit: Literal["example"] = "example"
    relation: Literal["add_or_remove_one"] = "add_or_remove_one"
    trust: Literal["local", "central"] = "local"
    delta: float | None = None
    epsilon_by_client: dict[str, float] = {}
    events_by_client: dict[str, tuple[DpEvent, ...]] = {}
    clip: float | None = None
    accountant: str = ""
    noise_source: str = ""
    outside: tuple[str, ...] = ()
    void: tuple[str, ...] = ()

    @property
    def epsilon(self) -> float | None:
        """Returns the largest epsilon over clients, or None where nothing may be claimed."""
        if self.void or not self.epsilon_by_client:
            return None
        return max(self.epsilon_by_client.values())

    def voided(self, reason: str) -> "Guarantee":
        """Returns this guarantee with one more reason why nothing may be claimed."""
        return self.model_copy(update={"void": (*self.void, reason)})

    def in_words(self) -> str:
        """Returns the claim in plain words, for a report and a data-protection officer."""
        if self.epsilon is None:
            return "No guarantee: " + ("; ".join(self.void) or "nothing was accounted for") + "."
        clients = ", ".join(f"{name} {_rounded_up(value)}" for name, value in self.epsilon_by_client.items())
        return (
            f"With or without any one image of a hospital, the probability of any set of outcomes differs by a factor "
            f"of at most exp({_rounded_up(self.epsilon)}), up to an additional {self.delta:g} (epsilon: {clients}). "
            f"{_TRUST_IN_WORDS[self.trust]} Clipping norm {self.clip:g}; {self.accountant}; {self.noise_source}. "
            f"Not covered: {'; '.join(self.outside)}."
        )


_TRUST_IN_WORDS = {
    "local": "Each hospital adds its own noise, so neither the server nor another hospital needs to be trusted with "
    "its images.",
    "central": "The images are pooled in one place, which adds the noise and must be trusted with all of them.",
}


def _rounded_up(epsilon: float) -> str:
    """Returns two decimals that never claim less than the bound."""
    return str(Decimal(str(epsilon)).quantize(Decimal("0.01"), ROUND_CEILING))


NO_PRIVACY = Guarantee(void=("training without differential privacy",))
