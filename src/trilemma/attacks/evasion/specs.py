"""The inference-time attacks that a study may name, each with its norm and its radii.

An attack's radii are listed in ascending order, in pixel units: `radii = ["1/255", "4/255"]`; `radius = "4/255"`
stands for one.
"""

from functools import partial
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trilemma.attacks.budget import Norm
from trilemma.attacks.evasion.apgd import ApgdLoss, apgd, check_classes
from trilemma.attacks.evasion.attack import NORM_LABELS, Attack
from trilemma.attacks.evasion.autoattack import Effort, autoattack, variant
from trilemma.attacks.evasion.carlini_wagner import carlini_wagner
from trilemma.attacks.evasion.deepfool import deepfool
from trilemma.attacks.evasion.fab import fab
from trilemma.attacks.evasion.fgsm import fgsm
from trilemma.attacks.evasion.hop_skip_jump import hop_skip_jump
from trilemma.attacks.evasion.losses import LossName
from trilemma.attacks.evasion.mifgsm import mifgsm
from trilemma.attacks.evasion.pgd import pgd
from trilemma.attacks.evasion.square import square
from trilemma.attacks.evasion.types import TWIN_ONLY, Access, Evasion

#: Steps of the full-budget attack that scores the AUROC beside an AutoAttack.
SCORED_STEPS = 100


class Fgsm(Attack):
    """One gradient step of full length (Goodfellow et al., 2015).

    Attributes:
        norm: "linf" or "l2".
        radii: Radii in pixel units, ascending; at most 1 for "linf".
        random_start: Start from a random point of the ball (Wong et al., 2020).
    """

    kind: Literal["fgsm"] = "fgsm"
    random_start: bool = False

    @property
    def method(self) -> str:
        """Returns the attack and its settings, without the norm."""
        return "FGSM random start" if self.random_start else "FGSM"

    def make(self, access: Access = TWIN_ONLY, *, stop: bool = True) -> Evasion:
        """Returns the attack; it has one step, so `access` and `stop` change nothing."""
        return partial(fgsm, random_start=self.random_start)


class Pgd(Attack):
    """Projected gradient descent against the artefact itself (Madry et al., 2018).

    Attributes:
        norm: "linf" or "l2".
        radii: Radii in pixel units, ascending; at most 1 for "linf".
        steps: Gradient steps.
        restarts: Random starts; the worst image of all counts.
        step_size: Step over radius; None means 2.5 / steps.
        loss: "cross_entropy" or "margin".
        momentum: Of a moving sum of gradients that the steps follow, as in "mifgsm"; None follows the last one alone.
    """

    kind: Literal["pgd"] = "pgd"
    steps: int = Field(default=20, ge=1)
    restarts: int = Field(default=1, ge=1)
    step_size: float | None = Field(default=None, gt=0)
    loss: LossName = "cross_entropy"
    momentum: float | None = Field(default=None, gt=0)

    @property
    def method(self) -> str:
        """Returns the attack and its settings, without the norm."""
        times = f"x{self.restarts}" if self.restarts > 1 else ""
        step = "" if self.step_size is None else f" step {self.step_size:g}"
        momentum = "" if self.momentum is None else f" momentum {self.momentum:g}"
        return f"PGD-{self.steps}{times}{step}{momentum}{' margin' if self.loss == 'margin' else ''}"

    @property
    def scored(self) -> Attack | None:
        """Returns the attack itself where it climbs the margin."""
        return self if self.loss == "margin" else None

    def make(self, access: Access = TWIN_ONLY, *, stop: bool = True) -> Evasion:
        """Returns the attack."""
        return partial(
            pgd,
            steps=self.steps,
            step_size=self.step_size,
            restarts=self.restarts,
            loss=self.loss,
            momentum=self.momentum or 0.0,
            answers=access.answers,
            stop=stop,
        )


class MiFgsm(Attack):
    """Iterated FGSM whose steps follow a moving sum of gradients, for images that transfer (Dong et al., 2018).

    Attributes:
        norm: "linf" or "l2".
        radii: Radii in pixel units, ascending; at most 1 for "linf".
        steps: Gradient steps, each of radius / steps.
        decay: Of the moving sum; 0 is iterated FGSM.
    """

    kind: Literal["mifgsm"] = "mifgsm"
    steps: int = Field(default=10, ge=1)
    decay: float = Field(default=1.0, ge=0)

    @property
    def method(self) -> str:
        """Returns the attack and its settings, without the norm."""
        return f"MI-FGSM-{self.steps}{'' if self.decay == 1 else f' decay {self.decay:g}'}"

    def make(self, access: Access = TWIN_ONLY, *, stop: bool = True) -> Evasion:
        """Returns the attack."""
        return partial(mifgsm, steps=self.steps, decay=self.decay, answers=access.answers, stop=stop)


class Apgd(Attack):
    """Projected gradient descent that chooses its own step size (Croce and Hein, 2020).

    Attributes:
        norm: "linf" or "l2".
        radii: Radii in pixel units, ascending; at most 1 for "linf".
        steps: Gradient steps per start.
        restarts: Random starts (for each target).
        loss: "cross_entropy", "margin" or "dlr"; a DLR needs three classes, a targeted one four.
        num_targets: Wrong classes that are aimed at, the likeliest first, at most all of them; None aims at none. A
            target needs the loss "margin" or "dlr".
    """

    kind: Literal["apgd"] = "apgd"
    steps: int = Field(default=100, ge=1)
    restarts: int = Field(default=1, ge=1)
    loss: ApgdLoss = "cross_entropy"
    num_targets: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _targets_have_a_loss(self) -> "Apgd":
        if self.num_targets is not None and self.loss == "cross_entropy":
            raise ValueError('num_targets needs loss = "margin" or "dlr"; the cross entropy aims at no class')
        return self

    def check(self, num_classes: int) -> None:
        """Refuses a DLR with too few classes.

        Raises:
            UserError: Naming the loss that would do.
        """
        check_classes(self.loss, self.num_targets, num_classes)

    @property
    def method(self) -> str:
        """Returns the attack and its settings, without the norm."""
        loss = {"cross_entropy": "CE", "margin": "margin", "dlr": "DLR"}[self.loss]
        aimed = "" if self.num_targets is None else f" {self.num_targets} targets"
        times = f"x{self.restarts}" if self.restarts > 1 else ""
        return f"APGD-{self.steps}{times} {loss}{aimed}"

    @property
    def scored(self) -> Attack | None:
        """Returns the attack itself where it climbs the margin, whichever wrong class is the likeliest."""
        return self if self.loss == "margin" and self.num_targets is None else None

    def make(self, access: Access = TWIN_ONLY, *, stop: bool = True) -> Evasion:
        """Returns the attack."""
        return partial(
            apgd,
            steps=self.steps,
            restarts=self.restarts,
            loss=self.loss,
            num_targets=self.num_targets,
            answers=access.answers,
            stop=stop,
        )


class DeepFool(Attack):
    """Steps to the nearest boundary of a linearised model (Moosavi-Dezfooli et al., 2016).

    Attributes:
        norm: "linf" or "l2".
        radii: Radii in pixel units, ascending; at most 1 for "linf".
        steps: At most so many linearisations.
        overshoot: By which share the found perturbation is lengthened.
    """

    kind: Literal["deepfool"] = "deepfool"
    steps: int = Field(default=50, ge=1)
    overshoot: float = Field(default=0.02, ge=0)

    @property
    def method(self) -> str:
        """Returns the attack and its settings, without the norm."""
        return f"DeepFool-{self.steps}{'' if self.overshoot == 0.02 else f' overshoot {self.overshoot:g}'}"

    def make(self, access: Access = TWIN_ONLY, *, stop: bool = True) -> Evasion:
        """Returns the attack; it looks for the smallest perturbation, so `stop` changes nothing."""
        return partial(deepfool, steps=self.steps, overshoot=self.overshoot, answers=access.answers)


class CarliniWagner(Attack):
    """The smallest L2 perturbation that Adam finds for a penalised margin (Carlini and Wagner, 2017).

    Attributes:
        norm: "l2".
        radii: Radii in pixel units, ascending.
        steps: Adam steps for each weight of the penalty.
        searches: Binary search steps over that weight.
        learning_rate: Adam's.
    """

    kind: Literal["carlini_wagner"] = "carlini_wagner"
    norm: Norm = "l2"
    steps: int = Field(default=100, ge=1)
    searches: int = Field(default=6, ge=1)
    learning_rate: float = Field(default=0.05, gt=0)

    @model_validator(mode="after")
    def _measures_in_l2(self) -> "CarliniWagner":
        if self.norm != "l2":
            raise ValueError('carlini_wagner minimises the L2 length; use norm = "l2", or kind = "fab" for "linf"')
        return self

    @property
    def method(self) -> str:
        """Returns the attack and its settings, without the norm."""
        rate = "" if self.learning_rate == 0.05 else f" rate {self.learning_rate:g}"
        return f"CW-{self.steps}x{self.searches}{rate}"

    def make(self, access: Access = TWIN_ONLY, *, stop: bool = True) -> Evasion:
        """Returns the attack; it looks for the smallest perturbation, so `stop` changes nothing."""
        return partial(
            carlini_wagner,
            steps=self.steps,
            searches=self.searches,
            learning_rate=self.learning_rate,
            answers=access.answers,
        )


class Fab(Attack):
    """The fast adaptive boundary attack, which looks for the smallest perturbation (Croce and Hein, 2020b).

    Attributes:
        norm: "linf" or "l2".
        radii: Radii in pixel units, ascending; at most 1 for "linf".
        steps: Steps per start.
        restarts: Starts, the first at the clean image (for each target).
        num_targets: Wrong classes whose boundaries are looked for one by one, the likeliest first, at most all of
            them; None looks for the nearest of all.
    """

    kind: Literal["fab"] = "fab"
    steps: int = Field(default=100, ge=1)
    restarts: int = Field(default=1, ge=1)
    num_targets: int | None = Field(default=None, ge=1)

    @property
    def method(self) -> str:
        """Returns the attack and its settings, without the norm."""
        times = f"x{self.restarts}" if self.restarts > 1 else ""
        return f"FAB-{self.steps}{times}{'' if self.num_targets is None else f' {self.num_targets} targets'}"

    def make(self, access: Access = TWIN_ONLY, *, stop: bool = True) -> Evasion:
        """Returns the attack; it looks for the smallest perturbation, so `stop` changes nothing."""
        return partial(
            fab, steps=self.steps, restarts=self.restarts, num_targets=self.num_targets, answers=access.answers
        )


class Square(Attack):
    """Random search with square patches, which asks for logits only (Andriushchenko et al., 2020).

    Attributes:
        norm: "linf" or "l2".
        radii: Radii in pixel units, ascending; at most 1 for "linf".
        queries: Questions per image.
        first_share: Of an image's pixels that the first squares cover.
    """

    kind: Literal["square"] = "square"
    queries: int = Field(default=5000, ge=2)
    first_share: float = Field(default=0.8, gt=0, le=1)

    @property
    def sees_gradients(self) -> bool:
        """Returns False: it asks the model that ships and sees nothing else."""
        return False

    @property
    def method(self) -> str:
        """Returns the attack and its settings, without the norm."""
        share = "" if self.first_share == 0.8 else f" from {100 * self.first_share:g} %"
        return f"Square-{self.queries}{share}"

    def make(self, access: Access = TWIN_ONLY, *, stop: bool = True) -> Evasion:
        """Returns the attack."""
        return partial(square, queries=self.queries, first_share=self.first_share, answers=access.answers, stop=stop)


class HopSkipJump(Attack):
    """Follows the boundary from answers alone, without logits (Chen, Jordan and Wainwright, 2020).

    Attributes:
        norm: "linf" or "l2".
        radii: Radii in pixel units, ascending; at most 1 for "linf".
        queries: Questions per image, at most.
    """

    kind: Literal["hop_skip_jump"] = "hop_skip_jump"
    queries: int = Field(default=2500, ge=100)

    @property
    def sees_gradients(self) -> bool:
        """Returns False: it asks the model that ships and sees nothing else."""
        return False

    @property
    def method(self) -> str:
        """Returns the attack and its settings, without the norm."""
        return f"HopSkipJump-{self.queries}"

    def make(self, access: Access = TWIN_ONLY, *, stop: bool = True) -> Evasion:
        """Returns the attack; it looks for the smallest perturbation, so `stop` changes nothing."""
        return partial(hop_skip_jump, queries=self.queries, answers=access.answers)


class AutoAttack(Attack):
    """Several attacks in turn on the images that still stand, without settings to tune (Croce and Hein, 2020).

    Four classes and more have the standard ensemble. Two and three have variants, for the difference of logits ratio
    needs three classes and its targeted form four; their names tell them apart, and their results are not comparable
    with those of the standard one.

    Attributes:
        norm: "linf" or "l2".
        radii: Radii in pixel units, ascending; at most 1 for "linf".
        effort: "full", or "quick" with a fifth of the steps and queries, whose name says so.
    """

    kind: Literal["autoattack"] = "autoattack"
    effort: Effort = "full"

    @property
    def method(self) -> str:
        """Returns the attack and its settings, without the norm."""
        return "AutoAttack" if self.effort == "full" else "quick AutoAttack"

    def name(self, num_classes: int) -> str:
        """Returns the text for results: it tells which variant was run."""
        return f"{self.method} {variant(num_classes)} {NORM_LABELS[self.norm]}"

    @property
    def scored(self) -> Attack | None:
        """Returns APGD on the margin: the ensemble lets go of an image as soon as the answer changes."""
        return Apgd(norm=self.norm, radii=self.radii, steps=SCORED_STEPS, loss="margin")

    def make(self, access: Access = TWIN_ONLY, *, stop: bool = True) -> Evasion:
        """Returns the attack; it keeps what first broke an image, so `stop` changes nothing."""
        return partial(autoattack, effort=self.effort, answers=access.answers, surrogates=access.surrogates)


EvasionSpec = Annotated[
    Fgsm | Pgd | MiFgsm | Apgd | DeepFool | CarliniWagner | Fab | Square | HopSkipJump | AutoAttack,
    Field(discriminator="kind"),
]
