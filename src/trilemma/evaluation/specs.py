"""What a study may measure of an artefact.

An attack's radii are listed in ascending order, in pixel units: `radii = ["1/255", "4/255"]`; `radius = "4/255"`
stands for one.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from trilemma.attacks.budget import Budget, Norm
from trilemma.attacks.evasion.types import Evasion
from trilemma.attacks.specs import Fgsm, Pgd
from trilemma.spec import Radius, Spec

_NORM_LABELS = {"linf": "Linf", "l2": "L2"}


def _ascending(radii: tuple[float, ...]) -> tuple[float, ...]:
    if not radii:
        raise ValueError("at least one radius is needed, such as '4/255'; clean images have an evaluation of their own")
    if radii[0] <= 0:
        raise ValueError(f"a radius must be positive, not {radii[0]:g}; clean images have an evaluation of their own")
    if any(low >= high for low, high in zip(radii, radii[1:], strict=False)):
        raise ValueError(f"radii must ascend without repeating, not {', '.join(f'{radius:g}' for radius in radii)}")
    return radii


def _one_or_more(radii: Any) -> Any:
    return (radii,) if isinstance(radii, (str, int, float)) else radii


#: Radii of one attack, ascending and positive.
Radii = Annotated[tuple[Radius, ...], BeforeValidator(_one_or_more), AfterValidator(_ascending)]


class Clean(Spec):
    """Metrics on the test images as they are."""

    kind: Literal["clean"] = "clean"

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return "clean"


class Cost(Spec):
    """The file's size, and the time of one call at batch 1 and 32 on one thread.

    Attributes:
        repeats: Timed calls per batch size, at least 5; the median and the quartiles count.
    """

    kind: Literal["cost"] = "cost"
    repeats: int = Field(default=30, ge=5)

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return "cost"


class _Attack(Spec):
    """What the attacks share: a norm and its radii.

    Attributes:
        norm: "linf" or "l2".
        radii: Radii in pixel units, ascending; at most 1 for "linf", which changes everything.
    """

    norm: Norm = "linf"
    radii: Radii

    @model_validator(mode="before")
    @classmethod
    def _radius_for_radii(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "radius" not in values:
            return values
        if "radii" in values:
            raise ValueError("give either radius or radii, not both")
        return {"radii" if name == "radius" else name: value for name, value in values.items()}

    @model_validator(mode="after")
    def _within_images(self) -> "_Attack":
        if self.norm == "linf" and self.radii[-1] > 1:
            raise ValueError(
                f"images lie in [0, 1], so an L-infinity radius is at most 1, not {self.radii[-1]:g}; "
                f"8 of 255 grey levels are '8/255'"
            )
        return self

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Returns one budget per radius."""
        return tuple(Budget(self.norm, radius) for radius in self.radii)


class FgsmAttack(_Attack):
    """One gradient step of full length (Goodfellow et al., 2015).

    Attributes:
        norm: "linf" or "l2".
        radii: Radii in pixel units, ascending; at most 1 for "linf".
        random_start: Start from a random point of the ball (Wong et al., 2020).
    """

    kind: Literal["fgsm"] = "fgsm"
    random_start: bool = False

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return f"{Fgsm(random_start=self.random_start).label} {_NORM_LABELS[self.norm]}"

    def make(self) -> Evasion:
        """Returns the attack."""
        return Fgsm(random_start=self.random_start).make()


class PgdAttack(_Attack):
    """Projected gradient descent against the artefact itself (Madry et al., 2018).

    Attributes:
        norm: "linf" or "l2".
        radii: Radii in pixel units, ascending; at most 1 for "linf".
        steps: Gradient steps.
        restarts: Random starts; the worst image of all counts.
        step_size: Step over radius; None means 2.5 / steps.
        loss: "cross_entropy" or "margin".
    """

    kind: Literal["pgd"] = "pgd"
    steps: int = Field(default=20, ge=1)
    restarts: int = Field(default=1, ge=1)
    step_size: float | None = Field(default=None, gt=0)
    loss: Literal["cross_entropy", "margin"] = "cross_entropy"

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return f"{self._pgd.label} {_NORM_LABELS[self.norm]}"

    @property
    def _pgd(self) -> Pgd:
        return Pgd(steps=self.steps, restarts=self.restarts, step_size=self.step_size, loss=self.loss)

    def make(self) -> Evasion:
        """Returns the attack."""
        return self._pgd.make()


class Transfer(_Attack):
    """PGD made on every other artefact of the same data and seed, judged on this one.

    The black-box attack of Usynin et al. (2022), on the whole test set. The worst of them over all other trainings
    counts as one evaluation, which is undefined where a study has only one training of the data and seed.

    Attributes:
        norm: "linf" or "l2".
        radii: Radii in pixel units, ascending; at most 1 for "linf".
        steps: Gradient steps on the source.
        restarts: Random starts on the source.
        step_size: Step over radius; None means 2.5 / steps.
        loss: "cross_entropy" or "margin".
    """

    kind: Literal["transfer"] = "transfer"
    steps: int = Field(default=20, ge=1)
    restarts: int = Field(default=1, ge=1)
    step_size: float | None = Field(default=None, gt=0)
    loss: Literal["cross_entropy", "margin"] = "cross_entropy"

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return f"transfer {self.on_the_source.label}"

    @property
    def on_the_source(self) -> PgdAttack:
        """Returns the attack that makes the images; a source that was attacked with it need not be attacked again."""
        return PgdAttack(
            norm=self.norm,
            radii=self.radii,
            steps=self.steps,
            restarts=self.restarts,
            step_size=self.step_size,
            loss=self.loss,
        )

    def make(self) -> Evasion:
        """Returns the attack, to be made on a source."""
        return self.on_the_source.make()


AttackSpec = Annotated[FgsmAttack | PgdAttack | Transfer, Field(discriminator="kind")]


class AllAtOnce(Spec):
    """The worst of several attacks for every single image: it counts as robust only if it withstands all of them.

    Undefined where one of them is: a transfer in a study with only one training of the data and seed.

    Attributes:
        attacks: At least two attacks with the same norm and the same radii.
    """

    kind: Literal["all_at_once"] = "all_at_once"
    attacks: tuple[AttackSpec, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _same_budgets(self) -> "AllAtOnce":
        if len({attack.budgets for attack in self.attacks}) > 1:
            raise ValueError("all attacks that are taken together must have the same norm and the same radii")
        if len({attack.key for attack in self.attacks}) < len(self.attacks):
            raise ValueError("the same attack stands here twice; leave one out")
        return self

    @property
    def norm(self) -> Norm:
        """Returns the norm of all attacks."""
        return self.attacks[0].norm

    @property
    def radii(self) -> tuple[float, ...]:
        """Returns the radii of all attacks."""
        return self.attacks[0].radii

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Returns one budget per radius."""
        return self.attacks[0].budgets

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return f"all at once {_NORM_LABELS[self.norm]}"


EvaluationSpec = Annotated[
    Clean | FgsmAttack | PgdAttack | Transfer | AllAtOnce | Cost,
    Field(discriminator="kind"),
]
