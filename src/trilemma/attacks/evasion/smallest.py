"""The nearest image of every record that a model errs on: what attacks without a fixed radius look for."""

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget, Norm
from trilemma.attacks.evasion.geometry import project
from trilemma.attacks.evasion.losses import likeliest_wrong, margin
from trilemma.attacks.evasion.search import errs
from trilemma.attacks.evasion.types import Oracle
from trilemma.models.classifier import Classifier

#: By how much of the clean image's margin a refuted record's boundary moves at least, so that it moves at all.
LEAST_LEAD = 0.01


class Smallest:
    """The nearest image found for every record, and which records still stand.

    A record is broken, and out of the search, as soon as the model that ships errs on an image within the budget.
    Farther images on which the twin errs are kept too: they get nearer as the search goes on.

    Where the twin errs within the budget and the model that ships does not, the twin's boundary lies too near. It is
    moved outwards, for that record alone: from then on the twin errs only where a wrong logit exceeds the true one by
    more than a lead, twice what was not enough. So the attacks look for gaps z_k - z_y - lead >= 0; the lead is 0
    wherever the model that ships has not contradicted.

    Attributes:
        classifier: The twin.
        x_BCHW: Clean images in [0, 1].
        y_B: True labels.
        budget: Within which an image breaks a record.
        nearest_BCHW: The nearest images; the clean ones where none was found.
        distance_B: How far they are from the clean ones, in pixel units; infinite where none counts.
        broken_B: Which records the model that ships errs on within the budget.
        lead_B: By how much a wrong logit has to exceed the true one.
        clean_logits_BK: The twin's logits on the clean images.
    """

    def __init__(
        self, classifier: Classifier, x_BCHW: Tensor, y_B: Tensor, budget: Budget, *, answers: Oracle | None = None
    ):
        """Judges the clean images, by one forward pass; call it within `frozen`.

        Args:
            classifier: The twin.
            x_BCHW: Clean images in [0, 1].
            y_B: True labels.
            budget: Within which an image breaks a record.
            answers: The model that ships; None where that is the classifier.
        """
        self.classifier = classifier
        self.x_BCHW = x_BCHW
        self.y_B = y_B
        self.budget = budget
        self._answers = answers
        with torch.no_grad():
            self.clean_logits_BK = classifier(x_BCHW)
        self.nearest_BCHW = x_BCHW.clone()
        self.distance_B = x_BCHW.new_full(y_B.shape, torch.inf)
        self.broken_B = torch.zeros_like(y_B, dtype=torch.bool)
        self.lead_B = torch.zeros_like(self.clean_logits_BK[:, 0])
        self.offer(torch.arange(len(y_B), device=y_B.device), x_BCHW, self.clean_logits_BK)

    def active(self) -> Tensor:
        """Returns the positions of the records to work on, ascending."""
        return (~self.broken_B).nonzero().squeeze(1)

    def likeliest_wrong(self, num_classes: int | None = None) -> Tensor:
        """Returns the wrong classes of every record, the likeliest on the clean image first, shape (B, T).

        Args:
            num_classes: At most so many; None for all.
        """
        logits_BK = self.clean_logits_BK
        return likeliest_wrong(logits_BK, self.y_B, logits_BK.shape[1] if num_classes is None else num_classes)

    def gaps(self, index_M: Tensor, logits_MK: Tensor) -> Tensor:
        """Returns the largest wrong logit minus the true one and the lead; above 0 the twin errs by enough."""
        return margin(logits_MK, self.y_B[index_M]) - self.lead_B[index_M]

    def ask(self, index_M: Tensor, x_MCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Offers images after one forward pass for their logits; see `offer`."""
        with torch.no_grad():
            return self.offer(index_M, x_MCHW, self.classifier(x_MCHW))

    def offer(self, index_M: Tensor, x_MCHW: Tensor, logits_MK: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps the images that are adversarial and nearer than what was found before.

        Args:
            index_M: Positions of the images' records in the batch, none twice and none broken.
            x_MCHW: The images, one for each, in [0, 1] and at any distance.
            logits_MK: The twin's logits on them.

        Returns:
            stay_M: Which of the records the attack should go on with.
            wrong_M: On which images the twin errs by enough, as far as is known.
        """
        x_MCHW, lead_M = x_MCHW.detach(), self.lead_B[index_M]
        # At a lead of 0 the answer itself decides: of equal logits the first is the answer.
        short_M = (margin(logits_MK, self.y_B[index_M]) <= lead_M) & (lead_M > 0)
        wrong_M = errs(logits_MK, self.y_B[index_M]) & ~short_M
        distance_M = length(x_MCHW - self.x_BCHW[index_M], self.budget.norm)
        inside_M = wrong_M & (distance_M <= self.budget.radius)
        breaks_M = self._confirmed(index_M, x_MCHW, inside_M)
        nearer_M = breaks_M | (wrong_M & (distance_M < self.distance_B[index_M]))
        if nearer_M.any():
            nearer_L = index_M[nearer_M]
            self.nearest_BCHW[nearer_L] = x_MCHW[nearer_M]
            self.distance_B[nearer_L] = distance_M[nearer_M]
            self.broken_B[nearer_L] = breaks_M[nearer_M]
        refuted_M = inside_M & ~breaks_M
        if refuted_M.any():
            self._move_boundary(index_M[refuted_M], logits_MK[refuted_M])
        return ~breaks_M, wrong_M & ~refuted_M

    def images(self) -> Tensor:
        """Returns what was found, moved into the budget where it lies farther away."""
        found_BCHW = project(self.nearest_BCHW, self.x_BCHW, self.budget)
        return torch.where(self.broken_B[:, None, None, None], self.nearest_BCHW, found_BCHW)

    def _confirmed(self, index_M: Tensor, x_MCHW: Tensor, inside_M: Tensor) -> Tensor:
        if self._answers is None or not inside_M.any():
            return inside_M
        confirmed_M = inside_M.clone()
        y_L = self.y_B[index_M[inside_M]]
        with torch.no_grad():
            confirmed_M[inside_M] = errs(self._answers(x_MCHW[inside_M]).to(y_L.device), y_L)
        return confirmed_M

    def _move_boundary(self, index_L: Tensor, logits_LK: Tensor) -> None:
        y_L = self.y_B[index_L]
        least_L = LEAST_LEAD * margin(self.clean_logits_BK[index_L], y_L).abs()
        lead_L = 2 * margin(logits_LK, y_L).clamp(min=0.0) + least_L
        self.lead_B[index_L] = torch.maximum(self.lead_B[index_L], lead_L.nan_to_num(nan=0.0, posinf=0.0))
        self.distance_B[index_L] = torch.inf


def length(delta_BCHW: Tensor, norm: Norm) -> Tensor:
    """Returns the length of each perturbation in a norm, shape (B,)."""
    return torch.linalg.vector_norm(delta_BCHW, ord=torch.inf if norm == "linf" else 2, dim=(1, 2, 3))
