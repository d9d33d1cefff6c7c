"""What packed layers compute in floats: the layer itself, on the input's levels (grid.py) and the decoded weight.

The specification of the kernels (kernels.py), and what runs where none takes a layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def run(layer, input: Tensor, output_padding=None) -> Tensor:
    """The packed `layer` on `input` (quantized already where it asks for that)."""
    weight = layer.decoded().to(input.dtype)
    bias = None if layer.bias is None else layer.bias.to(input.dtype)
    if layer.spatial == 0:
        return F.linear(input, weight, bias)
    if layer.transposed:
        function = CONV_TRANSPOSE[layer.spatial]
        return function(input, weight, bias, layer.stride, layer.padding, output_padding, layer.groups, layer.dilation)
    padding = layer.padding
    if layer.padding_mode != "zeros":
        input = F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    # Rows are channels_last memory, and PyTorch's output would be too. Whichever is smaller is brought into the input's order.
    reorder = layer.spatial == 2 and input.is_contiguous() and not weight.is_contiguous()
    if layer.spatial != 2 or (reorder and (torch.compiler.is_compiling() or weight.numel() < input.numel())):  # no guard on the batch
        weight, reorder = weight.contiguous(), False
    output = CONV[layer.spatial](input, weight, bias, layer.stride, padding, layer.dilation, layer.groups)
    return output.contiguous() if reorder else output
