"""EfficientNet-B0: inverted residuals with squeeze-and-excitation and SiLU (arXiv 1905.11946, table 1).

At 1000 classes and 224x224 it has 5,288,548 parameters and 385,814,752 multiply-adds, published as 5.3 M and 0.39 billion. For 32x32 images
the first convolution keeps the size, so that the last feature map is 2x2: 4,020,358 parameters and 31,979,392 multiply-adds at 10 classes.
"""

from torch import nn

from .blocks import InvertedResidualNet
from .mobilenetv2 import IMAGENET_STRIDES

# Expansion, channels, blocks, kernel.
STAGES = ((1, 16, 1, 3), (6, 24, 2, 3), (6, 40, 2, 5), (6, 80, 3, 3), (6, 112, 3, 5), (6, 192, 4, 5), (6, 320, 1, 3))
# Of the first convolution and the stages; on ImageNet they are MobileNetV2's.
SMALL_STRIDES = (1, *IMAGENET_STRIDES[1:])


class EfficientNetB0(InvertedResidualNet):
    """`Tensor[N, in_channels, H, W]` to `Tensor[N, num_classes]`; without the paper's dropout and stochastic depth (0.2 each), which are
    for its 350 epochs of ImageNet."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 32, strides: tuple = SMALL_STRIDES):
        super().__init__(STAGES, strides, nn.SiLU, True, num_classes, in_channels, width)
