"""What a study may measure of an artefact: its clean metrics, what attacks leave of it, and what it costs."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trilemma.attacks.budget import Budget, Norm, check_radius
from trilemma.attacks.evasion.attack import NORM_LABELS
from trilemma.attacks.evasion.specs import Apgd, EvasionSpec, Fgsm, MiFgsm, Pgd
from trilemma.attacks.poisoning.triggers import Patch, TriggerSpec
from trilemma.spec import Radius, Spec


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


#: Attacks whose images can be driven to the highest loss, which is what transfers.
TransferableSpec = Annotated[Fgsm | Pgd | MiFgsm | Apgd, Field(discriminator="kind")]


class Transfer(Spec):
    """An attack made on every other artefact of the same data and seed, judged on this one.

    The black-box attack of Usynin et al. (2022), on the whole test set. The worst of them over all other trainings
    counts as one evaluation, which is undefined where a study has only one training of the data and seed.

    Attributes:
        attack: What is made on the sources; its fields may stand beside `kind` for "pgd":
            { kind = "transfer", radius = "4/255", steps = 10 }.
    """

    kind: Literal["transfer"] = "transfer"
    attack: TransferableSpec

    @model_validator(mode="before")
    @classmethod
    def _fields_of_pgd(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "attack" in values:
            return values
        fields = {name: value for name, value in values.items() if name != "kind"}
        if not {"radius", "radii"} & fields.keys():
            raise ValueError("a transfer needs radii, such as radii = ['1/255', '4/255'], or an attack of its own")
        unknown = fields.keys() - Pgd.model_fields.keys() - {"radius"}
        if unknown:
            valid = ", ".join(name for name in Pgd.model_fields if name != "kind")
            raise ValueError(
                f"unknown field {', '.join(sorted(unknown))}; valid are attack, or those of 'pgd': {valid}"
            )
        return {"kind": "transfer", "attack": {"kind": "pgd"} | fields}

    @property
    def norm(self) -> Norm:
        """Returns the norm of the attack."""
        return self.attack.norm

    @property
    def radii(self) -> tuple[float, ...]:
        """Returns the radii of the attack."""
        return self.attack.radii

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Returns one budget per radius."""
        return self.attack.budgets

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return f"transfer {self.attack.label}"


class AllAtOnce(Spec):
    """The worst of several attacks for every single image: it counts as robust only if it withstands all of them.

    Undefined where one of them is: a transfer in a study with only one training of the data and seed.

    Attributes:
        attacks: At least two attacks with the same norm and the same radii.
    """

    kind: Literal["all_at_once"] = "all_at_once"
    attacks: tuple[Annotated[EvasionSpec | Transfer, Field(discriminator="kind")], ...] = Field(min_length=2)

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
        return f"all at once {NORM_LABELS[self.norm]}"


class Backdoor(Spec):
    """Looks for a backdoor: how often its trigger turns test images of other classes into the attacker's class.

    Of a model whose training nobody attacked it is the rate by chance.

    Attributes:
        trigger: What is laid over the test images, as a whole, whatever part of it each malicious client used.
        target: The class that the attacker wants, counted from 0.
    """

    kind: Literal["backdoor"] = "backdoor"
    trigger: TriggerSpec = Patch()
    target: int = Field(default=0, ge=0)

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return f"backdoor by {self.trigger.label} to class {self.target}"


class Diagnostics(Spec):
    """Looks for robustness that is not there: each sign of it is a flag, and a flag withholds robust accuracies.

    A study that attacks has one for every norm and radius, whether its file names one or not; what a file names stands
    in for that of its norm and radius alone.

    Attributes:
        norm: "linf" or "l2".
        radius: In pixel units.
        num_images: Test images that are looked at, at most; drawn without regard to their labels.
    """

    kind: Literal["diagnostics"] = "diagnostics"
    norm: Norm = "linf"
    radius: Annotated[Radius, Field(gt=0)]
    num_images: int = Field(default=256, ge=32)

    @model_validator(mode="after")
    def _radius_fits(self) -> "Diagnostics":
        check_radius(self.norm, self.radius)
        return self

    @property
    def budget(self) -> Budget:
        """Returns the budget."""
        return Budget(self.norm, self.radius)

    @property
    def label(self) -> str:
        """Returns the text for tables."""
        return f"diagnostics {self.budget.label}"


EvaluationSpec = Annotated[
    Clean | EvasionSpec | Transfer | AllAtOnce | Backdoor | Diagnostics | Cost,
    Field(discriminator="kind"),
]
