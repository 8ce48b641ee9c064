"""A problem that a small network learns in a second: noisy images without, with flat and with upright stripes."""

import numpy as np
import torch

from trilemma.data.records import Records
from trilemma.models.classifier import Classifier
from trilemma.randomness import generator


def stripes(num_images: int, *, num_classes: int = 3, size: int = 28, channels: int = 1, seed: int = 0) -> Records:
    """At most three classes, two images per patient, grey levels of 8 bits."""
    g = generator(seed, "stripes")
    labels_N = torch.randint(num_classes, (num_images,), generator=g)
    x = 0.5 + 0.08 * torch.randn(num_images, channels, size, size, generator=g)
    wave = torch.sin(torch.arange(size) * torch.pi / 2 + 0.5).expand(size, size)
    x[labels_N == 1] += 0.2 * wave.T
    x[labels_N == 2] += 0.2 * wave
    images = (x.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    names = np.array([str(index) for index in range(num_images)])
    return Records(images, labels_N.numpy(), np.arange(num_images) // 2, np.zeros(num_images, dtype=np.int64), names)


def trained(classifier: Classifier, records: Records, *, steps: int = 30, learning_rate: float = 0.003) -> Classifier:
    """Trains in place and returns the classifier in evaluation mode."""
    optimiser = torch.optim.Adam(classifier.parameters(), learning_rate)
    classifier.train()
    for step in range(steps):
        start = step * 32 % (len(records) - 32)
        index = slice(start, start + 32)
        loss = torch.nn.functional.cross_entropy(classifier(records.x(index)), records.y(index))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return classifier.eval()
