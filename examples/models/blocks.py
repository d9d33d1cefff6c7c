"""What the mobile architectures share: rounding of channels, convolution with batch norm, separable and inverted residual blocks."""

from collections import OrderedDict
from math import sqrt

from torch import Tensor, nn


def scaled(channels: int, scale: float) -> int:
    """`scale * channels`, rounded to a multiple of 8; upwards where the nearest one would take away more than a tenth
    (arXiv 1801.04381's reference code)."""
    exact = channels * scale
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


def conv_bn_act(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU):
    """`conv`, `bn` and `act` in a row, padded so that stride 1 keeps the size; no activation where `act` is None."""
    layers = OrderedDict(
        conv=nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        bn=nn.BatchNorm2d(outputs),
    )
    if act is not None:
        layers["act"] = act(inplace=True)
    return nn.Sequential(layers)


class Separable(nn.Module):
    """A 3x3 convolution of each channel on its own, then a 1x1 convolution across channels (arXiv 1704.04861, figure 3)."""

    def __init__(self, inputs: int, outputs: int, stride: int, act: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.depthwise = conv_bn_act(inputs, inputs, 3, stride, groups=inputs, act=act)
        self.pointwise = conv_bn_act(inputs, outputs, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class InvertedResidual(nn.Module):
    """A 1x1 convolution to `expansion` times the channels, a depthwise 3x3 and a 1x1 back without activation; added to the input where
    the shape stays (arXiv 1801.04381, section 3.3)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, act: type[nn.Module]):
        super().__init__()
        hidden = inputs * expansion
        self.expand = conv_bn_act(inputs, hidden, 1, act=act)
        self.depthwise = conv_bn_act(hidden, hidden, 3, stride, groups=hidden, act=act)
        self.project = conv_bn_act(hidden, outputs, 1, act=None)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


def initialize(model: nn.Module) -> None:
    """He initialization by the outputs that an input reaches, which in a depthwise convolution are those of its own group."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            reached = module.out_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
            nn.init.normal_(module.weight, std=sqrt(2 / reached))
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
