"""A convolution whose weights are standardised, filter by filter: a normalisation that no activation takes part in.

Weight standardisation (Qiao et al., 2019) in its scaled form (Brock, De and Smith, 2021, "Characterizing signal
propagation to close the performance gap in unnormalized ResNets", equation 4): no image is looked at, neither another
one nor its own, so records stay apart as differential privacy requires, and after training the weights are numbers
like any others, so that what ships is a plain convolution.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

#: 1 / the standard deviation of what ReLU makes of a standard normal number; see `WeightStandardisedConv2d`.
RELU_SCALE = math.sqrt(2 / (1 - 1 / math.pi))

#: The same for Mish, by quadrature.
MISH_SCALE = 1.592025381105053

#: Added to a filter's sum of squares, which is about 2 at initialisation.
EPS = 1e-4


class Centred(NamedTuple):
    """Each filter without its mean, and what standardising it takes; weights that are exactly 0 are not there.

    Attributes:
        weight_MCHW: The weights less the mean of their filter; 0 where they were 0.
        present_MCHW: 1 where a weight is not 0, else 0.
        count_M111: Weights of each filter that are not 0, at least 1.
        factor_M111: 1 / sqrt(sum of squares + eps).
    """

    weight_MCHW: Tensor
    present_MCHW: Tensor
    count_M111: Tensor
    factor_M111: Tensor


def centred(weight_MCHW: Tensor) -> Centred:
    """Returns the filters of a convolution without their means."""
    present = (weight_MCHW != 0).to(weight_MCHW.dtype)
    count = present.sum((1, 2, 3), keepdim=True).clamp_min(1)
    # The product keeps the gradient of a weight that is 0 at 0, so that it stays 0 in training.
    mean = (weight_MCHW * present).sum((1, 2, 3), keepdim=True) / count
    rest = (weight_MCHW - mean) * present
    return Centred(rest, present, count, torch.rsqrt(rest.square().sum((1, 2, 3), keepdim=True) + EPS))


class WeightStandardisedConv2d(nn.Conv2d):
    """A convolution with the weights gain * scale * (w - mean) / sqrt(var * fan_in + eps), for each output channel.

    Mean, variance and fan-in are those of one filter, over its weights that are not exactly 0. A weight of 0 counts as
    pruned: it stays 0 and gets no gradient. A filter of zeros is a filter of zeros. So is one with a single weight
    left, which is its own mean.

    Whatever the weights, a filter's squares add up to (gain * scale)^2, and the filter itself adds up to 0. So of
    independent inputs it passes on the variance, times that number, and not the mean; with `scale` = 1 / the
    standard deviation of what the activation makes of a standard normal number, variance 1 before one activation is
    variance 1 before the next.

    Args:
        *args: As of nn.Conv2d.
        scale: See above.
        **kwargs: As of nn.Conv2d.

    Attributes:
        gain: One factor for each output channel, trained; 1 at first.
        weight_rounding: If set, what it returns of the standardised weights is what the convolution computes with;
            gradients pass straight through (Bengio et al., 2013).
    """

    weight_rounding: Callable[[Tensor], Tensor] | None

    def __init__(self, *args, scale: float = RELU_SCALE, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = scale
        self.gain = nn.Parameter(torch.ones_like(self.weight[:, 0, 0, 0]))
        self.weight_rounding = None

    def effective_weight(self) -> Tensor:
        """Returns the standardised weights (M, C / groups, H, W), before any rounding."""
        rest = centred(self.weight)
        return rest.weight_MCHW * rest.factor_M111 * (self.scale * self.gain[:, None, None, None])

    def forward(self, input: Tensor) -> Tensor:
        """Returns the convolution with the standardised, and where that is asked for rounded, weights."""
        return self._conv_forward(input, self._weight_in_use(), self.bias)

    def folded(self) -> nn.Conv2d:
        """Returns a plain convolution with the same outputs, rounding of the weights included."""
        shape = {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
        size = (self.in_channels, self.out_channels, (self.kernel_size[0], self.kernel_size[1]))
        # Made without storage, as the usual initialisation would draw from the global random generator.
        plain = nn.Conv2d(*size, **shape, bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(self._weight_in_use().detach(), self.weight.requires_grad)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return plain.train(self.training)

    def _weight_in_use(self) -> Tensor:
        weight = self.effective_weight()
        if self.weight_rounding is None:
            return weight
        return weight + (self.weight_rounding(weight) - weight).detach()
