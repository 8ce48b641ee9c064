"""What an epsilon is about: two of them can be compared only where this is equal."""

from typing import NamedTuple

from trilemma.privacy.guarantee import Guarantee, Trust, Unit
from trilemma.privacy.noise import noise_source_in_words

#: Unit -> what a guarantee protects, in the words that stand in `Guarantee.in_words` too.
PROTECTED: dict[Unit, str] = {"example": "any one image", "patient": "any one patient", "client": "any one hospital"}

#: Why a training's time and memory are not told.
TIME_IS_SECRET = "they would tell how many hospitals took part, which the guarantee takes for secret"


class Claim(NamedTuple):
    """What an epsilon is about.

    Attributes:
        unit: What is protected.
        delta: Probability with which the bound may fail.
        trust: Who adds the noise.
        num_colluding: Under trust "distributed": how many hospitals may side with the server.
        seeded: Whether the noise came from a seed, and so protects from nobody who knows that.
    """

    unit: Unit
    delta: float
    trust: Trust
    num_colluding: int
    seeded: bool

    @property
    def in_words(self) -> str:
        """Returns "any one patient, δ 1e-05, local noise (seeded)", to follow "for"."""
        colluding = f", {self.num_colluding} colluding" if self.num_colluding else ""
        seeded = " (seeded)" if self.seeded else ""
        return f"{PROTECTED[self.unit]}, δ\u00a0{self.delta:g}, {self.trust} noise{seeded}{colluding}"


def claim_of(guarantee: Guarantee) -> Claim | None:
    """Returns what a guarantee's epsilon is about, or None where nothing may be claimed."""
    if guarantee.epsilon is None or guarantee.delta is None:
        return None
    seeded = guarantee.noise_source != noise_source_in_words("system")  # where nobody said, no more is claimed
    return Claim(guarantee.unit, guarantee.delta, guarantee.trust, guarantee.num_colluding, seeded)
