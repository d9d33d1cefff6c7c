"""ResNets for 32x32 images: three stages of 3x3 convolutions, depth 6n + 2 (arXiv 1512.03385, section 4.2), their pre-activation form
(arXiv 1603.05027) and its wide form (arXiv 1605.07146).

Parameters at 3 input channels, 10 classes, width 16: resnet20 0.27 M, resnet32 0.46 M, resnet44 0.66 M, resnet56 0.85 M, as published.
WRN-28-10 and WRN-16-4 have 36,479,194 and 2,748,890 (published: 36.5 M and 2.7 M), and 5,243,328,768 and 392,612,352 multiply-adds.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv3x3(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def subsampled(x: Tensor, stride: int, new_channels: int) -> Tensor:
    """The paper's option A for a shortcut that changes shape: every second pixel, and zeros for the new channels. It has no parameters and
    nothing to keep for backward."""
    if stride == 1 and not new_channels:
        return x
    before = new_channels // 2
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, before, new_channels - before))


class Block(nn.Module):
    """conv-bn-relu-conv-bn, added to the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.relu2 = nn.ReLU(inplace=True)
        self.stride, self.new_channels = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(out + subsampled(x, self.stride, self.new_channels))


class PreActBlock(nn.Module):
    """bn-relu-conv twice. A shortcut that changes shape is a 1x1 convolution of relu(bn1(x)), which it shares with conv1."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.relu2 = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(self.relu2(self.bn2(self.conv1(active)))) + shortcut


def _stages(block, depth, width, inputs=None, ends=2):
    """The blocks of the three stages: channels double and the image halves from one stage to the next. `inputs`: channels before them,
    `width` if not given; `ends`: layers of `depth` that are outside the blocks."""
    per_stage, left = divmod(depth - ends, 6)
    if left or per_stage < 1:
        raise ValueError(f"depth must be 6n + {ends} with n of at least 1; got {depth}")
    channels = inputs or width
    for stage in range(3):
        blocks = []
        for index in range(per_stage):
            outputs = width * 2**stage
            blocks.append(block(channels, outputs, 2 if stage and index == 0 else 1))
            channels = outputs
        yield nn.Sequential(*blocks)


def _initialize(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class CifarResNet(nn.Module):
    """ResNet of `depth` layers for small images; `Tensor[N, in_channels, H, W]` to `Tensor[N, num_classes]`."""

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 16):
        super().__init__()
        self.conv1 = _conv3x3(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1, self.layer2, self.layer3 = _stages(Block, depth, width)
        self.fc = nn.Linear(4 * width, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.mean(x, (2, 3)))


class PreActResNet(nn.Module):
    """Pre-activation ResNet of `depth` layers for small images; `Tensor[N, in_channels, H, W]` to `Tensor[N, num_classes]`.

    `wide`: as the wide form has it, the first convolution has 16 channels at most, whatever the stages have, and the shortcuts that
    change shape count as layers, of which there is one more then: depth 6n + 4. Width 16k makes WRN-depth-k, without its dropout."""

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 16, wide: bool = False):
        super().__init__()
        stem = min(16, width) if wide else width
        self.conv1 = _conv3x3(in_channels, stem)
        self.layer1, self.layer2, self.layer3 = _stages(PreActBlock, depth, width, stem, 4 if wide else 2)
        self.bn = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4 * width, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(torch.mean(self.relu(self.bn(x)), (2, 3)))
