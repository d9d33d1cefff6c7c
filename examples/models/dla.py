"""Deep layer aggregation (arXiv 1707.06484) for 32x32 images: DLA-34's channels and blocks in the form that the CIFAR-10 collection
github.com/kuangliu/pytorch-cifar made known. Its stem keeps the size, and where a tree halves it a convolution of stride 2 does.

At 10 classes `dla` has 16,291,386 parameters and 1,030,935,552 multiply-adds, `dla_simple` 15,142,970 and 913,495,040; ImageNet's DLA-34,
which it is not, has 15.7 M.
"""

import torch
from torch import Tensor, nn

from .blocks import conv_bn_act, initialize
from .imagenet_resnet import BasicBlock


class Tree(nn.Module):
    """`parts` one after the other; a 1x1 convolution, the root, joins what each of them gives, and what `beside` makes of the input."""

    def __init__(self, outputs: int, parts: list[nn.Module], beside: nn.Module | None = None):
        super().__init__()
        self.beside = beside
        self.parts = nn.ModuleList(parts)
        self.root = conv_bn_act((len(parts) + (beside is not None)) * outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        joined = [] if self.beside is None else [self.beside(x)]
        for part in self.parts:
            x = part(x)
            joined.append(x)
        return self.root(torch.cat(joined, 1))


def _tree(inputs, outputs, level, stride):
    """Trees of lower levels, then two blocks, all joined in one root (equation 3). Above level 1 a block of the input joins too."""
    parts, channels = [], inputs
    for lower in range(level - 1, 0, -1):
        parts.append(_tree(channels, outputs, lower, stride if channels == inputs else 1))
        channels = outputs
    first = BasicBlock(channels, outputs, 1 if parts else stride)
    beside = BasicBlock(inputs, outputs, stride) if parts else None
    return Tree(outputs, [*parts, first, BasicBlock(outputs, outputs, 1)], beside)


def _binary_tree(inputs, outputs, level, stride):
    """Level 0 is a block, every other a root of two trees of the level below."""
    if level == 0:
        return BasicBlock(inputs, outputs, stride)
    return Tree(outputs, [_binary_tree(inputs, outputs, level - 1, stride), _binary_tree(outputs, outputs, level - 1, 1)])


class DLA(nn.Module):
    """`Tensor[N, in_channels, H, W]` to `Tensor[N, num_classes]`. `simple`: with binary trees, whose blocks go to the next root only."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 16, simple: bool = False):
        super().__init__()
        tree = _binary_tree if simple else _tree
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = conv_bn_act(width, width, 3)
        self.layer2 = conv_bn_act(width, 2 * width, 3)
        self.layer3 = tree(2 * width, 4 * width, 1, 1)
        self.layer4 = tree(4 * width, 8 * width, 2, 2)
        self.layer5 = tree(8 * width, 16 * width, 2, 2)
        self.layer6 = tree(16 * width, 32 * width, 1, 2)
        self.fc = nn.Linear(32 * width, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        x = self.layer6(self.layer5(self.layer4(self.layer3(x))))
        return self.fc(torch.mean(x, (2, 3)))
