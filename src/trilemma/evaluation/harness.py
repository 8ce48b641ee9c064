"""The judge of every attack: images from a twin's gradients, answers from the model that ships.

An attack is never its own judge. Whatever it returns is put back into its budget and into [0, 1], and the shipped
model is asked again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.geometry import project
from trilemma.attacks.evasion.types import Access, Evasion, Oracle
from trilemma.data.records import Records
from trilemma.evaluation.intervals import share_interval
from trilemma.evaluation.measurement import Measurement
from trilemma.evaluation.metrics import predictions
from trilemma.models.classifier import Classifier
from trilemma.randomness import generator

#: Images that are asked about together.
BATCH_SIZE = 64

#: Pixels that are attacked together, at most; between 16 and 256 images. Each batch has a generator of its own, so that
#: these numbers are part of the results.
ATTACKED_PIXELS = 2**18


@dataclass(frozen=True)
class Target:
    """A model that ships.

    Attributes:
        key: The artefact's key.
        predict: Images (B, C, H, W) on the CPU -> logits (B, K): the session on the exported file.
        twin: Computes the same with input gradients.
        surrogates: Models from which attacks may transfer: of a compressed model the one it was made from.
    """

    key: str
    predict: Oracle
    twin: Classifier
    surrogates: tuple[Classifier, ...] = ()

    @property
    def access(self) -> Access:
        """Returns what an attacker has beside the twin's gradients."""
        return Access(self.predict, self.surrogates)


class AttackedBatch(NamedTuple):
    """Some test images and what an attack made of them, on the CPU.

    Attributes:
        positions: Where they stand in the test split.
        x_BCHW: The clean images.
        x_adv_BCHW: The attack's images, not yet judged.
    """

    positions: slice
    x_BCHW: Tensor
    x_adv_BCHW: Tensor


def attacked_batches(
    twin: Classifier, evasion: Evasion, budget: Budget, test: Records, seed: int
) -> Iterator[AttackedBatch]:
    """Yields the test split in batches under an attack; the randomness depends on the seed and the position only."""
    size = attacked_together(test)
    for start in range(0, len(test), size):
        positions = slice(start, min(start + size, len(test)))
        x_BCHW = test.x(positions)
        x, y_B = x_BCHW.to(twin.device), test.y(positions).to(twin.device)
        x_adv_BCHW = evasion(twin, x, y_B, budget, generator(seed, "attack", start))
        yield AttackedBatch(positions, x_BCHW, x_adv_BCHW.detach().to("cpu"))


def attacked_together(test: Records) -> int:
    """Returns how many images are attacked together."""
    return max(16, min(256, ATTACKED_PIXELS // max(1, test.images_NCHW[:1].size)))


def attack_images(twin: Classifier, evasion: Evasion, budget: Budget, test: Records, seed: int) -> Tensor:
    """Returns the judged images of the whole split, (N, C, H, W) on the CPU; for a gallery, use few records."""
    batches = attacked_batches(twin, evasion, budget, test, seed)
    parts = [legal(batch.x_adv_BCHW, batch.x_BCHW, budget) for batch in batches]
    return torch.cat(parts) if parts else test.x()


def attacked_logits(
    twin: Classifier, targets: Sequence[Target], evasion: Evasion, budget: Budget, test: Records, seed: int
) -> list[np.ndarray]:
    """Returns the logits (N, K) of every target on images that were made once, on `twin`.

    With `targets=[Target(..., twin)]` this is the white-box attack, with other targets its transfer. Images are held
    one batch at a time.
    """
    logits: list[list[np.ndarray]] = [[] for _ in targets]
    for batch in attacked_batches(twin, evasion, budget, test, seed):
        for parts, target in zip(logits, targets, strict=True):
            parts.append(judge(target, batch.x_adv_BCHW, batch.x_BCHW, budget))
    return [_joined(parts, target.twin) for parts, target in zip(logits, targets, strict=True)]


def clean_logits(target: Target, test: Records) -> np.ndarray:
    """Returns the logits (N, K) of the shipped model on the test images."""
    starts = range(0, len(test), BATCH_SIZE)
    parts = [_numpy(target.predict(test.x(slice(start, start + BATCH_SIZE)))) for start in starts]
    return _joined(parts, target.twin)


def judge(target: Target, x_adv_BCHW: Tensor, x_BCHW: Tensor, budget: Budget) -> np.ndarray:
    """Returns the shipped model's logits (B, K) on an attack's images after they were made legal."""
    return _numpy(target.predict(legal(x_adv_BCHW, x_BCHW, budget)))


def legal(x_adv_BCHW: Tensor, x_BCHW: Tensor, budget: Budget) -> Tensor:
    """Returns images within the budget and [0, 1]; one with a non-finite pixel or at radius 0 is the clean one."""
    if budget.radius == 0:
        return x_BCHW.clone()
    finite_B = torch.isfinite(x_adv_BCHW).flatten(1).all(1)
    x_adv_BCHW = torch.where(finite_B[:, None, None, None], x_adv_BCHW.to(x_BCHW), x_BCHW)
    return project(x_adv_BCHW, x_BCHW, budget)


def agreement_measurements(target: Target, logits_NK: np.ndarray, test: Records) -> list[Measurement]:
    """Returns how well the twin stands for the shipped model on clean images.

    An attack on a twin that computes something else says nothing about the model that ships.

    Args:
        target: The model.
        logits_NK: The shipped model's logits on the test split.
        test: The test split.
    """
    if not len(test):
        reason = "there is no test record"
        names = ("twin_logit_difference", "twin_agreement")
        return [Measurement(name, None, status="undefined", reason=reason) for name in names]
    parts = []
    with torch.no_grad():
        for start in range(0, len(test), BATCH_SIZE):
            x_BCHW = test.x(slice(start, start + BATCH_SIZE))
            parts.append(_numpy(target.twin(x_BCHW.to(target.twin.device))))
    twin_NK = np.concatenate(parts)
    same_N = predictions(twin_NK) == predictions(logits_NK)
    low, high = share_interval(same_N, test.units())
    difference = float(np.abs(twin_NK - logits_NK).max())
    if np.isfinite(difference):
        largest = Measurement("twin_logit_difference", difference, n=len(test), unit="coefficient")
    else:
        reason = "the model answers with values that are not finite"
        largest = Measurement(
            "twin_logit_difference", None, n=len(test), unit="coefficient", status="undefined", reason=reason
        )
    return [largest, Measurement("twin_agreement", float(same_N.mean()), low, high, len(test))]


def _joined(parts: list[np.ndarray], twin: Classifier) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros((0, twin.num_classes), dtype=np.float32)


def _numpy(logits_BK: Tensor) -> np.ndarray:
    return logits_BK.detach().to("cpu", torch.float32).numpy()
