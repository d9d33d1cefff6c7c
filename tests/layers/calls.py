"""Functions as models, for QModule to see what they call."""

import torch
from torch import nn


class Call(nn.Module):
    """`function` of the input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class CallWith(nn.Module):
    """`function` of the module, which has `parameters` by name, and the input."""

    def __init__(self, function, **parameters: torch.Tensor):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x):
        return self.function(self, x)
