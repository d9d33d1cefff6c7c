"""MobileNet v1: 13 depthwise separable blocks (arXiv 1704.04861, table 1).

At width 32, 1000 classes and 224x224 it has 4,231,976 parameters and 568,740,352 multiply-adds, published as 4.2 M and 569 M. For 32x32
images the first convolution has stride 1, so that the last feature map is 2x2: 3,217,226 parameters and 46,354,432 multiply-adds at 10
classes.
"""

import torch
from torch import Tensor, nn

from .blocks import Separable, initialize, scaled

WIDTH = 32
# Output channels at that width, and stride. The paper's stride 2 of the last block is a misprint: it gives that block's output as 7x7.
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


class MobileNet(nn.Module):
    """`Tensor[N, in_channels, H, W]` to `Tensor[N, num_classes]`. `width` is the number of channels of the first convolution; the others
    follow in proportion, rounded to multiples of 8. `stem_stride`: 1 for 32x32 images, 2 for ImageNet's."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = WIDTH, stem_stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        blocks, channels = [], width
        for published, stride in BLOCKS:
            outputs = scaled(published, width / WIDTH)
            blocks.append(Separable(channels, outputs, stride))
            channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.mean(x, (2, 3)))
