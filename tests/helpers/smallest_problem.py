"""Problems whose nearest adversarial images are known, and one that is not linear at all."""

import torch
from torch import Tensor, nn

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.frozen import frozen
from trilemma.attacks.evasion.smallest import Smallest
from trilemma.models.classifier import Classifier

SHAPE = (1, 6, 6)
#: So small that no image is ever within it: the search goes on to the end and its distances can be looked at.
OUT_OF_REACH = 1e-9


def linear(num_classes: int, seed: int = 0) -> Classifier:
    """Logits that are linear in the image, float64; the true class of a grey image is 0."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(36, num_classes, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(num_classes, 36, generator=generator, dtype=torch.float64))
        layer.bias.copy_(-layer.weight.sum(dim=1) / 2)
        layer.bias[0] += 1.0
    return Classifier(nn.Sequential(nn.Flatten(), layer), num_classes, mean=0.0, std=1.0)


def curved(num_classes: int, seed: int = 0) -> Classifier:
    """A small network with random weights, float64."""
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(36, 24), nn.GELU(), nn.Linear(24, num_classes)]
    return Classifier(nn.Sequential(*layers).double(), num_classes, mean=0.5, std=0.1)


def grey(num_images: int, spread: float = 0.05, seed: int = 1) -> Tensor:
    """Images around mid grey; a spread of 1 and more gives pixels that are exactly 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(num_images, *SHAPE, generator=generator, dtype=torch.float64) * 2 - 1
    return (0.5 + spread * noise).clamp(0, 1)


def answered(classifier: Classifier, x: Tensor) -> Tensor:
    with torch.no_grad():
        return classifier(x).argmax(1)


def linear_distances(classifier: Classifier, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """The distance to the nearest of the hyperplanes, without regard to [0, 1]."""
    weight = classifier.module[1].weight.detach()
    with torch.no_grad():
        logits = classifier(x)
    distances = []
    for k in range(classifier.num_classes):
        gap = (logits.gather(1, y[:, None]).squeeze(1) - logits[:, k]).abs()
        slope = torch.linalg.vector_norm(weight[k] - weight[y], ord=1 if norm == "linf" else 2, dim=1)
        distances.append(torch.where(y == k, torch.inf, gap / slope))
    return torch.stack(distances).amin(0)


def searched(classifier: Classifier, x: Tensor, y: Tensor, norm: str, search) -> Smallest:
    """Runs a search on a budget that is out of reach, so that no image stops early."""
    with frozen(classifier):
        smallest = Smallest(classifier, x, y, Budget(norm, OUT_OF_REACH))
        search(smallest)
    return smallest
