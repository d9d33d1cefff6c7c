"""Layers of 8 and 4 bits on a GPU beside cuDNN and cuBLAS (device_layers.py): inputs of 8 bits, which tensor cores multiply as integers,
and for a few rows of a linear layer also inputs that stay floats.

python benchmarks/gpu_integer.py [--batches 1 32 256] [--rounds 30] [--output FILE]
"""

import torch
from device_layers import FEATURES, conv_references, graph, linear_references, run

import quantize  # noqa: F401  registers the ops
from quantize.packed.kernels import FLOAT_ROWS
from quantize.packed.layout import levels_table, pack, to_rows
from quantize.packed.panels import integers, sums

BITS = (8, 4)
ops = torch.ops.quantize


def packed(weight: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """What the ops take of whole numbers [N, C, *kernel], from the codes to the sums."""
    rows, most = to_rows(weight), 2 ** (bits - 1) - 1
    codes = pack(rows.clamp(-most, most), "uniform", bits)
    total = sums(integers(codes, "uniform", bits, rows.shape[1]), rows.shape[1])
    panels = torch.empty(0)  # the CPU's
    return [t.cuda() for t in (codes, panels, levels_table("uniform", bits), torch.rand(len(weight)), total)]


def grid() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Inputs of 8 bits: step, zero point, bits."""
    return torch.tensor(0.02, device="cuda"), torch.tensor(128.0, device="cuda"), 8


def conv(channels: int, size: int, batch: int) -> dict:
    weight = torch.randint(-127, 128, (channels, channels, 3, 3)).float()
    x, geometry = torch.randn(batch, channels, size, size, device="cuda"), ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    last, sides = x.contiguous(memory_format=torch.channels_last), conv_references(x, weight.cuda())
    for bits in BITS:
        made = packed(weight, bits)
        for name, own in (("", x), (", channels last", last)):
            arguments = (own, *grid(), *made, None, bits, *geometry)
            sides[f"{bits} bits{name}"] = graph(lambda arguments=arguments: ops.packed_conv2d(*arguments))
    return sides


def linear(batch: int) -> dict:
    weight = torch.randint(-127, 128, (FEATURES, FEATURES)).float()
    x = torch.randn(batch, FEATURES, device="cuda")
    sides = linear_references(x, weight.cuda())
    for bits in BITS:
        made = packed(weight, bits)
        arguments = (x, *grid(), *made, None, bits)
        sides[f"{bits} bits"] = graph(lambda arguments=arguments: ops.packed_linear(*arguments))
        if batch <= FLOAT_ROWS:
            floats = (x, *made[:4], None, bits)
            sides[f"{bits} bits, inputs floats"] = graph(lambda floats=floats: ops.packed_linear_float(*floats))
    return sides


if __name__ == "__main__":
    run("gpu_integer", __doc__, conv, linear)
