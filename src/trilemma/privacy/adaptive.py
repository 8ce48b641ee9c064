"""A clipping norm that follows a quantile of the norms, at a price in noise that is accounted.

Each step releases two noised sums of the same sample: the clipped sum, and how many norms lay below the clip. The
count is centred, +1/2 for a norm below and -1/2 for one above, so one unit more or less moves it by 1/2 and not by 1.
Both together are one Gaussian mechanism with noise multiplier (z_sum^-2 + (2 z_count)^-2)^(-1/2).

References: Andrew et al. (2021), Algorithm 1 and Theorem 1.
"""

import math
from dataclasses import dataclass

from torch import Tensor

#: The clip stays within this factor of where it started, so that no run of noise can bring it to 0 or infinity.
WIDEST = 1e6

#: Of the logarithm of the clip in one step; only a wild draw of noise over few units gets there.
_LARGEST_CHANGE = 10.0


@dataclass(frozen=True)
class Adaptation:
    """How the clip follows the norms.

    Attributes:
        quantile: Share of the norms that shall lie below the clip.
        learning_rate: Of the logarithm of the clip.
        count_noise: Standard deviation of the noise on the count.
        first_clip: Where the clip starts.
    """

    quantile: float
    learning_rate: float
    count_noise: float
    first_clip: float

    def sum_noise(self, noise_multiplier: float) -> float:
        """Returns the noise multiplier of the clipped sum such that both sums together have `noise_multiplier`.

        Raises:
            ValueError: If the count alone costs more than that.
        """
        left = noise_multiplier**-2 - (2 * self.count_noise) ** -2
        if left <= 0:
            raise ValueError(
                f"privacy.clipping.count_noise {self.count_noise:g} must exceed {noise_multiplier / 2:g}, half the "
                "noise multiplier: the count alone would cost more than the whole step may"
            )
        return left**-0.5

    def moved(self, clip: float, noised_count: float, denominator: float) -> float:
        """Returns the next clip.

        Args:
            clip: The one that the norms were compared with.
            noised_count: Centred, with noise.
            denominator: Expected number of units in the sample: a public number.
        """
        below = noised_count / denominator + 0.5
        change = min(max(-self.learning_rate * (below - self.quantile), -_LARGEST_CHANGE), _LARGEST_CHANGE)
        moved = clip * math.exp(change)
        return min(max(moved, self.first_clip / WIDEST), self.first_clip * WIDEST)


def centred_count(norms_B: Tensor, clip: float) -> float:
    """Returns the norms up to `clip` minus the others, halved; a norm that is no number is one of the others."""
    return float((norms_B <= clip).sum()) - len(norms_B) / 2
