"""MobileNetV2: inverted residuals with linear bottlenecks (arXiv 1801.04381, table 2).

At 1000 classes and 224x224 it has 3,504,872 parameters and 300,774,272 multiply-adds, published as 3.4 M and 300 M. For 32x32 images the
first convolution and the second stage keep the size, so that the last feature map is 4x4: 2,236,682 parameters and 87,976,448 multiply-adds
at 10 classes.
"""

from torch import nn

from .blocks import InvertedResidualNet

# Expansion, channels, blocks, kernel.
STAGES = ((1, 16, 1, 3), (6, 24, 2, 3), (6, 32, 3, 3), (6, 64, 4, 3), (6, 96, 3, 3), (6, 160, 3, 3), (6, 320, 1, 3))
# Of the first convolution and the stages.
IMAGENET_STRIDES = (2, 1, 2, 2, 2, 1, 2, 1)
SMALL_STRIDES = (1, 1, 1, 2, 2, 1, 2, 1)


class MobileNetV2(InvertedResidualNet):
    """`Tensor[N, in_channels, H, W]` to `Tensor[N, num_classes]`; without dropout."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 32, strides: tuple = SMALL_STRIDES):
        super().__init__(STAGES, strides, nn.ReLU6, False, num_classes, in_channels, width)
