"""The seam between a study and its privacy: sampler, clipped sum, noise and event from the same numbers.

Whoever trains asks the plan for each of the four and can neither sample at one rate and account at another nor
divide by a number that the data decide. A client's plan speaks of its images or patients and of their gradients; a
trusted server's plan speaks of clients and of their whole updates. Everything else is the same.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trilemma.models.classifier import Classifier
from trilemma.privacy.adaptive import Adaptation, centred_count
from trilemma.privacy.bookkeeping import clipped_gradient_sum
from trilemma.privacy.clipping import ClippedSum, RecordLoss
from trilemma.privacy.clipping_rules import Clipper, clipped_row_sum, total_norms
from trilemma.privacy.guarantee import DpEvent
from trilemma.privacy.noise import AddNoise, NoiseKind, poisson_sample, seeded_noise, system_noise


@dataclass(frozen=True)
class PrivacyPlan:
    """The Poisson-sampled Gaussian mechanism on clipped sums (Abadi et al. 2016, Algorithm 1; McMahan et al. 2018).

    Attributes:
        num_units: How many there are to be protected; published.
        sampling_rate: Probability with which each unit joins a step, independently.
        denominator: What the noised sum is divided by: a public constant, not the batch that was drawn.
        clipper: Bounds what one unit contributes. Its `clip` is the first one where the clip adapts.
        noise_multiplier: What is accounted: standard deviation of all the noise of a step over the sensitivity.
        adaptation: How the clip moves, or None where it stays.
        num_honest: Who adds noise: of that many participants each adds a share, so that they reach
            `noise_multiplier` together. 1: all the noise is added here.
        noise: Where noise and samples come from.
    """

    num_units: int
    sampling_rate: float
    denominator: float
    clipper: Clipper
    noise_multiplier: float
    adaptation: Adaptation | None = None
    num_honest: int = 1
    noise: NoiseKind = "seeded"

    def sample(self, generator: np.random.Generator) -> Tensor:
        """Returns the numbers of Poisson-sampled units, ascending; there may be none."""
        return poisson_sample(self.num_units, self.sampling_rate, generator if self.noise == "seeded" else None)

    def noise_source(self, generator: np.random.Generator) -> AddNoise:
        """Returns what adds noise: drawn from the generator, or from the operating system, as the plan says."""
        return seeded_noise(generator) if self.noise == "seeded" else system_noise()

    def gradient_sum(
        self, classifier: Classifier, loss: RecordLoss, x_BVCHW: Tensor, y_B: Tensor, clip: float | None = None
    ) -> ClippedSum:
        """Returns the sum of clipped gradients, one of each unit, at the current `clip` (None: the first one)."""
        return clipped_gradient_sum(classifier, loss, x_BVCHW, y_B, self._clipper(clip))

    def update_sum(
        self, updates_NP: Tensor, classifier: Classifier, clip: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the sum of clipped updates, one of each sampled client, and their norms before, shape (N,)."""
        clipper = self._clipper(clip)
        sum_P, norms_NG = clipped_row_sum(updates_NP, clipper.group_sizes(classifier), clipper)
        return sum_P, total_norms(norms_NG)

    def clipped_alone(self, gradient_P: Tensor, loss: Tensor, classifier: Classifier, clip: float | None) -> ClippedSum:
        """Returns the clipped sum of one unit whose gradient is already known."""
        clipper = self._clipper(clip)
        sum_P, norms_1G = clipped_row_sum(gradient_P[None], clipper.group_sizes(classifier), clipper)
        return ClippedSum(sum_P, total_norms(norms_1G), loss[None], norms_1G)

    def noised_mean(self, sum_P: Tensor, add_noise: AddNoise, clip: float | None = None) -> Tensor:
        """Returns (sum + noise) / denominator: all that anybody else may see of the units' clipped sum.

        Under `num_honest` above 1 the noise is a share, and nobody may see this but a secure sum.
        """
        if not self.noise_multiplier:  # 0 times an infinite clip is not a number
            return sum_P / self.denominator
        deviation = self._sum_noise() * self._clipper(clip).clip / self.num_honest**0.5
        return add_noise(sum_P, deviation) / self.denominator

    def noised_count(self, norms_B: Tensor, add_noise: AddNoise, clip: float | None = None) -> float:
        """Returns the centred count of norms up to the clip, with noise or a share of it; needs `adaptation`."""
        assert self.adaptation is not None
        count = centred_count(norms_B, self._clipper(clip).clip)
        if not self.noise_multiplier:
            return count
        return float(add_noise(torch.tensor([count]), self.adaptation.count_noise / self.num_honest**0.5))

    def event(self, steps: int) -> DpEvent:
        """Returns what `steps` steps of this plan cost, for the accountant."""
        return DpEvent(noise_multiplier=self.noise_multiplier, sampling_rate=self.sampling_rate, steps=steps)

    def _clipper(self, clip: float | None) -> Clipper:
        return self.clipper if clip is None else replace(self.clipper, clip=clip)

    def _sum_noise(self) -> float:
        return self.adaptation.sum_noise(self.noise_multiplier) if self.adaptation else self.noise_multiplier
