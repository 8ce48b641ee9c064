"""What an attacker may change: the ball that a perturbed image must stay in."""

from dataclasses import dataclass
from typing import Literal

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class Budget:
    """A ball around every image, within [0, 1].

    Attributes:
        norm: "linf" (largest change of a pixel) or "l2" (Euclidean length over all pixels and channels).
        radius: In pixel units, images in [0, 1]; 0 allows no change.
    """

    norm: Norm
    radius: float

    @property
    def label(self) -> str:
        """Returns a short name for tables, such as "Linf 4/255" or "L2 0.5"."""
        levels = self.radius * 255
        if self.norm == "linf" and self.radius > 0 and abs(levels - round(levels)) < 1e-6:
            return f"Linf {round(levels)}/255"
        return f"{'Linf' if self.norm == 'linf' else 'L2'} {self.radius:g}"


def check_radius(norm: Norm, radius: float) -> None:
    """Raises ValueError for an L-infinity radius beyond 1, at which every image is already allowed."""
    if norm == "linf" and radius > 1:
        raise ValueError(f"radius = {radius:g} is beyond 1: images lie in [0, 1]; write 4 levels of 255 as '4/255'")
