"""What several architectures share: channels at another width, convolution with batch norm, separable and inverted residual blocks, a
network of the latter, squeeze-and-excitation."""

from collections import OrderedDict
from math import sqrt

import torch
from torch import Tensor, nn


def proportional(channels: int, scale: float) -> int:
    """`scale * channels`, rounded, but at least 1."""
    return max(1, round(channels * scale))


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


class SqueezeExcite(nn.Module):
    """Each channel times a number between 0 and 1, which two layers, `squeezed` channels between them, make of all channels' means
    (arXiv 1709.01507, section 3). The layers are 1x1 convolutions, so that nothing needs reshaping."""

    def __init__(self, channels: int, squeezed: int, act: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.act = act(inplace=True)
        self.excite = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        means = torch.mean(x, (2, 3), keepdim=True)
        return x * self.gate(self.excite(self.act(self.squeeze(means))))


class InvertedResidual(nn.Module):
    """A 1x1 convolution to `expansion` times the channels, none where that is 1, a depthwise one and a 1x1 back without activation; added
    to the input where the shape stays (arXiv 1801.04381, section 3.3). Squeeze-and-excitation after the depthwise one, to a quarter of
    the block's input channels, makes it EfficientNet's (arXiv 1905.11946)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, act: type[nn.Module], kernel: int = 3, excite: bool = False):
        super().__init__()
        hidden = inputs * expansion
        self.expand = conv_bn_act(inputs, hidden, 1, act=act) if expansion > 1 else nn.Identity()
        self.depthwise = conv_bn_act(hidden, hidden, kernel, stride, groups=hidden, act=act)
        self.excite = SqueezeExcite(hidden, max(1, inputs // 4), act) if excite else nn.Identity()
        self.project = conv_bn_act(hidden, outputs, 1, act=None)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + out if self.residual else out


class InvertedResidualNet(nn.Module):
    """A 3x3 convolution, stages of inverted residuals and a 1x1 convolution: MobileNetV2 and EfficientNet. `Tensor[N, in_channels, H, W]`
    to `Tensor[N, num_classes]`.

    `stages`: (expansion, output channels at width 32, blocks, kernel) of each. `strides`: of the first convolution and of each stage's
    first block. `width` is the number of channels of the first convolution; the others follow in proportion, rounded to multiples of 8.
    """

    WIDTH = 32

    def __init__(self, stages, strides, act, excite: bool, num_classes: int, in_channels: int, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, strides[0], 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act = act(inplace=True)
        blocks, channels = [], width
        for (expansion, published, count, kernel), stride in zip(stages, strides[1:], strict=True):
            outputs = scaled(published, width / self.WIDTH)
            for index in range(count):
                blocks.append(InvertedResidual(channels, outputs, 1 if index else stride, expansion, act, kernel, excite))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = conv_bn_act(channels, scaled(1280, width / self.WIDTH), 1, act=act)
        self.fc = nn.Linear(self.last.conv.out_channels, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.blocks(self.act(self.bn1(self.conv1(x)))))
        return self.fc(torch.mean(x, (2, 3)))


def initialize(model: nn.Module) -> None:
    """He initialization by the outputs that an input reaches, which in a depthwise convolution are those of its own group."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            reached = module.out_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
            nn.init.normal_(module.weight, std=sqrt(2 / reached))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
