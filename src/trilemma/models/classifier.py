"""The image classifier that everything trains, attacks and ships."""

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """A network with its normalisation inside, so that attacks and radii live in pixel units.

    Args:
        module: Maps normalised images (B, C, H, W) to logits (B, K).
        num_classes: K, at least 2.
        mean: Subtracted from pixels in [0, 1]; a public constant, never computed from private images.
        std: Divides the difference; a public constant.
    """

    bounds = (0.0, 1.0)

    def __init__(self, module: nn.Module, num_classes: int, mean: float = 0.5, std: float = 0.25):
        super().__init__()
        self.module = module
        self.num_classes = num_classes
        self.mean = mean
        self.std = std

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns logits (B, K) of images in [0, 1]."""
        return self.module((x_BCHW - self.mean) / self.std)

    @property
    def device(self) -> torch.device:
        """Returns the device of the parameters."""
        return next(self.parameters()).device
