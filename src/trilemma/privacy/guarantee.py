"""What may be claimed about the privacy of a model, or why nothing may."""

import math
from decimal import ROUND_CEILING, Context, Decimal
from typing import Literal

from pydantic import BaseModel, ConfigDict

#: What is protected, and who adds the noise.
Unit = Literal["example", "patient", "client"]
Trust = Literal["local", "distributed", "central"]


class DpEvent(BaseModel):
    """Steps that ran with one mechanism: Poisson-sampled Gaussian, `steps` times.

    Attributes:
        noise_multiplier: Standard deviation of all the noise of a step over the most that one unit can move it.
        sampling_rate: Probability with which each unit took part in a step.
        steps: Number of steps that ran.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    noise_multiplier: float
    sampling_rate: float
    steps: int

    def in_words(self) -> str:
        """Returns the event in a few words."""
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return f"noise multiplier {self.noise_multiplier:.4g} in {steps} at sampling rate {self.sampling_rate:.4g}"


class Guarantee(BaseModel):
    """A differential-privacy claim with everything it rests on; it travels with every artefact.

    Attributes:
        unit: What is protected: one image ("example"), all of a patient's images at a hospital ("patient"), or all
            that a hospital holds ("client").
        relation: Neighbouring relation of the data sets, counted in units.
        trust: Who adds the noise: "local" means each client, before anything leaves it; "distributed" each client a
            share, under a secure sum; "central" whoever pools the images or, for unit "client", the server.
        delta: Probability with which the bound may fail; None without DP.
        epsilon_by_client: Client name -> epsilon, composed over every round that ran, of the clients to whom something
            is promised; `outside` names the others.
        events_by_client: Client name -> the steps that ran, of every client.
        clip: Clipping norm of what a unit contributes; where it adapts, the first one.
        clipping: How a unit's contribution was bounded.
        num_colluding: Under trust "distributed", how many clients may collude with the server or withhold noise; with
            0 nothing is claimed against a client that takes part, which knows its own share.
        accountant: The accountant behind epsilon, with its version.
        noise_source: Where the noise came from; seeded noise is for research.
        outside: What the claim does not cover, one phrase each.
        void: Why nothing may be claimed; empty where the claim stands.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    unit: Unit = "example"
    relation: Literal["add_or_remove_one"] = "add_or_remove_one"
    trust: Trust = "local"
    delta: float | None = None
    epsilon_by_client: dict[str, float] = {}
    events_by_client: dict[str, tuple[DpEvent, ...]] = {}
    clip: float | None = None
    clipping: str = "flat"  # what a stored guarantee without this field used
    num_colluding: int = 0
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
        clip = f"{self.clip:g} at first" if self.clipping.startswith("adaptive") else f"{self.clip:g}"
        return (
            f"With or without {_UNIT_IN_WORDS[self.unit]}, the probability of any set of outcomes differs by a factor "
            f"of at most exp({_rounded_up(self.epsilon)}), up to an additional {self.delta:g} (epsilon: {clients}). "
            f"{self._trust_in_words()} Clipping norm {clip} ({self.clipping}); {self._steps_in_words()}; "
            f"{self.accountant}; {self.noise_source}. Not covered: {'; '.join(self.outside)}."
        )

    def _trust_in_words(self) -> str:
        if self.trust == "central" and self.unit == "client":
            return _TRUSTED_SERVER
        if self.trust != "distributed":
            return _TRUST_IN_WORDS[self.trust]
        if not self.num_colluding:
            return (
                f"{_SECURE_SUM} Every hospital must add its share, and none may tell the server its own. The claim is "
                "about the server and those who see sums and models, not about a hospital that takes part: it knows "
                "its own share of the noise and can take it away."
            )
        who = "1 hospital" if self.num_colluding == 1 else f"{self.num_colluding} hospitals"
        return (
            f"{_SECURE_SUM} It holds for the others even if {who} should side with the server, add no noise, or take "
            "away the share of it that a hospital knows as its own."
        )

    def _steps_in_words(self) -> str:
        """Returns noise, sampling rate and steps, said once for all clients that have the same."""
        clients_by_events: dict[tuple[DpEvent, ...], list[str]] = {}
        for name, events in self.events_by_client.items():
            clients_by_events.setdefault(events, []).append(name)
        said = []
        for events, names in clients_by_events.items():
            whose = "" if len(clients_by_events) == 1 else f" ({', '.join(names)})"
            said += [f"{event.in_words()}{whose}" for event in events]
        return ", ".join(said) or "no step ran"


_UNIT_IN_WORDS = {
    "example": "any one image of a hospital",
    "patient": "all images of any one patient of a hospital",
    "client": "any one hospital and all its images",
}

_TRUST_IN_WORDS = {
    "local": "Each hospital adds its own noise, so neither the server nor another hospital needs to be trusted with "
    "its images.",
    "central": "The images are pooled in one place, which adds the noise and must be trusted with all of them.",
}

_TRUSTED_SERVER = (
    "The server sees every hospital's update as it is and adds the noise: it must be trusted with them, and with "
    "keeping secret which hospital took part in which round. The claim is about the models that leave the server."
)

_SECURE_SUM = (
    "Each hospital adds a share of the noise. This is sound only under a secure sum: everybody else may see the sum of "
    "all hospitals' contributions and never a single one. This program computes the sum "
    "and does not hide its parts; whoever deploys it must."
)


def of_group(epsilon: float, delta: float, size: int) -> tuple[float, float]:
    """Returns what (epsilon, delta) promises to `size` units together: (k epsilon, k e^((k-1) epsilon) delta).

    Group privacy, the definition used `size` times over. The second number is cut off at 1, which promises nothing.
    """
    exponent = math.log(size) + (size - 1) * epsilon + math.log(delta)
    return size * epsilon, math.exp(min(exponent, 0.0))


def group_in_words(epsilon: float, delta: float, size: int) -> str:
    """Returns what is promised to `size` units together, such as "epsilon is 16.00 and delta 0.6"."""
    epsilon_k, delta_k = of_group(epsilon, delta, size)
    shown = float(Context(prec=2, rounding=ROUND_CEILING).create_decimal_from_float(delta_k))
    if shown >= 1:
        return "nothing is promised, for that delta reaches 1"
    return f"epsilon is {_rounded_up(epsilon_k)} and delta {shown:g}"


def _rounded_up(epsilon: float) -> str:
    """Returns two decimals that never claim less than the bound."""
    return str(Decimal(str(epsilon)).quantize(Decimal("0.01"), ROUND_CEILING))


NO_PRIVACY = Guarantee(void=("training without differential privacy",))
