"""ResNet-18, -34 and -50 for ImageNet (arXiv 1512.03385, table 1), with the stride in the bottleneck's 3x3 convolution, and their usual
form for 32x32 images: a 3x3 convolution of stride 1 before the first stage, and no pooling.

Modules are named as torchvision names them, so its pretrained weights load.

| | parameters | multiply-adds | parameters, 32x32 | multiply-adds |
|---|---|---|---|---|
| 18 | 11,689,512 | 1,814,073,344 | 11,173,962 | 555,422,720 |
| 34 | 21,797,672 | 3,663,761,408 | 21,282,122 | 1,159,402,496 |
| 50 | 25,557,032 | 4,089,184,256 | 23,520,842 | 1,297,829,888 |

at 1000 classes and 224x224, which the paper gives as 1.8, 3.6 and 3.8 billion multiply-adds (its ResNet-50 has the stride in a 1x1
convolution), and at 10 classes and 32x32.
"""

import torch
from torch import Tensor, nn


def _downsample(inputs, outputs, stride):
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """`residual(x)`, added to the shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.residual(x)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and the shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(inputs, width, stride)

    def residual(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide, and the shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(inputs, 4 * width, stride)

    def residual(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))


class ImageNetResNet(nn.Module):
    """ResNet of four stages with `blocks` blocks each; `Tensor[N, in_channels, H, W]` to `Tensor[N, num_classes]`. It begins with a 7x7
    convolution and pooling, which leave a quarter of height and width, for `small_images` with a 3x3 convolution that leaves all."""

    def __init__(self, block, blocks, num_classes: int = 1000, in_channels: int = 3, width: int = 64, small_images: bool = False):
        super().__init__()
        kernel, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = nn.Conv2d(in_channels, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, 2, 1)
        channels = width
        for stage, count in enumerate(blocks):
            layers = []
            for index in range(count):
                layers.append(block(channels, width * 2**stage, 2 if stage and index == 0 else 1))
                channels = width * 2**stage * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.mean(x, (2, 3)))
