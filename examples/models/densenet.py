"""DenseNet-BC: every layer sees the outputs of all before it in its block (arXiv 1608.06993), for 32x32 images.

DenseNet-BC-100, growth 12: three blocks of 16 layers, 769,162 parameters at 10 classes (published: 0.8 M) and 287,929,692 multiply-adds.
DenseNet-121, growth 32, is ImageNet's (table 1) with a 3x3 convolution in place of its 7x7 one, batch norm and pooling: 6,956,298 and
888,350,720.
"""

import torch
from torch import Tensor, nn

from .blocks import initialize


class DenseLayer(nn.Module):
    """bn-relu-conv twice, 1x1 to four times `growth` channels and 3x3 to `growth`, which are put before the input's."""

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(self.relu2(self.bn2(self.conv1(self.relu1(self.bn1(x))))))
        return torch.cat((x, new), 1)


class DenseNet(nn.Module):
    """`Tensor[N, in_channels, H, W]` to `Tensor[N, num_classes]`. `layers`: of each block; between two, a 1x1 convolution to half the
    channels and a pooling. `width` is the number of channels of the first convolution, twice the growth."""

    def __init__(self, layers: tuple, num_classes: int = 10, in_channels: int = 3, width: int = 24):
        super().__init__()
        growth = max(1, width // 2)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        blocks, channels = [], width
        for index, count in enumerate(layers):
            if index:
                blocks.append(_transition(channels, channels // 2))
                channels //= 2
            blocks.append(nn.Sequential(*(DenseLayer(channels + growth * before, growth) for before in range(count))))
            channels += growth * count
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.blocks(self.conv1(x))))
        return self.fc(torch.mean(x, (2, 3)))


def _transition(inputs, outputs):
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), nn.Conv2d(inputs, outputs, 1, bias=False), nn.AvgPool2d(2))
