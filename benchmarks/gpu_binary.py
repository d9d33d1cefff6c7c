"""Binary layers on a GPU beside cuDNN and cuBLAS (device_layers.py): the packed layer from floats to floats and from bits to bits.

python benchmarks/gpu_binary.py [--batches 1 32 256] [--rounds 30] [--output FILE]
"""

import torch
from device_layers import FEATURES, conv_references, graph, linear_references, run

import quantize  # noqa: F401  registers the ops
from quantize.packed.binary_panels import binary_codes, tap_sums
from quantize.packed.layout import to_rows

ops = torch.ops.quantize


def packed(weight: torch.Tensor) -> list[torch.Tensor]:
    """What the ops take of signs [N, C, *kernel], from the codes to the scales."""
    rows = to_rows(weight)
    codes, channels = binary_codes(rows), weight.shape[1]
    made = torch.empty(0), tap_sums(codes, rows.shape[1] // channels, channels)  # panels are the CPU's
    return [t.cuda() for t in (codes, *made, torch.rand(len(weight)))]


def conv(channels: int, size: int, batch: int) -> dict:
    weight = torch.randint(2, (channels, channels, 3, 3)).float().mul_(2).sub_(1)
    x, made = torch.randn(batch, channels, size, size, device="cuda"), packed(weight)
    last = x.contiguous(memory_format=torch.channels_last)
    threshold, geometry = torch.zeros(channels, dtype=torch.int32, device="cuda"), (channels, [3, 3], [1, 1], [1, 1], [1, 1], 1)
    op = ops.packed_binary_conv2d
    bits = op(x, None, None, False, *made, None, threshold, None, *geometry)
    return conv_references(x, weight.cuda()) | {
        "floats to floats": graph(lambda: op(x, None, None, False, *made, None, None, None, *geometry)),
        "floats to floats, channels last": graph(lambda: op(last, None, None, False, *made, None, None, None, *geometry)),
        "bits to floats": graph(lambda: op(bits, None, None, False, *made, None, None, None, *geometry)),
        "bits to bits": graph(lambda: op(bits, None, None, False, *made, None, threshold, None, *geometry)),
    }


def linear(batch: int) -> dict:
    weight = torch.randint(2, (FEATURES, FEATURES)).float().mul_(2).sub_(1)
    x, made, op = torch.randn(batch, FEATURES, device="cuda"), packed(weight), ops.packed_binary_linear
    threshold = torch.zeros(FEATURES, dtype=torch.int32, device="cuda")
    bits = op(x, None, None, False, *made, None, threshold, None, FEATURES)
    return linear_references(x, weight.cuda()) | {
        "floats to floats": graph(lambda: op(x, None, None, False, *made, None, None, None, FEATURES)),
        "bits to bits": graph(lambda: op(bits, None, None, False, *made, None, threshold, None, FEATURES)),
    }


if __name__ == "__main__":
    run("gpu_binary", __doc__, conv, linear)
