"""The signature that every inference-time attack has, and what an attacker may have beside gradients."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.models.classifier import Classifier

#: (classifier, x_BCHW in [0, 1], true labels y_B, budget, generator) -> perturbed x_BCHW.
#: It must not touch parameter gradients, hooks or batch-norm state; it is never its own judge.
Evasion = Callable[[Classifier, Tensor, Tensor, Budget, torch.Generator], Tensor]

#: Images (B, C, H, W) -> logits (B, K): a model that answers and shows nothing else of itself.
Oracle = Callable[[Tensor], Tensor]


class Access(NamedTuple):
    """What an attacker has beside the gradients of a twin.

    Attributes:
        answers: The model that ships; None where the twin itself ships. Black-box attacks ask it and nothing else, and
            an image counts as broken, and leaves the batch, only when it errs.
        surrogates: Other models whose images may transfer: of a compressed model the one it came from.
    """

    answers: Oracle | None = None
    surrogates: tuple[Classifier, ...] = ()


#: The twin ships itself, and there is no other model.
TWIN_ONLY = Access()
