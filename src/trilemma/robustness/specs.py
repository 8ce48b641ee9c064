"""The defences that a study may name."""

from functools import partial
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trilemma.attacks.budget import Budget, Norm, check_radius
from trilemma.attacks.evasion.fgsm import fgsm
from trilemma.attacks.evasion.pgd import pgd
from trilemma.robustness.objective import Objective
from trilemma.robustness.objectives import adversarial, standard
from trilemma.spec import Radius, Spec


class NoDefence(Spec):
    """Plain training."""

    kind: Literal["none"] = "none"

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        return "none"

    def make(self, progress: float = 1.0) -> Objective:
        """Returns the objective; `progress` is the share of the training that is done."""
        return standard()


class FgsmTraining(Spec):
    """Adversarial training with one step from a random start, 1.25 radii long (Wong et al., 2020).

    Attributes:
        norm: "linf" or "l2".
        radius: In pixel units; may be written as "4/255".
        fraction: Probability with which a record is adversarial, drawn for each record alone.
        warmup: Share of the training over which the radius grows in proportion from 0; spares a model that has not
            learned anything yet, above all under differential privacy, from collapsing to a constant.
    """

    kind: Literal["fgsm"] = "fgsm"
    norm: Norm = "linf"
    radius: Radius = 4 / 255
    fraction: float = Field(default=1.0, ge=0, le=1)
    warmup: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _radius_fits(self) -> "FgsmTraining":
        check_radius(self.norm, self.radius)
        return self

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        return f"FGSM training {Budget(self.norm, self.radius).label}{_variant(self.fraction, self.warmup)}"

    def make(self, progress: float = 1.0) -> Objective:
        """Returns the objective; `progress` is the share of the training that is done."""
        budget = Budget(self.norm, _warmed_up(self.radius, self.warmup, progress))
        return adversarial(partial(fgsm, random_start=True), budget, self.fraction)


class PgdTraining(Spec):
    """Adversarial training with projected gradient descent (Madry et al., 2018).

    Attributes:
        norm: "linf" or "l2".
        radius: In pixel units; may be written as "4/255".
        steps: Steps per image; each is a forward and a backward pass to the pixels.
        step_size: Length of a step over the radius; None for 2.5 / steps.
        fraction: Probability with which a record is adversarial, drawn for each record alone.
        warmup: Share of the training over which the radius grows in proportion from 0; spares a model that has not
            learned anything yet, above all under differential privacy, from collapsing to a constant.
    """

    kind: Literal["pgd"] = "pgd"
    norm: Norm = "linf"
    radius: Radius = 4 / 255
    steps: int = Field(default=7, ge=1)
    step_size: float | None = Field(default=None, gt=0)
    fraction: float = Field(default=1.0, ge=0, le=1)
    warmup: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _radius_fits(self) -> "PgdTraining":
        check_radius(self.norm, self.radius)
        return self

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        step = "" if self.step_size is None else f" step {self.step_size:g}"
        variant = _variant(self.fraction, self.warmup)
        return f"PGD-{self.steps}{step} training {Budget(self.norm, self.radius).label}{variant}"

    def make(self, progress: float = 1.0) -> Objective:
        """Returns the objective; `progress` is the share of the training that is done."""
        budget = Budget(self.norm, _warmed_up(self.radius, self.warmup, progress))
        attack = partial(pgd, steps=self.steps, step_size=self.step_size, keep_best=False)
        return adversarial(attack, budget, self.fraction)


DefenceSpec = Annotated[NoDefence | FgsmTraining | PgdTraining, Field(discriminator="kind")]


def _variant(fraction: float, warmup: float) -> str:
    share = "" if fraction == 1 else f" ({100 * fraction:g} %)"
    return share + ("" if warmup == 0 else f", warm-up {100 * warmup:g} %")


def _warmed_up(radius: float, warmup: float, progress: float) -> float:
    return radius if progress >= warmup else radius * progress / warmup
