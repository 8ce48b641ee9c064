"""Whether a model answers the same question alike: asked again, in another batch, beside another image."""

from typing import NamedTuple

import torch
from torch import Tensor

from trilemma.attacks.evasion.types import Oracle
from trilemma.evaluation.metrics import Floats
from trilemma.randomness import generator

#: Images of a batch in another composition than the usual one.
_OTHER_BATCH = 7
#: Noise that no robust answer may depend on: half a grey level of 8 bits.
_HALF_LEVEL = 0.5 / 255
#: Share of the largest logit that rounding may move, and by how many of a float's last bits it may move the largest.
_ROUNDING, _LAST_BITS = 1e-4, 8


class Repeats(NamedTuple):
    """How far answers to the same images lie apart, each the largest over an image's logits, less their mean.

    Attributes:
        again_M: Asked the same once more.
        regrouped_M: Asked in reversed order and smaller batches.
        beside_M: Asked with the first image of the batch turned into its negative; for that image 0.
        nudged_M: Asked with uniform noise of half a grey level on the images.
        rounding: How far float rounding alone may move a logit.
    """

    again_M: Floats
    regrouped_M: Floats
    beside_M: Floats
    nudged_M: Floats
    rounding: float


def repeated(ask: Oracle, x_MCHW: Tensor, seed: int) -> Repeats:
    """Returns how far a model's answers lie apart.

    Args:
        ask: The model: images on the CPU -> logits.
        x_MCHW: Images, at least one; they are one batch.
        seed: Of the noise.
    """
    noise_MCHW = 2 * torch.rand(x_MCHW.shape, generator=generator(seed, "half a level")) - 1
    asked_MK = ask(x_MCHW)
    first_MK = _centred(asked_MK)
    regrouped_MK = torch.cat([_centred(ask(part)) for part in x_MCHW.flip(0).split(_OTHER_BATCH)]).flip(0)
    nudged_MK = _centred(ask((x_MCHW + _HALF_LEVEL * noise_MCHW).clamp_(0, 1)))
    beside_MK = _centred(ask(torch.cat([1 - x_MCHW[:1], x_MCHW[1:]])))
    beside_MK[:1] = first_MK[:1]
    again_M, regrouped_M, beside_M, nudged_M = (
        (other_MK - first_MK).abs().amax(1).numpy()
        for other_MK in (_centred(ask(x_MCHW)), regrouped_MK, beside_MK, nudged_MK)
    )
    absolute = float(asked_MK.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().max())
    rounding = _ROUNDING * float(first_MK.abs().max()) + _LAST_BITS * torch.finfo(torch.float32).eps * absolute
    return Repeats(again_M, regrouped_M, beside_M, nudged_M, rounding)


def _centred(logits_MK: Tensor) -> Tensor:
    """Returns logits without what all classes of an image have in common, which no answer depends on."""
    finite_MK = logits_MK.detach().to("cpu", torch.float64).nan_to_num(0.0, 0.0, 0.0)
    return finite_MK - finite_MK.mean(dim=1, keepdim=True)
