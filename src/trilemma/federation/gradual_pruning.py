"""Weights that leave while a federation trains: the server chooses them, and clients keep them at zero."""

import torch
from torch import Tensor, nn

from trilemma.compression.pruning import has_standardised, layer_adaptive, prunable, smallest_P
from trilemma.federation.specs import TrainSpec
from trilemma.models.classifier import Classifier
from trilemma.models.vector import set_params
from trilemma.models.weight_standardisation import WeightStandardisedConv2d


def pruned(spec: TrainSpec, classifier: Classifier, params_P: Tensor, rounds_done: int) -> Tensor:
    """Returns a round's parameters with the share of weights at zero that the schedule asks for.

    Args:
        spec: The training.
        classifier: The workspace; it takes the parameters.
        params_P: Of the server's model after the round.
        rounds_done: The round included.
    """
    if spec.pruning is None:
        return params_P
    set_params(classifier, params_P)
    share = spec.pruning.share(rounds_done, spec.rounds)
    return params_P.masked_fill(smallest_P(_scores(classifier, params_P), prunable(classifier), share), 0.0)


def kept(spec: TrainSpec, classifier: Classifier, params_P: Tensor) -> Tensor | None:
    """Returns which parameters may be other than zero after those given, bool (P,); None where all may."""
    if spec.pruning is None:
        return None
    return (params_P != 0) | ~prunable(classifier)


def _scores(classifier: Classifier, params_P: Tensor) -> Tensor:
    """Returns what tells the least of the parameters: themselves, or where weights are standardised LAMP's scores.

    The length of a filter that will be standardised says nothing, and that of a standardised one only how many weights
    it has: by magnitude alone the large layers would vanish.
    """
    if not has_standardised(classifier):
        return params_P
    layers = [layer for layer in classifier.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        scores = {id(layer.weight): layer_adaptive(_as_used(layer)) for layer in layers}
        trainable = [p for p in classifier.parameters() if p.requires_grad]
        return torch.cat([scores.get(id(p), p).detach().reshape(-1) for p in trainable]).to(params_P)


def _as_used(layer: nn.Conv2d | nn.Linear) -> Tensor:
    return layer.effective_weight() if isinstance(layer, WeightStandardisedConv2d) else layer.weight
