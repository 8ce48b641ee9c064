"""What every inference-time attack of a study has: a norm, its radii, and how to make it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, model_validator

from trilemma.attacks.budget import Budget, Norm
from trilemma.attacks.evasion.types import TWIN_ONLY, Access, Evasion
from trilemma.spec import Radius, Spec

NORM_LABELS = {"linf": "Linf", "l2": "L2"}


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


class Attack(Spec, ABC):
    """What all attacks have: a norm, its radii, and how to make them.

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
    def _within_images(self) -> "Attack":
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

    @property
    def label(self) -> str:
        """Returns the text for tables, with the norm."""
        return f"{self.method} {NORM_LABELS[self.norm]}"

    def name(self, num_classes: int) -> str:
        """Returns the text for results, where what is run depends on the number of classes."""
        return self.label

    @property
    def sees_gradients(self) -> bool:
        """Returns whether it is a white-box attack: it follows the gradients of a twin."""
        return True

    @property
    def scored(self) -> "Attack | None":
        """Returns the full-budget attack on the margin whose images give the AUROC under attack, or None."""
        return None

    def check(self, num_classes: int) -> None:
        """Refuses a number of classes for which the attack does not exist.

        Raises:
            UserError: Naming the classes and what to use.
        """

    @property
    @abstractmethod
    def method(self) -> str:
        """Returns the attack and its settings, without the norm."""

    @abstractmethod
    def make(self, access: Access = TWIN_ONLY, *, stop: bool = True) -> Evasion:
        """Returns the attack.

        Args:
            access: What the attacker has beside gradients.
            stop: Whether an image that is broken leaves the batch, where the attack can also go on for the highest
                loss: for images that shall transfer, and for scores under attack.
        """
