"""Folding of normalisations into convolutions, so that inference has one operation for both.

A convolution with standardised weights is a plain one with other weights, and is replaced by it. Batch normalisation
goes into the convolution before it: in evaluation mode it is a scale and a shift per channel, and conv(x) * s + t =
conv'(x) with weights w * s and bias b * s + t (Jacob et al., 2018, section 3.2). The folded norm stays in place as an
exact identity, so that a network has the same state whether or not its layers could be folded; the export leaves
identities out.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trilemma.models.classifier import Classifier
from trilemma.models.weight_standardisation import WeightStandardisedConv2d

#: Largest change of a logit, relative to the largest logit, that float rounding may cause.
_TOLERANCE = 1e-4


class _Pair(NamedTuple):
    conv: nn.Conv2d
    norm: nn.BatchNorm2d


def plain_copy(classifier: Classifier) -> Classifier:
    """Returns a copy whose convolutions are plain ones: what every compression starts from."""
    copied = copy.deepcopy(classifier)
    fold_weight_standardisation(copied)
    return copied


def fold_weight_standardisation(classifier: Classifier) -> int:
    """Replaces every convolution with standardised weights by the plain one that it is, in place.

    Args:
        classifier: The network; changed in place. Its state then names no gains any more.

    Returns:
        The number of replaced layers; a layer that stands in two places is one, and stays one.
    """
    replacements: dict[int, nn.Conv2d] = {}
    for name, layer in list(classifier.named_modules(remove_duplicate=False)):
        if not isinstance(layer, WeightStandardisedConv2d):
            continue
        if id(layer) not in replacements:
            replacements[id(layer)] = layer.folded()
        parent, _, attribute = name.rpartition(".")
        setattr(classifier.get_submodule(parent), attribute, replacements[id(layer)])
    return len(replacements)


def fold_batch_norms(classifier: Classifier, x_BCHW: Tensor) -> int:
    """Folds every batch norm that directly follows a convolution, in place.

    A pair is found by running the network and kept only where the logits stay what they were: where a convolution's
    output is also read by another layer, folding would change the function, and the pair is left alone.

    Args:
        classifier: A network in evaluation mode; changed in place. Every convolution that is folded gets a bias.
        x_BCHW: One or more images to compare logits on.

    Returns:
        The number of folded layers.
    """
    num_folded = 0
    with torch.no_grad():
        logits_BK = classifier(x_BCHW)
        for pair in _pairs(classifier, x_BCHW):
            before = [None if tensor is None else tensor.clone() for tensor in _tensors(pair)]
            _fold(pair)
            change = (classifier(x_BCHW) - logits_BK).abs().max()
            if change <= _TOLERANCE * logits_BK.abs().max():
                num_folded += 1
            else:
                _restore(pair, before)
    return num_folded


def is_identity(norm: nn.Module) -> bool:
    """Returns whether a layer is a batch norm that was folded away and now passes its input through."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        return False
    plain = norm.weight is None or bool((norm.weight == 1).all() and (norm.bias == 0).all())
    return plain and bool((norm.running_mean == 0).all() and (norm.running_var == 1 - norm.eps).all())


def _pairs(classifier: Classifier, x_BCHW: Tensor) -> list[_Pair]:
    """Returns the batch norms whose input is a convolution's output, where each of the two is called once."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((module, inputs[0], output))  # the tensors are kept, so that no identity is used twice

    watched = [module for module in classifier.modules() if type(module) in (nn.Conv2d, nn.BatchNorm2d)]
    handles = [module.register_forward_hook(record) for module in watched]
    try:
        classifier(x_BCHW[:1])
    finally:
        for handle in handles:
            handle.remove()
    times = {id(module): sum(other is module for other, _, _ in calls) for module, _, _ in calls}
    made_by = {id(output): module for module, _, output in calls if type(module) is nn.Conv2d}
    pairs = []
    for norm, read, _ in calls:
        conv = made_by.get(id(read))
        if type(norm) is not nn.BatchNorm2d or type(conv) is not nn.Conv2d or norm.running_mean is None:
            continue
        if times[id(norm)] == times[id(conv)] == 1:
            pairs.append(_Pair(conv, norm))
    return pairs


def _tensors(pair: _Pair) -> list[Tensor | None]:
    conv, norm = pair
    return [conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]


def _fold(pair: _Pair) -> None:
    conv, norm = pair
    assert norm.running_mean is not None and norm.running_var is not None
    scale_C = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale_C = scale_C * norm.weight
    bias_C = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias_C = bias_C * scale_C
    if norm.bias is not None:
        bias_C = bias_C + norm.bias
    conv.weight.copy_(conv.weight * scale_C[:, None, None, None])
    conv.bias = nn.Parameter(bias_C)
    norm.running_mean.zero_()
    norm.running_var.fill_(1).sub_(norm.eps)
    if norm.weight is not None:
        norm.weight.fill_(1)
        norm.bias.zero_()


def _restore(pair: _Pair, before: list[Tensor | None]) -> None:
    conv, _ = pair
    if before[1] is None:
        conv.bias = None
    for tensor, value in zip(_tensors(pair), before, strict=True):
        if tensor is not None and value is not None:
            tensor.copy_(value)
