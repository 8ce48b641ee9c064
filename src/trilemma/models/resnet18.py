"""ResNet-18 (He et al., 2016) with a stem for small images and the published one for 224 pixels."""

from typing import Literal

from torch import Tensor, nn

from trilemma.models.layers import Style

StemKind = Literal["small", "large"]

#: First gain of a block's last convolution where the weights are standardised, so that the sum with the shortcut is
#: hardly larger than the shortcut (the published 0.2 of Brock et al., 2021; of eight blocks, 1.04^8 and not 2^8).
RESIDUAL_GAIN = 0.2


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where shapes differ."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, style: Style):
        super().__init__()
        self.conv1 = style.make_conv(in_channels, out_channels, 3, stride)
        self.norm1 = style.make_norm(out_channels)
        self.activation1 = style.make_activation()
        self.conv2 = style.make_conv(out_channels, out_channels, 3, gain=RESIDUAL_GAIN)
        self.norm2 = style.make_norm(out_channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            projection = style.make_conv(in_channels, out_channels, 1, stride)
            self.shortcut = nn.Sequential(projection, style.make_norm(out_channels))
        self.activation2 = style.make_activation()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns feature maps, reduced by the stride."""
        h = self.activation1(self.norm1(self.conv1(x_BCHW)))
        h = self.norm2(self.conv2(h))
        return self.activation2(h + self.shortcut(x_BCHW))


class ResNet18(nn.Module):
    """Maps images (B, C, H, W) to logits (B, K).

    Args:
        channels: Image channels.
        num_classes: K.
        width: Feature maps of the stem; the last stage has eight times as many.
        style: Normalisation and activation.
        stem: "small": 3x3, stride 1. "large": 7x7, stride 2, then 3x3 max-pooling of stride 2.
    """

    def __init__(self, channels: int, num_classes: int, width: int, style: Style, stem: StemKind):
        super().__init__()
        large = stem == "large"
        self.stem = nn.Sequential(
            style.make_conv(channels, width, 7, 2) if large else style.make_conv(channels, width, 3),
            style.make_norm(width),
            style.make_activation(),
            nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity(),
        )
        self.stage1 = _stage(width, width, 1, style)
        self.stage2 = _stage(width, 2 * width, 2, style)
        self.stage3 = _stage(2 * width, 4 * width, 2, style)
        self.stage4 = _stage(4 * width, 8 * width, 2, style)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns logits (B, K)."""
        h = self.stage2(self.stage1(self.stem(x_BCHW)))
        h = self.stage4(self.stage3(h))
        return self.linear(h.mean(dim=(-2, -1)))  # global average pooling


def _stage(in_channels: int, out_channels: int, stride: int, style: Style) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride, style), BasicBlock(out_channels, out_channels, 1, style)
    )
