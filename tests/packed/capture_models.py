"""Models that test_capture.py and test_capture_notices.py run."""

import torch
from torch import nn

import quantize


class Forward(nn.Module):
    """A module with any forward."""

    def __init__(self, forward, **own):
        super().__init__()
        self.call = forward
        for name, value in own.items():
            setattr(self, name, value)
        self.eval()

    def forward(self, *args, **kwargs):
        return self.call(self, *args, **kwargs)


class Block(nn.Module):
    """Two convolutions and a residual sum, norms before them for signs and behind them otherwise."""

    def __init__(self, channels, signs):
        super().__init__()
        self.signs = signs
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.relu = nn.Hardtanh() if signs else nn.ReLU()

    def forward(self, x):
        if self.signs:
            x = x + self.conv1(self.norm1(x))
            return x + self.conv2(self.norm2(x))
        return self.relu(self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))) + x)


def packed(config):
    """A small residual network, its first and last layer in floats."""
    signs = config.activation_bits == 1
    stem = nn.Sequential(nn.Conv2d(3, 32, 7, 2, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    model = nn.Sequential(stem, Block(32, signs), Block(32, signs), head).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    quantize.prepare(model, {"*": config, "0.0": None, "3.2": None})
    if isinstance(config, (quantize.Uniform, quantize.PowerOfTwo)) and config.activation_bits:
        quantize.calibrate(model, [torch.randn(2, 3, 32, 32)])
    return quantize.convert(model)
