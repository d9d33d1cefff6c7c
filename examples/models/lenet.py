"""LeNet-5 as it is built today: rectifiers and maxima in place of the paper's scaled hyperbolic tangents and trained means, every
convolution connected to all channels, a linear last layer (LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998).

At width 6, 10 classes and 32x32 it has 61,706 parameters with 1 input channel, which are the paper's 60,000, 62,006 with 3, and 416,520 or
651,720 multiply-adds.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import proportional

WIDTH = 6
SIDE = 32


class LeNet(nn.Module):
    """`Tensor[N, in_channels, H, W]` to `Tensor[N, num_classes]`. Its linear layers want images of 32x32: smaller ones are put in the
    middle of such, as the paper does with MNIST's 28x28, of larger ones the middle is taken."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = WIDTH):
        super().__init__()
        second, third, fourth = (proportional(published, width / WIDTH) for published in (16, 120, 84))
        self.conv1 = nn.Conv2d(in_channels, width, 5)
        self.relu1 = nn.ReLU(inplace=True)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(width, second, 5)
        self.relu2 = nn.ReLU(inplace=True)
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(25 * second, third)
        self.relu3 = nn.ReLU(inplace=True)
        self.fc2 = nn.Linear(third, fourth)
        self.relu4 = nn.ReLU(inplace=True)
        self.fc = nn.Linear(fourth, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        top, left = (SIDE - x.shape[2]) // 2, (SIDE - x.shape[3]) // 2
        x = F.pad(x, (left, SIDE - x.shape[3] - left, top, SIDE - x.shape[2] - top))
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        return self.fc(self.relu4(self.fc2(self.relu3(self.fc1(x.flatten(1))))))
