"""Weights that leave while a federation trains: the server chooses them, and clients keep them at zero."""

import torch
from torch import Tensor, nn

from trilemma.compression.pruning import prunable, smallest_P
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
    return params_P.masked_fill(smallest_P(_as_used(classifier, params_P), prunable(classifier), share), 0.0)


def kept(spec: TrainSpec, classifier: Classifier, params_P: Tensor) -> Tensor | None:
    """Returns which parameters may be other than zero after those given, bool (P,); None where all may."""
    if spec.pruning is None:
        return None
    return (params_P != 0) | ~prunable(classifier)


def _as_used(classifier: Classifier, params_P: Tensor) -> Tensor:
    """Returns the parameters with standardised weights in place of those that they are made of.

    The length of a filter that will be standardised says nothing: magnitudes are compared as the network uses them.
    """
    used = {
        id(layer.weight): layer.effective_weight()
        for layer in classifier.modules()
        if isinstance(layer, WeightStandardisedConv2d)
    }
    trainable: list[nn.Parameter] = [p for p in classifier.parameters() if p.requires_grad]
    with torch.no_grad():
        parts = [used.get(id(p), p).detach().reshape(-1) for p in trainable]
    return torch.cat(parts).to(params_P)
