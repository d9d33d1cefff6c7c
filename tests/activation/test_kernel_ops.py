"""torch.library.opcheck on every kernel op: schema, Meta kernel, tracing with static and dynamic shapes."""

import pytest
import torch
from torch.library import opcheck

from quantize.__main__ import kernel_ops

ops = torch.ops.quantize
SEED = torch.tensor([1, 2])
BITS = torch.tensor([1, 8, 2, 4], dtype=torch.uint8)


def packed(x, bits, group_size):
    codes, ranges = ops.group_quantize(x, bits, group_size, SEED)
    return codes, ranges, None, bits, group_size, x.shape, x.stride(), x.dtype, SEED


def packed_mixed(x, group_size):
    codes, ranges = ops.group_quantize_mixed(x, BITS, 15, group_size, SEED)
    return codes, ranges, BITS, 0, group_size, x.shape, x.stride(), x.dtype, SEED


def images(dtype=torch.float32):
    return torch.randn(4, 3, 5, 7).to(dtype, memory_format=torch.channels_last)


def pool(offsets):
    _, indices = torch.nn.functional.max_pool2d(torch.randn(2, 3, 9, 9), 3, 2, 1, return_indices=True)
    window = ([9, 9], [3, 3], [2, 2], [1, 1], [1, 1])
    return (ops.pack_pool_indices(indices, *window) if offsets else indices, *window)


WINDOW = [3, 3], [2, 2], [1, 1], [1, 1], False


def unpooled(x):
    y, offsets = ops.max_pool_offsets(x, *WINDOW)
    return torch.randn_like(y), offsets, x.shape, x.stride(), *WINDOW


SAMPLES = {
    "group_quantize": [
        lambda: (torch.randn(4, 100), 2, 64, SEED),
        lambda: (images(torch.float16), 8, 0, SEED),
        lambda: (torch.randn(300, dtype=torch.bfloat16), 1, -1, SEED),
    ],
    # Bits that use up the budget, in whole bytes: what is left of codes beyond them is not written.
    "group_quantize_mixed": [
        lambda: (torch.randn(4, 104), BITS, 15, 64, SEED),
        lambda: (torch.randn(4, 6, 5, 4).half(), BITS, 15, 8, SEED),
    ],
    "group_dequantize": [
        lambda: packed(torch.randn(4, 100), 4, 64),
        lambda: packed(images(torch.bfloat16), 1, 0),
        lambda: packed_mixed(torch.randn(4, 50), 16),
    ],
    "group_variance": [lambda: (torch.randn(4, 100), 64), lambda: (images(), -1)],
    "allocate_bits": [lambda: (torch.rand(4, 4), 9, 8)],
    "allocation_curve": [
        lambda: (torch.rand(4, 4), torch.rand(4, 4), [1.0, 1.5, 8.0], 8),
        lambda: (torch.rand(0, 4), torch.rand(0, 4), [2.0], 4),
    ],
    "clip_mask": [lambda: (torch.randn(4, 9), 0.0, float("nan"), 0.1), lambda: (images(), -1.0, 1.0, 0.0)],
    "sample_energy": [lambda: (torch.randn(4, 9, 5),), lambda: (images(torch.bfloat16),), lambda: (torch.randn(7, 4).t(),)],
    "smooth_derivative": [lambda: (torch.randn(2, 3, 9), "gelu_tanh"), lambda: (images(torch.bfloat16), "silu")],
    "smooth_quantize": [
        lambda: (torch.randn(4, 100), "silu", 2, 64, SEED),
        lambda: (images(torch.bfloat16), "mish", 4, 0, SEED),
    ],
    "smooth_backward": [
        lambda: (torch.randn(4, 100), *packed(torch.randn(4, 100), 4, 64)[:5], SEED),
        lambda: (x := images(torch.float16), *packed(x, 2, 0)[:5], SEED),
    ],
    "clip_mask_": [lambda: (torch.randn(4, 9), 0.0, float("nan"), 0.0)],
    "pack_mask": [lambda: (torch.rand(4, 9) < 0.5,)],
    "apply_mask": [lambda: (torch.randn(4, 9), torch.randint(256, (5,), dtype=torch.uint8), 1.0, 0.1)],
    "pack_pool_indices": [lambda: pool(False)],
    "unpack_pool_indices": [lambda: pool(True)],
    "max_pool_offsets": [
        lambda: (torch.randn(2, 3, 9, 9), *WINDOW),
        lambda: (images(torch.bfloat16), *WINDOW),
        lambda: (torch.randn(2, 9, 9).double(), *WINDOW),
        lambda: (torch.randn(2, 3, 5, 6, 7), [2, 2, 3], [2, 2, 2], [1, 1, 1], [1, 1, 1], True),
    ],
    "max_pool_values": [lambda: (torch.randn(2, 3, 9, 9), *WINDOW), lambda: (images(torch.float16), *WINDOW)],
    "max_pool_backward": [lambda: unpooled(torch.randn(2, 3, 9, 9)), lambda: unpooled(images()), lambda: unpooled(images().double())],
}


def test_every_kernel_op_has_samples():
    elsewhere = {
        "batch_norm_backward",  # tests/layers/test_batch_norm_backward.py
        *("norm_quantize", "norm_quantize_mixed", "norm_variance"),  # tests/layers/test_norm_quantize.py
        "norm_dequantize",  # tests/layers/test_norm_dequantize.py
        *("round_power_of_two", "channel_quantize", "clip_gradient", "lsq_quantize", "lsq_backward"),  # tests/weight/test_weight_ops.py
        *("diffq_noise", "diffq_backward", "diffq_backward_", "diffq_round"),  # tests/weight/test_diffq.py
        *("diffq_group_bits", "diffq_bits", "diffq_bits_backward"),
        *("binary_quantize", "binary_backward", "dorefa_quantize", "dorefa_backward", "dorefa_gradient"),  # tests/weight/test_weight_ops.py
        *("sign_quantize", "unit_quantize", "grid_backward"),
        *("clipped_noise", "clipped_noise_backward"),  # tests/weight/test_learned_activation.py
        *("decode_weight", "packed_conv2d", "packed_linear", "packed_linear_float"),  # tests/packed/test_kernels.py
        *("unpack_groups", "decode_groups"),  # tests/packed/test_groups.py
        *("packed_binary_conv2d", "packed_binary_linear"),  # tests/packed/test_binary_kernels.py
        "stem_conv2d",  # tests/packed/test_stems.py
    }
    assert {name.split("::")[-1] for name in kernel_ops()} == set(SAMPLES) | elsewhere


@pytest.mark.parametrize("op", SAMPLES)
def test_opcheck(op):
    for sample in SAMPLES[op]:
        opcheck(getattr(ops, op).default, sample())


@pytest.mark.parametrize("op", SAMPLES)
def test_meta_kernel_gives_the_shapes(op):
    for sample in SAMPLES[op]:
        arguments = sample()
        real = getattr(ops, op)(*arguments)
        meta = getattr(ops, op)(*[a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments])
        for r, m in zip(*[(t,) if isinstance(t, torch.Tensor) else t for t in (real, meta)], strict=True):
            assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())
