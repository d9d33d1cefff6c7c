"""VGG with batch norm for 32x32 images: the 3x3 convolutions of arXiv 1409.1556, table 1, columns A, B, D and E, and one linear layer in
place of the three, whose 7x7 maps there are not.

| | parameters | multiply-adds |
|---|---|---|
| 11 | 9,228,362 | 152,769,536 |
| 13 | 9,413,066 | 228,267,008 |
| 16 | 14,724,042 | 313,201,664 |
| 19 | 20,035,018 | 398,136,320 |

at 10 classes. The form that is often seen has 2,752, 2,944, 4,224 and 5,504 parameters more: biases, which the batch norms take away
again.
"""

import torch
from torch import Tensor, nn

from .blocks import conv_bn_act, initialize

# Convolutions of the five stages, each of which ends in a pooling. Their channels double up to eight times the first.
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """`Tensor[N, in_channels, H, W]` to `Tensor[N, num_classes]`. The poolings round up: of 28x28 pixels one is left, as of 32x32."""

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        layers, channels = [], width
        for stage, count in enumerate(DEPTHS[depth]):
            for _ in range(count - (stage == 0)):
                outputs = width * min(2**stage, 8)
                layers.append(conv_bn_act(channels, outputs, 3))
                channels = outputs
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.mean(x, (2, 3)))
