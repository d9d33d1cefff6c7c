"""Networks for binary weights and activations: batch norm, clip, convolution, in this order, so that what enters a convolution has a mean
of about zero and its sign says most (arXiv 1603.05279, section 3.2).

The clip is nn.Hardtanh, a module of its own at each place: by themselves these are networks in full precision, and
`quantize.prepare(model, quantize.XNOR())` puts the sign, which the clip does not change, between it and the convolution. The first
convolution and the last layer are meant to stay as they are: what is before and after them is ordinary.

| | at | parameters | multiply-adds | bytes of the binary weights |
|---|---|---|---|---|
| nin_q | 32x32 | 968,394 | 222,365,568 | 119,808 |
| resnet20_q | 32x32 | 269,722 | 40,551,040 | 35,072 |
| vgg_small_q | 32x32 | 4,660,106 | 607,600,640 | 571,392 |
| resnet18_q_cifar | 32x32 | 11,172,170 | 555,422,720 | 1,394,688 |
| resnet18_q | 224x224 | 11,687,720 | 1,814,073,344 | 1,394,688 |

at 10 classes, the last one 1000. Bytes: a bit a weight, each output channel's padded to 8 bytes, without scales.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .blocks import initialize, proportional
from .cifar_resnet import subsampled


def clipped_conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """`bn`, `clip` and `conv` in a row, padded so that the size stays."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(inputs), clip=nn.Hardtanh(), conv=conv))


class BinaryNIN(nn.Module):
    """Network in network with batch norm (models/nin.py has the plain one); `Tensor[N, in_channels, H, W]` to `Tensor[N, num_classes]`.

    Pooling comes after a convolution and before the next batch norm: the maximum of signs would be +1 nearly everywhere (arXiv 1603.05279,
    section 3.2). No dropout, which would take the place of signs; binarizing is noise enough."""

    WIDTH = 192

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = WIDTH):
        super().__init__()
        second, third = (proportional(published, width / self.WIDTH) for published in (160, 96))
        self.conv1 = nn.Conv2d(in_channels, width, 5, padding=2, bias=False)
        self.features = nn.Sequential(
            clipped_conv(width, second, 1),
            clipped_conv(second, third, 1),
            nn.MaxPool2d(3, 2, 1),
            clipped_conv(third, width, 5),
            clipped_conv(width, width, 1),
            clipped_conv(width, width, 1),
            nn.AvgPool2d(3, 2, 1),
            clipped_conv(width, width, 3),
            clipped_conv(width, width, 1),
        )
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(width, num_classes)  # a 1x1 convolution before the mean would compute the same
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.features(self.conv1(x))))
        return self.fc(torch.mean(x, (2, 3)))


class BinaryVGG(nn.Module):
    """VGG-Small of the literature on binary networks (arXiv 1702.00953): six 3x3 convolutions, a pooling after every second one, and one
    linear layer; `Tensor[N, in_channels, H, W]` to `Tensor[N, num_classes]`. Its last maps are 4x4, pooled to that for images that are not
    32x32."""

    SIDE = 4

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 128):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        layers = []
        for stage, channels in enumerate((width, 2 * width, 4 * width)):
            layers += [clipped_conv(channels // 2, channels, 3)] if stage else []
            layers += [clipped_conv(channels, channels, 3), nn.MaxPool2d(2, ceil_mode=True)]
        self.features = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(self.SIDE)
        self.fc = nn.Linear(4 * width * self.SIDE**2, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn(self.features(self.conv1(x)))))
        return self.fc(x.flatten(1))


class BinaryBlock(nn.Module):
    """bn-clip-conv twice, added to the shortcut, which is not clipped. A shortcut that changes shape has no parameters (option A, as in
    models/cifar_resnet.py), or with `convolve` is a 1x1 convolution of clip(bn1(x)), which it shares with conv1."""

    def __init__(self, inputs: int, outputs: int, stride: int, convolve: bool):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.clip1 = nn.Hardtanh()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.clip2 = nn.Hardtanh()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.stride, self.new_channels = stride, outputs - inputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if convolve and (stride > 1 or self.new_channels) else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.clip1(self.bn1(x))
        shortcut = subsampled(x, self.stride, self.new_channels) if self.shortcut is None else self.shortcut(active)
        return self.conv2(self.clip2(self.bn2(self.conv1(active)))) + shortcut


class BinaryResNet(nn.Module):
    """ResNet of as many stages as `blocks` has numbers of blocks: channels double and the image halves from one to the next.
    `Tensor[N, in_channels, H, W]` to `Tensor[N, num_classes]`. `convolve`: the blocks' shortcuts that change shape are convolutions.
    `small_images`: begins with a 3x3 convolution, else with a 7x7 one and pooling, which leave a quarter of height and width."""

    def __init__(self, blocks: tuple, convolve: bool, small_images: bool, num_classes: int = 10, in_channels: int = 3, width: int = 16):
        super().__init__()
        kernel, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = nn.Conv2d(in_channels, width, kernel, stride, kernel // 2, bias=False)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, 2, 1)
        layers, channels = [], width
        for stage, count in enumerate(blocks):
            for index in range(count):
                layers.append(BinaryBlock(channels, width * 2**stage, 2 if stage and index == 0 else 1, convolve))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.blocks(self.maxpool(self.conv1(x)))))
        return self.fc(torch.mean(x, (2, 3)))
