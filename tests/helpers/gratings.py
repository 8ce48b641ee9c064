"""A problem of any number of classes and a small network that was trained under attack: gratings in noise."""

import copy
import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.fgsm import fgsm
from trilemma.models.classifier import Classifier
from trilemma.randomness import global_seed


def gratings(num_images: int, *, num_classes: int, size: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns images (N, 1, size, size) in [0, 1] and labels: class k is a grating at the angle k pi / K."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(num_images) % num_classes
    angle = y[:, None, None] * math.pi / num_classes
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    wave = torch.sin((row * angle.cos() + column * angle.sin()) * 1.3 + 6.3 * torch.rand(num_images, 1, 1, generator=g))
    noise = torch.randn(num_images, 1, size, size, generator=g)
    return (0.5 + 0.12 * wave[:, None] + 0.1 * noise).clamp(0, 1), y


def hardened(num_classes: int, *, steps: int = 150, radius: float = 8 / 255) -> Classifier:
    """Returns a small network after adversarial training on gratings, in evaluation mode; every call a new one.

    Args:
        num_classes: K.
        steps: Training steps.
        radius: Of the attack in training; 0 trains without one.
    """
    return copy.deepcopy(_hardened(num_classes, steps, radius))


@functools.cache
def _hardened(num_classes: int, steps: int, radius: float) -> Classifier:
    g = torch.Generator().manual_seed(1)
    x, y = gratings(1280, num_classes=num_classes, seed=1)
    with global_seed(1, "hardened"):
        layers = [nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten()]
        classifier = Classifier(nn.Sequential(*layers, nn.Linear(128, num_classes)), num_classes)
    optimiser = torch.optim.Adam(classifier.parameters(), 0.005)
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,), generator=g)
        x_adv = fgsm(classifier, x[chosen], y[chosen], Budget("linf", radius), g, random_start=True)
        optimiser.zero_grad()
        F.cross_entropy(classifier(x_adv), y[chosen]).backward()
        optimiser.step()
    return classifier.eval()


def disturbed(classifier: Classifier, *, amount: float, seed: int = 0) -> Classifier:
    """Returns a copy with noise on its weights: near enough for images to transfer, far enough to differ."""
    g = torch.Generator().manual_seed(seed)
    copied = copy.deepcopy(classifier)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter += amount * parameter.abs().mean() * torch.randn(parameter.shape, generator=g)
    return copied
