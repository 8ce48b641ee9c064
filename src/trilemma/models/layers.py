"""What the two residual networks are made of.

Nothing here works in place and nothing branches on values, so that every network runs unchanged under
`torch.func.vmap(grad)` and exports to ONNX.
"""

from typing import Literal

from torch import Tensor, nn

from trilemma.models.weight_standardisation import MISH_SCALE, RELU_SCALE, WeightStandardisedConv2d

NormKind = Literal["group", "weight", "batch", "none"]
ActivationKind = Literal["relu", "mish"]


def num_groups(channels: int, groups: int | None) -> int:
    """Returns `groups`, or where it is None the largest divisor of `channels` up to min(32, channels / 4)."""
    if groups is not None:
        return groups
    return next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)


class Style:
    """The choices that every block of one network shares.

    Args:
        norm: "group", "weight", "batch" or "none".
        groups: Number of groups of a group normalisation; None for `num_groups`'s choice.
        activation: "relu" or "mish".
    """

    def __init__(self, norm: NormKind, groups: int | None, activation: ActivationKind):
        self.norm = norm
        self.groups = groups
        self.activation = activation

    def make_norm(self, channels: int) -> nn.Module:
        """Returns a normalisation of `channels` feature maps, which is nothing where the weights are standardised."""
        if self.norm == "group":
            return nn.GroupNorm(num_groups(channels, self.groups), channels)
        return nn.BatchNorm2d(channels) if self.norm == "batch" else nn.Identity()

    def make_activation(self) -> nn.Module:
        """Returns a nonlinearity."""
        return nn.Mish() if self.activation == "mish" else nn.ReLU()

    def make_conv(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, gain: float = 1.0
    ) -> nn.Conv2d:
        """Returns a convolution with 'same' padding.

        It has a bias only where no normalisation of activations follows, and then He's initialisation, without which
        the signal of a network without normalisation dies out within a few layers.

        Args:
            in_channels: C.
            out_channels: M.
            kernel: Height and width.
            stride: In both directions.
            gain: Factor of its output at first; where the weights are standardised only, as other networks measure
                or do not know how large their activations are.
        """
        shape = (in_channels, out_channels, kernel, stride, kernel // 2)
        if self.norm in ("group", "batch"):
            return nn.Conv2d(*shape, bias=False)
        if self.norm == "weight":
            conv = WeightStandardisedConv2d(*shape, scale=MISH_SCALE if self.activation == "mish" else RELU_SCALE)
            nn.init.constant_(conv.gain, gain)
        else:
            conv = nn.Conv2d(*shape)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
        return conv


class ConvBlock(nn.Module):
    """Convolution (3x3), normalisation, activation and, if `pool`, 2x2 max-pooling."""

    def __init__(self, in_channels: int, out_channels: int, style: Style, pool: bool = False):
        super().__init__()
        self.conv = style.make_conv(in_channels, out_channels, 3)
        self.norm = style.make_norm(out_channels)
        self.activation = style.make_activation()
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns feature maps, halved in height and width if pooled."""
        return self.pool(self.activation(self.norm(self.conv(x_BCHW))))
