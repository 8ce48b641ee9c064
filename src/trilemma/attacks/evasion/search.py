"""How far an attack has come with every image of a batch: the worst found so far, and which are still fought."""

import torch
from torch import Tensor

from trilemma.attacks.evasion.losses import RecordLoss
from trilemma.attacks.evasion.types import Oracle


class Standing:
    """The worst image found for every record, and which records still stand.

    Worst, for each record by itself: one that the model errs on before one that it does not, then the highest loss. The
    clean image competes too. Where `stop` is set, a record is broken, and out of the search, as soon as the model
    that ships errs on one of its images: the twin's word is not enough, for the two differ by a little.

    An attack keeps the positions of the images that it works on and hands in every image that it has logits of:

        index_M = standing.active()
        x_MCHW = start_BCHW[index_M]
        for ...:
            logits_MK, gradient_MCHW = logits_and_gradient(classifier, x_MCHW, ...)
            stay_M = standing.offer(index_M, x_MCHW, logits_MK)

    Random numbers have to be drawn for the whole batch and then indexed, so that no record's result depends on which
    others are still standing.

    Attributes:
        y_B: True labels.
        loss: (logits_BK, y_B) -> loss_B; what is climbed, or what orders what was found.
        worst_BCHW: The worst images.
        broken_B: Which records the model errs on.
        loss_B: The loss at the worst images.
    """

    def __init__(
        self,
        classifier: Oracle,
        x_BCHW: Tensor,
        y_B: Tensor,
        loss: RecordLoss,
        *,
        answers: Oracle | None = None,
        stop: bool = True,
    ):
        """Judges the clean images, by one forward pass; call it within `frozen`.

        Args:
            classifier: The twin, or any model whose logits will be handed in.
            x_BCHW: Clean images in [0, 1].
            y_B: True labels.
            loss: (logits_BK, y_B) -> loss_B; orders images of a record that are equally right or wrong.
            answers: The model that ships; None where that is the classifier.
            stop: Whether broken records leave; without it the search goes on for the highest loss.
        """
        self._classifier = classifier
        self.y_B = y_B
        self.loss = loss
        self._answers = answers
        self._stop = stop
        self.worst_BCHW = x_BCHW.clone()
        self.broken_B = torch.zeros_like(y_B, dtype=torch.bool)
        self.loss_B = torch.full(y_B.shape, -torch.inf, dtype=x_BCHW.dtype, device=x_BCHW.device)
        self.ask(torch.arange(len(y_B), device=y_B.device), x_BCHW)

    def active(self) -> Tensor:
        """Returns the positions of the records to work on, ascending."""
        if not self._stop:
            return torch.arange(len(self.broken_B), device=self.broken_B.device)
        return (~self.broken_B).nonzero().squeeze(1)

    def ask(self, index_M: Tensor, x_MCHW: Tensor) -> Tensor:
        """Offers images after one forward pass for their logits; see `offer`."""
        if not len(index_M):
            return torch.ones_like(index_M, dtype=torch.bool)
        with torch.no_grad():
            return self.offer(index_M, x_MCHW, self._classifier(x_MCHW))

    def offer(self, index_M: Tensor, x_MCHW: Tensor, logits_MK: Tensor) -> Tensor:
        """Keeps the images that are worse than what was found before.

        Args:
            index_M: Positions of the images' records in the batch, none twice.
            x_MCHW: The images, one for each.
            logits_MK: The classifier's logits on them.

        Returns:
            stay_M: Which of the records the attack should go on with.
        """
        y_M = self.y_B[index_M]
        # A loss that is not a number must neither win nor, on the clean image, be unbeatable.
        loss_M = self.loss(logits_MK, y_M).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        broken_M = self._confirmed(x_MCHW, y_M, errs(logits_MK, y_M))
        before_M = self.broken_B[index_M]
        better_M = (broken_M & ~before_M) | ((broken_M == before_M) & (loss_M > self.loss_B[index_M]))
        if better_M.any():
            better_L = index_M[better_M]
            self.worst_BCHW[better_L] = x_MCHW[better_M].detach()
            self.loss_B[better_L] = loss_M[better_M]
            self.broken_B[better_L] = broken_M[better_M]
        return ~(broken_M | before_M) if self._stop else torch.ones_like(broken_M)

    def _confirmed(self, x_MCHW: Tensor, y_M: Tensor, wrong_M: Tensor) -> Tensor:
        if self._answers is None or not self._stop or not wrong_M.any():
            return wrong_M
        confirmed_M = wrong_M.clone()
        confirmed_M[wrong_M] = errs(self._answers(x_MCHW[wrong_M]).to(y_M.device), y_M[wrong_M])
        return confirmed_M


def kept(stay_M: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns the rows of some tensors that stay; the tensors themselves where all do."""
    return tensors if bool(stay_M.all()) else tuple(tensor[stay_M] for tensor in tensors)


def errs(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Returns on which records a model errs; an answer with a logit that is not a number is wrong."""
    return (logits_BK.argmax(dim=1) != y_B) | logits_BK.isnan().any(dim=1)
