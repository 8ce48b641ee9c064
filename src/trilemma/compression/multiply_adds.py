"""What a network costs to run, counted: one multiply-add is one weight times one number, added to a sum."""

import copy

import torch
from torch import Tensor, nn

from trilemma.models.classifier import Classifier


def multiply_adds(classifier: Classifier, image_shape: tuple[int, int, int]) -> int:
    """Returns the multiply-adds of one image through all 2-D convolutions and linear layers, subclasses included.

    A convolution costs output positions x outputs x (inputs / groups) x kernel, padding counted like pixels; a linear
    layer outputs x inputs for each row. A layer that is called twice counts twice. Biases, normalisations,
    activations, pooling, products of two activations (attention) and operations that are no layer are not counted, and
    weights that are zero are: a dense kernel multiplies by them too.

    Args:
        classifier: The network; unchanged. It runs once, in evaluation mode, on a grey image.
        image_shape: C, H and W.
    """
    return sum(multiply_adds_by_layer(classifier, image_shape).values())


def multiply_adds_by_layer(classifier: Classifier, image_shape: tuple[int, int, int]) -> dict[str, int]:
    """Returns the multiply-adds of one image by the layer's first name in the classifier, 0 where it is not called."""
    network = copy.deepcopy(classifier).eval()
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    names = {layer: name for name, layer in layers.items()}
    counts = dict.fromkeys(layers, 0)

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        counts[names[layer]] += output.numel() * layer.weight[0].numel()

    for layer in names:
        layer.register_forward_hook(count)
    with torch.no_grad():
        network(torch.full((1, *image_shape), 0.5, device=network.device))
    return counts
