"""Weights become zero where they are smallest: of the whole network, or of every few in a row."""

import torch
from torch import Tensor, nn

from trilemma.compression.folding import plain_copy
from trilemma.models.classifier import Classifier
from trilemma.models.weight_standardisation import WeightStandardisedConv2d


def prune(classifier: Classifier, fraction: float) -> Classifier:
    """Returns a copy in which exactly the requested share of weights is zero, smallest magnitudes first.

    Global magnitude pruning (Han et al., 2015): one threshold for all weights of convolutions and linear layers
    together; biases and normalisation stay. Standardised weights are folded first, so that their magnitudes are those
    that the network computes with, and compared by `layer_adaptive`: how long they are, their layer's size decides.
    Equal magnitudes go in the order of the layers, so the result is always the same. It reads no image.

    Args:
        classifier: The network; unchanged.
        fraction: Share of the weights to set to zero, in [0, 1]; the count is rounded to the nearest integer.

    Raises:
        ValueError: For a share outside [0, 1].
    """
    pruned = plain_copy(classifier)
    weights = _weights(pruned)
    with torch.no_grad():
        scores = [layer_adaptive(weight) for weight in weights] if has_standardised(classifier) else weights
        weights_P = torch.cat([score.flatten() for score in scores]) if scores else torch.empty(0)
        leaves_P = smallest_P(weights_P, torch.ones_like(weights_P, dtype=torch.bool), fraction)
        for weight, leaves in zip(weights, leaves_P.split([weight.numel() for weight in weights]), strict=True):
            weight.masked_fill_(leaves.reshape(weight.shape), 0.0)
    return pruned


def layer_adaptive(weight: Tensor) -> Tensor:
    """Returns a score for each weight of a layer: its square over the squares of all that are not smaller.

    The smallest scores of a network are what its answers need least, whatever the scale of each layer; the largest
    weight of a layer scores 1, so that no layer vanishes before the others. Lee et al. (2021), equation 5 (LAMP).
    """
    squares_n, order_n = weight.detach().double().square().flatten().sort(stable=True)
    not_smaller_n = squares_n.flip(0).cumsum(0).flip(0)
    scores_n = torch.empty_like(squares_n)
    scores_n[order_n] = torch.where(not_smaller_n > 0, squares_n / not_smaller_n, 0.0)
    return scores_n.reshape(weight.shape).to(weight.dtype)


def has_standardised(classifier: Classifier) -> bool:
    """Returns whether a network has convolutions whose weights are standardised."""
    return any(isinstance(layer, WeightStandardisedConv2d) for layer in classifier.modules())


def smallest_P(params_P: Tensor, prunable_P: Tensor, fraction: float) -> Tensor:
    """Returns which entries of a vector `prune` would set to zero, bool (P,).

    They are the smallest magnitudes of the prunable entries, the earlier of equal ones first; NaN counts as the
    largest of all.

    Args:
        params_P: The numbers, such as `models.vector.get_params` gives.
        prunable_P: Which of them may leave, bool, such as `prunable` gives.
        fraction: Share of the prunable entries, in [0, 1]; the count is rounded to the nearest integer.

    Raises:
        ValueError: For a share outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"The share of weights to prune must lie in [0, 1], not {fraction}.")
    places = prunable_P.nonzero().squeeze(1)
    order = torch.sort(params_P[places].abs(), stable=True).indices
    leaves_P = torch.zeros_like(prunable_P)
    leaves_P[places[order[: round(fraction * len(order))]]] = True
    return leaves_P


def prunable(classifier: Classifier) -> Tensor:
    """Returns which trainable parameters are convolution or linear weights, bool (P,), in `get_params`'s order.

    Where every such weight is trainable and belongs to one layer, `smallest_P` of the two vectors is what `prune`
    sets to zero.
    """
    weights = {id(weight) for weight in _weights(classifier)}
    parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    marks = [torch.full((p.numel(),), id(p) in weights, device=p.device) for p in parameters]
    return torch.cat(marks) if marks else torch.zeros(0, dtype=torch.bool)


def prune_n_of_m(classifier: Classifier, n: int, m: int) -> Classifier:
    """Returns a copy in which of every `m` weights in a row the `n` of the largest magnitude stay (Zhou et al., 2021).

    A filter's weights stand in a row with its input channels innermost: all inputs of the first kernel position, then
    all of the next. Where the inputs are a multiple of `m`, the rows of `m` run over input channels, which is the
    layout of NVIDIA's 2:4 sparse tensor cores. Equal magnitudes: the earlier stay. What is left at a filter's end,
    shorter than `m`, keeps its `n` largest, or all where it has no more. Every convolution and linear layer is
    treated alike, the first and the last included, as `prune` does: a pattern is only worth something where it holds
    everywhere. It reads no image. A CPU gains no time by it.

    Args:
        classifier: The network; unchanged.
        n: Weights that stay of each `m`, at least 1.
        m: Length of a row, at least `n`.

    Raises:
        ValueError: For an impossible pattern.
    """
    if not 1 <= n <= m:
        raise ValueError(f"Of every m = {m} weights, n = {n} cannot stay: n must lie between 1 and m.")
    pruned = plain_copy(classifier)
    with torch.no_grad():
        for weight in _weights(pruned):
            inner_last = weight.movedim(1, -1)
            rows = inner_last.flatten(1)
            rest = -rows.shape[1] % m
            # What fills up the last row loses against every weight, and stands after them all.
            magnitudes = nn.functional.pad(rows.abs(), (0, rest), value=-1.0).reshape(len(rows), -1, m)
            order = torch.sort(magnitudes, dim=-1, descending=True, stable=True).indices
            stays = torch.zeros_like(magnitudes, dtype=torch.bool).scatter_(-1, order[..., :n], True)
            stays = stays.flatten(1)[:, : rows.shape[1]].reshape(inner_last.shape).movedim(-1, 1)
            weight.masked_fill_(~stays, 0.0)
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
