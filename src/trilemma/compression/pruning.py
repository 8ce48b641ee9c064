"""Global magnitude pruning (Han et al., 2015): the smallest weights of the whole network become zero."""

import copy

import torch
from torch import Tensor, nn

from trilemma.compression.folding import fold_weight_standardisation
from trilemma.models.classifier import Classifier


def prune(classifier: Classifier, fraction: float) -> Classifier:
    """Returns a copy in which exactly the requested share of weights is zero, smallest magnitudes first.

    One threshold for all weights of convolutions and linear layers together; biases and normalisation stay.
    Standardised weights are folded first, so that their magnitudes are those that the network computes with. Equal
    magnitudes go in the order of the layers, so the result is always the same. It reads no image.

    Args:
        classifier: The network; unchanged.
        fraction: Share of the weights to set to zero, in [0, 1]; the count is rounded to the nearest integer.

    Raises:
        ValueError: For a share outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"The share of weights to prune must lie in [0, 1], not {fraction}.")
    pruned = copy.deepcopy(classifier)
    fold_weight_standardisation(pruned)
    weights = _weights(pruned)
    if not weights:
        return pruned
    with torch.no_grad():
        magnitudes_P = torch.cat([weight.abs().flatten() for weight in weights])
        keep_P = torch.ones_like(magnitudes_P)
        order_P = torch.sort(magnitudes_P, stable=True).indices
        keep_P[order_P[: round(fraction * len(order_P))]] = 0
        for weight, keep in zip(weights, keep_P.split([weight.numel() for weight in weights]), strict=True):
            weight.masked_fill_(keep.reshape(weight.shape) == 0, 0.0)
    return pruned


def sparsity(classifier: Classifier) -> float:
    """Returns the share of convolution and linear weights that are exactly zero, as achieved; 0 without any."""
    weights = _weights(classifier)
    total = sum(weight.numel() for weight in weights)
    return sum(int((weight == 0).sum()) for weight in weights) / total if total else 0.0


def _weights(classifier: Classifier) -> list[Tensor]:
    """Returns every convolution and linear weight once, in the order of the network."""
    layers = [module for module in classifier.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return list({id(layer.weight): layer.weight for layer in layers}.values())
