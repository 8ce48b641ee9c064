"""Images made from a model alone, for those who may look at no others.

Smooth noise is changed until the model is sure of a class (as in Haroush et al. 2020 and Cai et al. 2020, here without
batch norm's statistics, which most of our networks do not have). They look like nothing, but they reach the layers'
ranges better than noise does. Made from a released model, they cost no privacy.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from trilemma.models.classifier import Classifier

_STEPS = 60
_STEP_SIZE = 0.02
#: Weight of the total variation, which keeps the images smooth.
_SMOOTHNESS = 0.5
_BATCH = 64


def synthetic_images(
    classifier: Classifier, num_images: int, image_shape: tuple[int, int, int], generator: torch.Generator
) -> Tensor:
    """Returns images (N, C, H, W) in [0, 1] that a classifier is sure of, its classes in turn.

    Args:
        classifier: In evaluation mode; unchanged.
        num_images: N.
        image_shape: C, H and W.
        generator: Source of the noise that they start from.
    """
    channels, height, width = image_shape
    coarse = torch.rand(num_images, channels, 7, 7, generator=generator)
    x_NCHW = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    y_N = torch.arange(num_images) % classifier.num_classes
    parts = zip(x_NCHW.split(_BATCH), y_N.split(_BATCH), strict=True)
    return torch.cat([_made_sure(classifier, x.to(classifier.device), y.to(classifier.device)) for x, y in parts])


def _made_sure(classifier: Classifier, x_BCHW: Tensor, y_B: Tensor) -> Tensor:
    """Descends the cross entropy and the total variation by signed steps, which need no scale."""
    for _ in range(_STEPS):
        x_BCHW = x_BCHW.detach().requires_grad_()
        rough = (x_BCHW.diff(dim=2).abs().mean() + x_BCHW.diff(dim=3).abs().mean()) * len(x_BCHW)
        loss = F.cross_entropy(classifier(x_BCHW), y_B, reduction="sum") + _SMOOTHNESS * rough
        (gradient,) = torch.autograd.grad(loss, x_BCHW)
        x_BCHW = (x_BCHW - _STEP_SIZE * gradient.sign()).clamp(0, 1)
    return x_BCHW.detach().cpu()
