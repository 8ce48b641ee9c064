"""What a study may say about privacy."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trilemma.privacy.accounting import MIN_DELTA, TOO_SMALL, noise_multiplier
from trilemma.privacy.adaptive import Adaptation
from trilemma.privacy.clipping_rules import Automatic, Clipper, Flat, PerLayer
from trilemma.privacy.guarantee import Trust, Unit
from trilemma.privacy.noise import NoiseKind
from trilemma.privacy.plan import PrivacyPlan
from trilemma.spec import Spec


class NoPrivacy(Spec):
    """Training without differential privacy; nothing may be claimed."""

    kind: Literal["none"] = "none"

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return "no DP"


class FlatClipping(Spec):
    """The whole gradient is scaled to norm `clip` at most (Abadi et al. 2016)."""

    kind: Literal["flat"] = "flat"

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return "flat"

    def make(self, clip: float) -> Clipper:
        """Returns the clipper."""
        return Flat(clip)


class PerLayerClipping(Spec):
    """Each of the L layers' gradients is scaled to norm clip / sqrt(L) at most (McMahan et al. 2018)."""

    kind: Literal["per_layer"] = "per_layer"

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return "per layer"

    def make(self, clip: float) -> Clipper:
        """Returns the clipper."""
        return PerLayer(clip)


class AutomaticClipping(Spec):
    """Every gradient is scaled to nearly norm `clip`, small ones up (Bu et al. 2023, AUTO-S).

    The clip then only scales the step: halve it and double `local.learning_rate`, and SGD does the same.

    Attributes:
        gamma: Added to the norm; keeps the length of small gradients distinguishable.
    """

    kind: Literal["automatic"] = "automatic"
    gamma: float = Field(default=0.01, gt=0)

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return "automatic"

    def make(self, clip: float) -> Clipper:
        """Returns the clipper."""
        return Automatic(clip, self.gamma)


class AdaptiveClipping(Spec):
    """The clip starts at `clip` and follows a quantile of the norms (Andrew et al. 2021, Algorithm 1).

    It moves after every step; under trust "distributed" and unit "client" after every round. How many norms lie below
    it is released with noise of its own, which is accounted: the gradients get a little more noise instead.

    Attributes:
        quantile: Share of the norms that shall lie below the clip.
        learning_rate: Of the logarithm of the clip.
        count_noise: Standard deviation of the noise on the count of norms below the clip, in units. By default a
            twentieth of the expected number of units in a step, and at least twice the noise multiplier, so that the
            count raises the noise of the gradients by 3.3 % at most.
    """

    kind: Literal["adaptive"] = "adaptive"
    quantile: float = Field(default=0.5, ge=0, le=1)
    learning_rate: float = Field(default=0.2, gt=0, le=10)
    count_noise: float | None = Field(default=None, gt=0)

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return f"adaptive {100 * self.quantile:g} %"

    def make(self, clip: float) -> Clipper:
        """Returns the clipper at the first clip."""
        return Flat(clip)

    def adaptation(self, clip: float, noise: float, expected_units: float) -> Adaptation:
        """Returns how the clip moves.

        Args:
            clip: The first one.
            noise: The noise multiplier that is accounted.
            expected_units: In a step's sample.

        Raises:
            ValueError: If `count_noise` is too small for the noise multiplier.
        """
        count_noise = self.count_noise or max(expected_units / 20, 2 * noise)
        adaptation = Adaptation(self.quantile, self.learning_rate, count_noise, clip)
        adaptation.sum_noise(noise)
        return adaptation


ClippingSpec = Annotated[
    FlatClipping | PerLayerClipping | AutomaticClipping | AdaptiveClipping, Field(discriminator="kind")
]

#: The smallest noise multiplier that a study may give. Far below it nothing is protected, as epsilon says.
LEAST_NOISE = 0.01

_UNITS = {"example": "records", "patient": "patients", "client": "clients"}


class DpSgd(Spec):
    """Differential privacy by clipped, noised sums: what is protected, whom it trusts, how it is bounded.

    Attributes:
        unit: What the guarantee protects: one image ("example"), all images of a patient at a hospital ("patient"),
            or all that a hospital sends ("client"). Under "patient", `local.batch_size` and `local.epochs` count
            patients.
        trust: Who adds the noise. "local": each hospital all of its own, before anything leaves it. "distributed":
            each hospital a share; sound only where nobody sees more than the sum of all, for one step per round.
            "central": whoever holds everything: the server under unit "client", whoever pools the images in
            `centralised` training.
        clipping: How a unit's gradient (under unit "client" its whole update) is bounded.
        noise: "seeded": can be repeated, for research. "system": from the operating system, for deployment.
        epsilon: Target over all rounds; the noise is calibrated to it. Or give `noise_multiplier`.
        noise_multiplier: Standard deviation of the noise over `clip`, at least 0.01. Or give `epsilon`.
        delta: Probability with which the bound may fail; below 1 / units of every client, and so of the largest; under
            unit "client" below 1 / clients. At least 1e-10: below that the accountant's rounding errors outweigh it.
        clip: Clipping norm of what one unit contributes.
        num_colluding: Under trust "distributed": how many hospitals may join the server, or leave out their share of
            the noise, without weakening the others' guarantee. With 0 it does not hold against a hospital that takes
            part, for that one knows its own share; 1 or more covers any one such hospital.
    """

    kind: Literal["dp_sgd"] = "dp_sgd"
    unit: Unit = "example"
    trust: Trust = "local"
    clipping: ClippingSpec = FlatClipping()
    noise: NoiseKind = "seeded"
    epsilon: float | None = Field(default=None, gt=0)
    noise_multiplier: float | None = Field(default=None, gt=0)
    delta: float = Field(gt=0, lt=1)
    clip: float = Field(default=1.0, gt=0)
    num_colluding: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _sound(self) -> "DpSgd":
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give either epsilon (the noise is calibrated to it) or noise_multiplier, and not both")
        if self.noise_multiplier is not None and self.noise_multiplier < LEAST_NOISE:
            raise ValueError(
                f"noise_multiplier {self.noise_multiplier:g} is below {LEAST_NOISE:g}: so little noise protects "
                "nothing, and no epsilon worth stating follows from it; give more, or train without privacy"
            )
        if self.delta < MIN_DELTA:
            raise ValueError(f"delta {self.delta:g} is below {MIN_DELTA:g}, {TOO_SMALL}")
        if self.unit == "client" and self.trust != "central":
            raise ValueError(
                f"unit 'client' needs trust 'central', not '{self.trust}': only a server that sees whole updates "
                "can bound and noise them"
            )
        if self.num_colluding and self.trust != "distributed":
            raise ValueError(
                f"num_colluding {self.num_colluding} has a meaning under trust 'distributed' only, where hospitals "
                "share the noise; leave it out"
            )
        return self

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        size = f"epsilon {self.epsilon:g}" if self.epsilon is not None else f"noise {self.noise_multiplier:g}"
        unit = "" if self.unit == "example" else f" per {self.unit}"
        trust = "" if self.trust == "local" or self.unit == "client" else f" {self.trust}"
        clipping = "" if isinstance(self.clipping, FlatClipping) else f", {self.clipping.label} clipping"
        return f"DP {size}{unit}{trust}{clipping}"

    def calibrated(self, num_units: int, batch_size: int, steps: int) -> float:
        """Returns the noise multiplier for a client: the one given, or the smallest that keeps to epsilon.

        Args:
            num_units: The client's images or patients, a published number.
            batch_size: Expected number of units in a step.
            steps: Steps over all rounds.

        Raises:
            ValueError: If the batch exceeds the units, delta is not below 1 / units, or epsilon is out of reach.
        """
        self._check_size(num_units, batch_size)
        return self._calibrated(num_units, batch_size / num_units, steps)

    def make(
        self, num_units: int, batch_size: int, steps: int, noise: float | None = None, num_honest: int = 1
    ) -> PrivacyPlan:
        """Returns the plan of a client for all the steps that it will run.

        Args:
            num_units: The client's images or patients, a published number.
            batch_size: Expected number of units in a step; also the denominator.
            steps: Steps over all rounds.
            noise: The noise multiplier that all participants share, `calibrated` for the smallest of them; None
                calibrates for this client alone.
            num_honest: How many participants share the noise; 1 for all of it.

        Raises:
            ValueError: As `calibrated`, also where the noise is given, or if adaptive clipping leaves no noise for the
                gradients.
        """
        self._check_size(num_units, batch_size)
        self._check_delta(num_units)
        calibrated = self.calibrated(num_units, batch_size, steps) if noise is None else noise
        # The share of norms below the clip is counted over all participants' samples.
        adaptation = self._adaptation(calibrated, float(batch_size * num_honest))
        rate, clipper = batch_size / num_units, self.clipping.make(self.clip)
        return PrivacyPlan(num_units, rate, float(batch_size), clipper, calibrated, adaptation, num_honest, self.noise)

    def make_for_server(self, num_clients: int, clients_per_round: int, rounds: int) -> PrivacyPlan:
        """Returns the plan of a trusted server that protects whole clients (McMahan et al. 2018, Algorithm 1).

        Args:
            num_clients: All of them, a published number.
            clients_per_round: Expected number in a round; also the denominator.
            rounds: Of the training.

        Raises:
            ValueError: If delta is not below 1 / clients, or epsilon is out of reach.
        """
        rate = clients_per_round / num_clients
        noise = self._calibrated(num_clients, rate, rounds)
        adaptation, clipper = self._adaptation(noise, float(clients_per_round)), self.clipping.make(self.clip)
        return PrivacyPlan(num_clients, rate, float(clients_per_round), clipper, noise, adaptation, noise=self.noise)

    def _check_size(self, num_units: int, batch_size: int) -> None:
        if batch_size > num_units:
            raise ValueError(f"local.batch_size {batch_size} exceeds its {num_units} {_UNITS[self.unit]}")

    def _check_delta(self, num_units: int) -> None:
        if self.delta >= 1 / num_units:
            raise ValueError(
                f"privacy.delta {self.delta:g} is not below 1 / {num_units} {_UNITS[self.unit]}, so it would allow "
                "publishing one"
            )

    def _calibrated(self, num_units: int, rate: float, steps: int) -> float:
        self._check_delta(num_units)
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.epsilon is not None  # the validator's promise
        return noise_multiplier(self.epsilon, self.delta, rate, max(1, steps))

    def _adaptation(self, noise: float, expected_units: float) -> Adaptation | None:
        if not isinstance(self.clipping, AdaptiveClipping):
            return None
        return self.clipping.adaptation(self.clip, noise, expected_units)


PrivacySpec = Annotated[NoPrivacy | DpSgd, Field(discriminator="kind")]
