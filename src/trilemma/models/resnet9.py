"""ResNet-9, the network of Usynin et al. (2022): two residual blocks, eight convolutions, one linear layer."""

from torch import Tensor, nn

from trilemma.models.layers import ConvBlock, Style

#: Three 2x2 poolings must leave at least one pixel.
SMALLEST_IMAGE = 8


class ResNet9(nn.Module):
    """Maps images (B, C, H, W) of at least 8 pixels a side to logits (B, K).

    Args:
        channels: Image channels.
        num_classes: K.
        width: Feature maps of the first convolution; the last ones have four times as many.
        style: Normalisation and activation.
    """

    def __init__(self, channels: int, num_classes: int, width: int, style: Style):
        super().__init__()
        self.conv1 = ConvBlock(channels, width, style)
        self.conv2 = ConvBlock(width, 2 * width, style, pool=True)
        self.res1 = nn.Sequential(ConvBlock(2 * width, 2 * width, style), ConvBlock(2 * width, 2 * width, style))
        self.conv3 = ConvBlock(2 * width, 4 * width, style, pool=True)
        self.conv4 = ConvBlock(4 * width, 4 * width, style, pool=True)
        self.res2 = nn.Sequential(ConvBlock(4 * width, 4 * width, style), ConvBlock(4 * width, 4 * width, style))
        self.linear = nn.Linear(4 * width, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns logits (B, K)."""
        h = self.conv2(self.conv1(x_BCHW))
        h = h + self.res1(h)
        h = self.conv4(self.conv3(h))
        h = h + self.res2(h)
        return self.linear(h.amax(dim=(-2, -1)))  # global max pooling
