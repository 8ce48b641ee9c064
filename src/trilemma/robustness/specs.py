"""The defences that a study may name, and the early stopping that guards them against overfitting."""

from abc import ABC, abstractmethod
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from trilemma.attacks.budget import Budget, Norm, check_radius
from trilemma.attacks.evasion.fgsm import fgsm
from trilemma.attacks.evasion.specs import Apgd, EvasionSpec, Fgsm, MiFgsm, Pgd
from trilemma.robustness.crafting import last_pgd_images, nfgsm_images
from trilemma.robustness.objective import Objective
from trilemma.robustness.objectives import adversarial, standard
from trilemma.robustness.schedule import Schedule, Share, Warmup, check_one_growth, growth_label, radius_share
from trilemma.robustness.two_views import divergent_images, mart, trades
from trilemma.spec import Radius, Spec


def _climbs_at_one_radius(attack: EvasionSpec) -> EvasionSpec:
    if not isinstance(attack, Fgsm | Pgd | MiFgsm | Apgd):
        raise ValueError(
            f"attack '{attack.kind}' is for finished models: it looks for a smallest perturbation, asks for answers "
            "alone or joins several attacks; while a model trains use 'fgsm', 'pgd', 'mifgsm' or 'apgd', which follow "
            "the gradient at a given radius"
        )
    if len(attack.radii) > 1:
        raise ValueError(
            f"attack '{attack.kind}' has {len(attack.radii)} radii here, where one is needed; give radius = '4/255' "
            "(a defence's radius grows by warmup or schedule)"
        )
    return attack


#: An attack that is fast enough for use in training: it climbs a loss by gradients, at one radius.
TrainingAttack = Annotated[EvasionSpec, AfterValidator(_climbs_at_one_radius)]


def _step(step_size: float | None) -> str:
    return "" if step_size is None else f" step {step_size:g}"


def _mixed(fraction: float) -> str:
    return "" if fraction == 1 else f" ({100 * fraction:g} %)"


class NoDefence(Spec):
    """Plain training."""

    kind: Literal["none"] = "none"

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        return "none"

    @property
    def budget(self) -> Budget | None:
        """Returns None: there is no radius."""
        return None

    def make(self, progress: float = 1.0) -> Objective:
        """Returns the objective; `progress` is the share of the training that is done."""
        return standard()


class Hardening(Spec, ABC):
    """What the defences have that craft their images within a radius of their own.

    Attributes:
        norm: "linf" or "l2".
        radius: In pixel units; may be written as "4/255".
        warmup: Share of the training over which the radius grows in proportion from 0; spares a model that has not
            learned anything yet, above all under differential privacy, from collapsing to a constant.
        schedule: How the radius grows, in place of `warmup`: points [share of the training, share of the radius], such
            as [[0, 0], [0.3, 0.5], [0.6, 1]], joined by straight lines.
    """

    norm: Norm = "linf"
    radius: Radius = 4 / 255
    warmup: Warmup = 0.0
    schedule: Schedule | None = None

    @model_validator(mode="after")
    def _radius_fits(self) -> "Hardening":
        check_radius(self.norm, self.radius)
        check_one_growth(self.warmup, self.schedule)
        return self

    @property
    def budget(self) -> Budget | None:
        """Returns the norm and the whole radius."""
        return Budget(self.norm, self.radius)

    @property
    @abstractmethod
    def label(self) -> str:
        """Returns a short name for tables."""

    def labelled(self, method: str, fraction: float = 1.0) -> str:
        """Returns a short name for tables, of a method and the fields that all have."""
        whole = Budget(self.norm, self.radius).label
        return f"{method} {whole}{_mixed(fraction)}{growth_label(self.warmup, self.schedule)}"

    def make(self, progress: float = 1.0) -> Objective:
        """Returns the objective; `progress` is the share of the training that is done."""
        share = radius_share(self.warmup, self.schedule, progress)
        return self.objective(Budget(self.norm, self.radius * share))

    @abstractmethod
    def objective(self, budget: Budget) -> Objective:
        """Returns the objective at a radius."""


class FgsmTraining(Hardening):
    """Adversarial training with one step from a random start, 1.25 radii long (Wong et al., 2020).

    Attributes:
        norm: "linf" or "l2".
        radius: In pixel units; may be written as "4/255".
        fraction: Probability with which a record is adversarial, drawn for each record alone.
        warmup: Share of the training over which the radius grows in proportion from 0; spares a model that has not
            learned anything yet, above all under differential privacy, from collapsing to a constant.
        schedule: How the radius grows, in place of `warmup`: points [share of the training, share of the radius], such
            as [[0, 0], [0.3, 0.5], [0.6, 1]], joined by straight lines.
    """

    kind: Literal["fgsm"] = "fgsm"
    fraction: Share = 1.0

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        return self.labelled("FGSM training", self.fraction)

    def objective(self, budget: Budget) -> Objective:
        """Returns the objective at a radius."""
        return adversarial(partial(fgsm, random_start=True), budget, self.fraction)


class PgdTraining(Hardening):
    """Adversarial training with projected gradient descent (Madry et al., 2018).

    Attributes:
        norm: "linf" or "l2".
        radius: In pixel units; may be written as "4/255".
        steps: Steps per image; each is a forward and a backward pass to the pixels.
        step_size: Length of a step over the radius; None for 2.5 / steps.
        fraction: Probability with which a record is adversarial, drawn for each record alone.
        warmup: Share of the training over which the radius grows in proportion from 0; spares a model that has not
            learned anything yet, above all under differential privacy, from collapsing to a constant.
        schedule: How the radius grows, in place of `warmup`: points [share of the training, share of the radius], such
            as [[0, 0], [0.3, 0.5], [0.6, 1]], joined by straight lines.
    """

    kind: Literal["pgd"] = "pgd"
    steps: int = Field(default=7, ge=1)
    step_size: float | None = Field(default=None, gt=0)
    fraction: Share = 1.0

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        return self.labelled(f"PGD-{self.steps}{_step(self.step_size)} training", self.fraction)

    def objective(self, budget: Budget) -> Objective:
        """Returns the objective at a radius."""
        attack = partial(last_pgd_images, steps=self.steps, step_size=self.step_size)
        return adversarial(attack, budget, self.fraction)


class NFgsmTraining(Hardening):
    """Adversarial training with one step after much noise, neither moved back into the radius (de Jorge et al., 2022).

    As cheap as `fgsm`, and it does not break down suddenly.

    Attributes:
        norm: "linf" or "l2".
        radius: In pixel units; may be written as "4/255".
        noise: Radius of the uniform noise over the radius.
        step_size: Length of the step over the radius.
        fraction: Probability with which a record is adversarial, drawn for each record alone.
        warmup: Share of the training over which the radius grows in proportion from 0; spares a model that has not
            learned anything yet, above all under differential privacy, from collapsing to a constant.
        schedule: How the radius grows, in place of `warmup`: points [share of the training, share of the radius], such
            as [[0, 0], [0.3, 0.5], [0.6, 1]], joined by straight lines.
    """

    kind: Literal["nfgsm"] = "nfgsm"
    noise: float = Field(default=2.0, ge=0)
    step_size: float = Field(default=1.0, gt=0)
    fraction: Share = 1.0

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        noise = "" if self.noise == 2 else f" noise {self.noise:g}"
        step = _step(None if self.step_size == 1 else self.step_size)
        return self.labelled(f"N-FGSM{noise}{step} training", self.fraction)

    def objective(self, budget: Budget) -> Objective:
        """Returns the objective at a radius."""
        attack = partial(nfgsm_images, noise=self.noise, step_size=self.step_size)
        return adversarial(attack, budget, self.fraction)


class Trades(Hardening):
    """The clean image's loss plus `beta` times how far an attack can move the answer to it (Zhang et al., 2019).

    Attributes:
        norm: "linf" or "l2".
        radius: In pixel units; may be written as "4/255".
        beta: Weight of the answer's constancy against its being right.
        steps: Steps per image; each is a forward and a backward pass to the pixels.
        step_size: Length of a step over the radius; None for 2.5 / steps.
        warmup: Share of the training over which the radius grows in proportion from 0; spares a model that has not
            learned anything yet, above all under differential privacy, from collapsing to a constant.
        schedule: How the radius grows, in place of `warmup`: points [share of the training, share of the radius], such
            as [[0, 0], [0.3, 0.5], [0.6, 1]], joined by straight lines.
    """

    kind: Literal["trades"] = "trades"
    beta: float = Field(default=6.0, ge=0)
    steps: int = Field(default=10, ge=1)
    step_size: float | None = Field(default=None, gt=0)

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        return self.labelled(f"TRADES-{self.steps}{_step(self.step_size)} beta {self.beta:g}")

    def objective(self, budget: Budget) -> Objective:
        """Returns the objective at a radius."""
        return trades(partial(divergent_images, steps=self.steps, step_size=self.step_size), budget, self.beta)


class Mart(Hardening):
    """Adversarial training that minds the images more on which the model errs (Wang et al., 2020).

    Attributes:
        norm: "linf" or "l2".
        radius: In pixel units; may be written as "4/255".
        beta: Weight of the divergence between the answers to the clean and the attacked image.
        steps: Steps per image; each is a forward and a backward pass to the pixels.
        step_size: Length of a step over the radius; None for 2.5 / steps.
        warmup: Share of the training over which the radius grows in proportion from 0; spares a model that has not
            learned anything yet, above all under differential privacy, from collapsing to a constant.
        schedule: How the radius grows, in place of `warmup`: points [share of the training, share of the radius], such
            as [[0, 0], [0.3, 0.5], [0.6, 1]], joined by straight lines.
    """

    kind: Literal["mart"] = "mart"
    beta: float = Field(default=5.0, ge=0)
    steps: int = Field(default=10, ge=1)
    step_size: float | None = Field(default=None, gt=0)

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        return self.labelled(f"MART-{self.steps}{_step(self.step_size)} beta {self.beta:g}")

    def objective(self, budget: Budget) -> Objective:
        """Returns the objective at a radius."""
        return mart(partial(last_pgd_images, steps=self.steps, step_size=self.step_size), budget, self.beta)


class AdversarialTraining(Spec):
    """Adversarial training with an attack of choice, driven to the highest loss it finds.

    Attributes:
        attack: "fgsm", "pgd", "mifgsm" or "apgd" with its norm and one radius.
        fraction: Probability with which a record is adversarial, drawn for each record alone.
        warmup: Share of the training over which the radius grows in proportion from 0; spares a model that has not
            learned anything yet, above all under differential privacy, from collapsing to a constant.
        schedule: How the radius grows, in place of `warmup`: points [share of the training, share of the radius], such
            as [[0, 0], [0.3, 0.5], [0.6, 1]], joined by straight lines.
    """

    kind: Literal["adversarial"] = "adversarial"
    attack: TrainingAttack
    fraction: Share = 1.0
    warmup: Warmup = 0.0
    schedule: Schedule | None = None

    @model_validator(mode="after")
    def _one_growth(self) -> "AdversarialTraining":
        check_one_growth(self.warmup, self.schedule)
        return self

    @property
    def budget(self) -> Budget | None:
        """Returns the norm and the whole radius."""
        return self.attack.budgets[0]

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        growth = growth_label(self.warmup, self.schedule)
        return f"training on {self.attack.method} {self.attack.budgets[0].label}{_mixed(self.fraction)}{growth}"

    def make(self, progress: float = 1.0) -> Objective:
        """Returns the objective; `progress` is the share of the training that is done."""
        whole, share = self.attack.budgets[0], radius_share(self.warmup, self.schedule, progress)
        return adversarial(self.attack.make(stop=False), Budget(whole.norm, whole.radius * share), self.fraction)


def _no_free_lunch(defence: Any) -> Any:
    """Refuses by name the one well-known defence that cannot be an objective here."""
    if isinstance(defence, dict) and str(defence.get("kind")) in ("free", "free_adversarial"):
        raise ValueError(
            "free adversarial training (Shafahi et al. 2019) carries perturbations on from one step to the next, made "
            "by other records' images: under differential privacy no record's influence could be bounded, and here "
            "every defence must be able to go with it; 'nfgsm' costs as little"
        )
    return defence


DefenceSpec = Annotated[
    NoDefence | FgsmTraining | PgdTraining | NFgsmTraining | Trades | Mart | AdversarialTraining,
    Field(discriminator="kind"),
    BeforeValidator(_no_free_lunch),
]


class EarlyStopping(Spec):
    """The model is the one of the round whose robust accuracy on other images was the highest (Rice et al., 2020).

    Robust accuracy on training images goes on rising when that on others already falls. A look attacks the images of a
    split, always with the same random draws. Of equal rounds the later one counts: it has learned longer, and at a
    larger radius where that grows.

    Attributes:
        attack: "fgsm", "pgd", "mifgsm" or "apgd" with its norm and one radius; None for 10 steps of PGD at the
            defence's radius.
        every: Rounds from one look to the next; the last round is looked at too.
        patience: Looks in a row without a higher value after which the training ends; None trains all rounds. A look
            counts from the first one on, also while the radius grows.
        split: "val", the validation images, which the model may then not be measured on; or "public", those of
            `pretraining.data`, the only ones that cost no privacy.
        measure: "accuracy", or "balanced_accuracy", the mean over the classes: a model that always gives the most
            frequent answer may lead by accuracy while the others still learn.
    """

    attack: TrainingAttack | None = None
    every: int = Field(default=1, ge=1)
    patience: int | None = Field(default=None, ge=1)
    split: Literal["val", "public"] = "val"
    measure: Literal["accuracy", "balanced_accuracy"] = "accuracy"

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        attack = "" if self.attack is None else f" under {self.attack.method} {self.attack.budgets[0].label}"
        balanced = "balanced " if self.measure == "balanced_accuracy" else ""
        patience = "" if self.patience is None else f", patience {self.patience}"
        rounds = "" if self.every == 1 else f" every {self.every} rounds"
        return f"best {balanced}round on {self.split}{attack}{rounds}{patience}"
