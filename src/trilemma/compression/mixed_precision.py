"""How many bits each layer's weights get, by what few bits of it do to the answers, under a budget of bytes.

Layers differ: the first and the last of a network usually need more (Dong et al. 2019). What a layer needs is measured:
its weights alone are stored in few bits, and the logits compared. Layers then get more bits in the order of what a byte
buys, until the budget is spent.
"""

import copy

import torch
from torch import Tensor, nn

from trilemma.compression.stored_weights import Bits, store
from trilemma.models.classifier import Classifier

#: What a layer may be given.
CHOICES: tuple[Bits, ...] = (4, 8, 16)
_BATCH = 64


def bits_by_sensitivity(
    classifier: Classifier, names: list[str], x_NCHW: Tensor, budget_bytes: int, group_size: int
) -> dict[str, Bits]:
    """Returns the bits of each weight: as little harm as the budget allows, one upgrade after the other.

    Args:
        classifier: The network in evaluation mode.
        names: Of the weights.
        x_NCHW: Images whose logits tell the harm.
        budget_bytes: For levels and scales of these weights together.
        group_size: For 4 bits.

    Raises:
        ValueError: If the least that is possible is more than the budget, or there is no image.
    """
    if len(x_NCHW) == 0:
        raise ValueError("Mixed precision needs at least one image to see what few bits do to the answers.")
    sizes = {name: _sizes(classifier.get_parameter(name), group_size) for name in names}
    # Scales and a group that is filled up can make 4 bits the larger of two.
    chosen: dict[str, Bits] = {name: min(CHOICES, key=lambda bits: (of[bits], -bits)) for name, of in sizes.items()}
    spent = sum(sizes[name][bits] for name, bits in chosen.items())
    if spent > budget_bytes:
        raise ValueError(f"The fewest bits for every weight take {spent} bytes, and the budget is {budget_bytes}.")
    exact_NK, tried = _logits(classifier, x_NCHW), copy.deepcopy(classifier)
    harm = {name: _harm(tried, name, x_NCHW, exact_NK, group_size) for name in names}
    while True:
        upgrades = []
        for position, name in enumerate(names):
            for better in CHOICES:
                more = sizes[name][better] - sizes[name][chosen[name]]
                gain = harm[name][chosen[name]] - harm[name][better]
                if more > 0 and gain > 0 and spent + more <= budget_bytes:
                    upgrades.append((gain / more, -position, name, better, more))
        if not upgrades:
            return chosen
        _, _, name, better, more = max(upgrades)
        chosen[name], spent = better, spent + more


def _sizes(weight: Tensor, group_size: int) -> dict[Bits, int]:
    return {bits: store(weight, bits, group_size if bits == 4 else None).num_bytes for bits in CHOICES}


@torch.no_grad()
def _harm(tried: Classifier, name: str, x_NCHW: Tensor, exact_NK: Tensor, group_size: int) -> dict[Bits, float]:
    """Returns the mean squared change of the logits when one weight is stored in few bits; puts the weight back."""
    weight, found = tried.get_parameter(name), {}
    exact = weight.clone()
    for bits in CHOICES:
        weight.copy_(store(exact, bits, group_size if bits == 4 else None).weight())
        found[bits] = float((_logits(tried, x_NCHW) - exact_NK).double().square().mean())
    weight.copy_(exact)
    return found


@torch.no_grad()
def _logits(classifier: nn.Module, x_NCHW: Tensor) -> Tensor:
    device = next(classifier.parameters()).device
    return torch.cat([classifier(batch.to(device)).cpu() for batch in x_NCHW.split(_BATCH)])
