"""Network in network: every convolution is followed by two of 1x1 (arXiv 1312.4400, with the numbers of the authors' CIFAR-10 model).

It has 966,986 parameters at 10 classes, published as 0.97 M, and 222,365,568 multiply-adds at 32x32. It has no batch norm.
"""

import torch
from torch import Tensor, nn

from .blocks import proportional

WIDTH = 192


def _conv_act(inputs, outputs, kernel):
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU(inplace=True))


class NIN(nn.Module):
    """`Tensor[N, in_channels, H, W]` to `Tensor[N, num_classes]`. The last 1x1 convolution comes after the mean over the pixels, as a
    linear layer, where the paper has it before: the same but for the rectifier, which logits are better without."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = WIDTH):
        super().__init__()
        second, third = (proportional(published, width / WIDTH) for published in (160, 96))
        self.conv1 = nn.Conv2d(in_channels, width, 5, padding=2)
        self.relu = nn.ReLU(inplace=True)
        self.features = nn.Sequential(
            _conv_act(width, second, 1),
            _conv_act(second, third, 1),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Dropout(),
            _conv_act(third, width, 5),
            _conv_act(width, width, 1),
            _conv_act(width, width, 1),
            nn.AvgPool2d(3, 2, ceil_mode=True),
            nn.Dropout(),
            _conv_act(width, width, 3),
            _conv_act(width, width, 1),
        )
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # By the inputs: without batch norm the forward pass has to keep its scale by itself.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(self.relu(self.conv1(x)))
        return self.fc(torch.mean(x, (2, 3)))
