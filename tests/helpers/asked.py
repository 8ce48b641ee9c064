"""Models that are asked and nothing else, and the Adversarial Robustness Toolbox asking one."""

import warnings

import numpy as np
import torch
from torch import Tensor

from trilemma.models.classifier import Classifier


class Asked:
    """Answers like a classifier, from a place without gradients, and writes down what it was asked."""

    def __init__(self, answer):
        self.answer = answer
        self.images: list[Tensor] = []
        self.logits: list[Tensor] = []

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not x_BCHW.requires_grad
        self.images.append(x_BCHW.clone())
        self.logits.append(torch.tensor(self.answer(x_BCHW.clone()).numpy()))
        return self.logits[-1]

    @property
    def count(self) -> int:
        return sum(len(images) for images in self.images)


class Refusing(torch.nn.Module):
    """Takes the place of a network that must not be looked into."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        raise AssertionError("the twin was asked")


def always(label: int, num_classes: int = 3):
    """Answers the same class, whatever it is asked."""
    return lambda x_BCHW: torch.eye(num_classes, dtype=x_BCHW.dtype)[torch.full((len(x_BCHW),), label)]


def toolbox_estimator(classifier: Classifier, shape: tuple[int, int, int]):
    """Returns the toolbox's view of a classifier that only answers, and a list that grows by what it is asked."""
    asked = []

    def predict(x):
        asked.append(len(x))
        with torch.no_grad():
            return classifier(torch.from_numpy(np.asarray(x, dtype=np.float32))).numpy()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the toolbox's own imports
        from art.estimators.classification import BlackBoxClassifierNeuralNetwork

        estimator = BlackBoxClassifierNeuralNetwork(
            predict, shape, classifier.num_classes, channels_first=True, clip_values=(0.0, 1.0)
        )
    return estimator, asked
