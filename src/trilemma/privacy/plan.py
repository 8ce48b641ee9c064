"""The seam between a study and its privacy: sampler, clipped gradient, noise and event from the same numbers.

Whoever trains asks the plan for each of the four and can neither sample at one rate and account at another nor
divide by a number that the data decide.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trilemma.models.classifier import Classifier
from trilemma.privacy.clipping import ClippedSum, RecordLoss, clipped_gradient_sum
from trilemma.privacy.guarantee import DpEvent


@dataclass(frozen=True)
class PrivacyPlan:
    """DP-SGD for one client (Abadi et al. 2016, Algorithm 1, with Poisson sampling).

    Attributes:
        num_records: The client's published number of records.
        sampling_rate: Probability with which each record joins a step, independently.
        denominator: What the noised sum is divided by: a public constant, not the batch that was drawn.
        clip: Clipping norm of one record's gradient.
        noise_multiplier: Standard deviation of the noise over `clip`.
    """

    num_records: int
    sampling_rate: float
    denominator: float
    clip: float
    noise_multiplier: float

    def sample(self, generator: torch.Generator) -> Tensor:
        """Returns the positions of a Poisson-sampled batch, ascending; it may be empty."""
        return torch.nonzero(torch.rand(self.num_records, generator=generator) < self.sampling_rate).flatten()

    def gradient_sum(self, classifier: Classifier, loss: RecordLoss, x_BVCHW: Tensor, y_B: Tensor) -> ClippedSum:
        """Returns the sum of clipped per-record gradients of a batch."""
        return clipped_gradient_sum(classifier, loss, x_BVCHW, y_B, self.clip)

    def noised_mean(self, sum_P: Tensor, generator: torch.Generator) -> Tensor:
        """Returns (sum + noise) / denominator: all that the optimizer may see of the records."""
        if not self.noise_multiplier:  # 0 times an infinite clip is not a number
            return sum_P / self.denominator
        noise_P = torch.randn(sum_P.shape, generator=generator).to(sum_P.device)
        return (sum_P + noise_P * (self.noise_multiplier * self.clip)) / self.denominator

    def event(self, steps: int) -> DpEvent:
        """Returns what `steps` steps of this plan cost, for the accountant."""
        return DpEvent(noise_multiplier=self.noise_multiplier, sampling_rate=self.sampling_rate, steps=steps)
