"""The image classifier that everything trains, attacks and ships."""

from collections.abc import Iterator
from contextlib import contextmanager

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
        self._computes_in = torch.float32

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns logits (B, K) of images in [0, 1]."""
        normalised = (x_BCHW - self.mean) / self.std
        if self._computes_in == torch.float32:
            return self.module(normalised)
        with torch.autocast(x_BCHW.device.type, self._computes_in):
            return self.module(normalised).to(x_BCHW.dtype)

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Within the block the network computes in `dtype`; weights, their gradients and the logits stay as they are.

        Args:
            dtype: float32 for what the weights are, or bfloat16: mixed precision (Micikevicius et al. 2018).
        """
        self._computes_in, before = dtype, self._computes_in
        try:
            yield
        finally:
            self._computes_in = before

    @property
    def device(self) -> torch.device:
        """Returns the device of the parameters."""
        return next(self.parameters()).device
