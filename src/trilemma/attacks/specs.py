"""The inference-time attacks that a study may name. Norm and radius belong to the evaluation."""

from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from trilemma.attacks.evasion.fgsm import fgsm
from trilemma.attacks.evasion.pgd import LossName, pgd
from trilemma.attacks.evasion.types import Evasion
from trilemma.spec import Spec


class Fgsm(Spec):
    """The fast gradient sign method (Goodfellow et al., 2015).

    Attributes:
        random_start: Start at a random point of the ball (Wong et al., 2020).
    """

    kind: Literal["fgsm"] = "fgsm"
    random_start: bool = False

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        return "FGSM random start" if self.random_start else "FGSM"

    def make(self) -> Evasion:
        """Returns the attack."""
        return partial(fgsm, random_start=self.random_start)


class Pgd(Spec):
    """Projected gradient descent (Madry et al., 2018).

    Attributes:
        steps: Steps per restart.
        restarts: Random starts; the worst image over all of them counts.
        step_size: Length of a step over the radius; None for 2.5 / steps.
        loss: What is climbed: "cross_entropy" or "margin".
    """

    kind: Literal["pgd"] = "pgd"
    steps: int = Field(default=20, ge=1)
    restarts: int = Field(default=1, ge=1)
    step_size: float | None = Field(default=None, gt=0)
    loss: LossName = "cross_entropy"

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        times = f"x{self.restarts}" if self.restarts > 1 else ""
        step = "" if self.step_size is None else f" step {self.step_size:g}"
        return f"PGD-{self.steps}{times}{step}{' margin' if self.loss == 'margin' else ''}"

    def make(self) -> Evasion:
        """Returns the attack."""
        return partial(pgd, steps=self.steps, step_size=self.step_size, restarts=self.restarts, loss=self.loss)


EvasionSpec = Annotated[Fgsm | Pgd, Field(discriminator="kind")]
