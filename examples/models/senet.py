"""SE-ResNet-18: a ResNet whose blocks weigh their channels by squeeze-and-excitation before the addition (arXiv 1709.01507, figure 3).

For 32x32 images and 10 classes it has 11,263,042 parameters and 555,509,760 multiply-adds: in all, its squeeze-and-excitation adds 89,080
parameters to ResNet-18's.
"""

from torch import Tensor

from .blocks import SqueezeExcite
from .imagenet_resnet import BasicBlock

REDUCTION = 16


class SEBasicBlock(BasicBlock):
    """Two 3x3 convolutions, squeeze-and-excitation and the shortcut."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__(inputs, width, stride)
        self.se = SqueezeExcite(width, max(1, width // REDUCTION))

    def residual(self, x: Tensor) -> Tensor:
        return self.se(super().residual(x))
