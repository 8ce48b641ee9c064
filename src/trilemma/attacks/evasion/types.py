"""The signature that every inference-time attack has."""

from collections.abc import Callable

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.models.classifier import Classifier

#: (classifier, x_BCHW in [0, 1], true labels y_B, budget, generator) -> perturbed x_BCHW.
#: It must not touch parameter gradients, hooks or batch-norm state; it is never its own judge.
Evasion = Callable[[Classifier, Tensor, Tensor, Budget, torch.Generator], Tensor]
