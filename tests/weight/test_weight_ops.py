"""The weight room's ops: torch.library.opcheck, Meta kernels, torch.compile, and the errors they give."""

import pytest
import torch
from torch.library import opcheck

ops = torch.ops.quantize
HALF, ONE = torch.tensor(0.5), torch.tensor(1.0)
STEP = torch.tensor(0.5, requires_grad=True)
SEED = torch.tensor([3, 4])


def images(dtype=torch.float32):
    return torch.randn(4, 3, 5, 7).to(dtype, memory_format=torch.channels_last)


def gaps():
    return torch.randn(6, 8, 10).transpose(0, 2)[..., ::2]


SAMPLES = {
    "round_power_of_two": [
        lambda: (torch.randn(4, 9), True),
        lambda: (images(torch.float16), False),
        lambda: (gaps(), True),
        lambda: (torch.randn(0, 3, dtype=torch.float64), False),
    ],
    "channel_quantize": [
        lambda: (torch.randn(4, 9), "po2plus", 4, True),
        lambda: (images(torch.bfloat16), "uniform", 8, True),
        lambda: (gaps(), "po2", 2, False),
        lambda: (torch.randn(()), "uniform", 3, True),
        lambda: (torch.randn(3, 0), "uniform", 3, True),
    ],
    "clip_gradient": [
        lambda: (torch.randn(4, 9), torch.randn(4, 9), torch.rand(4)),
        lambda: (torch.randn(4, 3, 5, 7), images(), torch.rand(4)),
        lambda: (gaps(), gaps(), torch.rand(10)),
    ],
    "lsq_quantize": [
        lambda: (torch.randn(4, 9), HALF, ONE, 3),
        lambda: (images(torch.float16), HALF, ONE, 255),
        lambda: (gaps(), HALF.view(1), ONE.view(1), 15),
    ],
    "lsq_backward": [
        lambda: (torch.randn(4, 9), torch.randn(4, 9), HALF, ONE, 2, 0.1),
        lambda: (torch.randn(4, 3, 5, 7), images(), HALF, ONE, 255, 0.1),
        lambda: (torch.randn(10, 8, 3), gaps(), HALF.view(1), ONE, 15, 0.1),
    ],
    "binary_quantize": [
        lambda: (torch.randn(4, 9), 1.0, False),
        lambda: (images(torch.float16), 3.9, True),
        lambda: (gaps(), 1.0, True),
        lambda: (torch.randn(6), 1.0, False),
        lambda: (torch.randn(4, 1, 3, 3), 1.0, False),
        lambda: (torch.randn(0, 3, 2), 1.0, False),
    ],
    "binary_backward": [
        lambda: (torch.randn(4, 9), torch.randn(4, 9), torch.rand(4), torch.randn(4, 1), ONE.view(1), 1.0),
        lambda: (torch.randn(4, 3, 5, 7), images(), torch.rand(4), torch.randn(4, 35), ONE.view(1), 2.0),
    ],
    "dorefa_quantize": [
        lambda: (torch.randn(4, 9), 1, False),
        lambda: (images(torch.bfloat16), 2, True),
        lambda: (gaps(), 16, True),
        lambda: (torch.randn(0, 3), 2, True),
    ],
    "dorefa_backward": [
        lambda: (torch.randn(4, 9), torch.randn(4, 9), torch.ones(3)),
        lambda: (torch.randn(4, 3, 5, 7), images(), torch.ones(3)),
    ],
    "dorefa_gradient": [
        lambda: (torch.randn(4, 9), 2, SEED),
        lambda: (images(torch.float16), 8, SEED),
        lambda: (gaps(), 16, SEED),
        lambda: (torch.randn(0, 3), 2, SEED),
    ],
    "sign_quantize": [
        lambda: (torch.randn(4, 9), False),
        lambda: (images(torch.bfloat16), True),
        lambda: (gaps(), True),
        lambda: (torch.randn(()), False),
    ],
    "unit_quantize": [
        lambda: (torch.randn(4, 9), 1),
        lambda: (images(torch.float16), 65535),
        lambda: (gaps(), 15),
    ],
    "grid_backward": [
        lambda: (torch.randn(4, 9), torch.zeros(5, dtype=torch.uint8), False),
        lambda: (images(), torch.zeros(210, dtype=torch.uint8), True),
    ],
}
# Differentiable.
COMPOSITE = {
    "power_of_two": lambda x: ops.power_of_two(x, True),
    "fake_quantize": lambda x: ops.fake_quantize(x, "po2plus", 4, True),
    "lsq": lambda x: ops.lsq(x, STEP, ONE, 15, 0.1),
    "binarize": lambda x: ops.binarize(x, 1.0, False, 1.0),
    "dorefa": lambda x: ops.dorefa(x, 2, True),
    "sign_activation": lambda x: ops.sign_activation(x, True),
    "unit_activation": lambda x: ops.unit_activation(x, 3),
    "quantize_gradient": lambda x: ops.quantize_gradient(x, 4, SEED),
}


@pytest.mark.parametrize("op", SAMPLES)
def test_opcheck(op):
    for sample in SAMPLES[op]:
        opcheck(getattr(ops, op).default, sample())


@pytest.mark.parametrize("op", SAMPLES)
def test_meta_kernel_gives_the_shapes(op):
    for sample in SAMPLES[op]:
        arguments = sample()
        real = getattr(ops, op)(*arguments)
        there = [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta") if torch.is_tensor(a) else a for a in arguments]
        meta = getattr(ops, op)(*there)
        for r, m in zip(*[(t,) if isinstance(t, torch.Tensor) else t for t in (real, meta)], strict=True):
            assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())


def test_opcheck_of_the_differentiable():
    opcheck(ops.power_of_two.default, (torch.randn(4, 9).requires_grad_(), True))
    opcheck(ops.fake_quantize.default, (torch.randn(4, 9).requires_grad_(), "po2plus", 4, True))
    opcheck(ops.fake_quantize.default, (images(torch.bfloat16).requires_grad_(), "uniform", 4, False))
    opcheck(ops.lsq.default, (images().requires_grad_(), STEP, ONE, 15, 0.1))
    opcheck(ops.binarize.default, (images(torch.float16).requires_grad_(), 3.9, True, 1.0))
    opcheck(ops.dorefa.default, (images().requires_grad_(), 2, True))
    opcheck(ops.dorefa.default, (torch.randn(4, 9).requires_grad_(), 1, False))
    for polynomial in (False, True):
        opcheck(ops.sign_activation.default, (images().requires_grad_(), polynomial))
    opcheck(ops.unit_activation.default, (gaps().requires_grad_(), 15))
    opcheck(ops.quantize_gradient.default, (images().requires_grad_(), 4, SEED))


@pytest.mark.parametrize("op", COMPOSITE)
def test_compiles(op):
    compiled = torch.compile(lambda x: COMPOSITE[op](x) * 2, fullgraph=True, backend="aot_eager")
    for make in (images, gaps):
        x = make().requires_grad_()
        y, want = compiled(x), COMPOSITE[op](x) * 2
        assert torch.equal(y, want)
        assert torch.equal(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (y, want)))


def test_second_derivatives():
    x = torch.randn(4, 9, requires_grad=True)
    (gradient,) = torch.autograd.grad(COMPOSITE["power_of_two"](x).square().sum(), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(gradient.sum(), x)[0], torch.full((4, 9), 2.0))  # straight through, and again
    for op in COMPOSITE.keys() - {"power_of_two"}:
        with pytest.raises(RuntimeError, match=f"{op}: (the backward of a quantized .*|a quantized gradient) is not differentiable"):
            torch.autograd.grad(COMPOSITE[op](x).square().sum(), x, create_graph=True)


FLOAT = torch.ones(3, 2)
PARTS = (torch.ones(3), torch.ones(3, 1), torch.ones(1))  # scale, mean, limit
ERRORS = [
    ("round_power_of_two", (FLOAT.int(), True), TypeError, "power_of_two: x must be float32, float16 or bfloat16; got Int"),
    ("channel_quantize", (FLOAT.int(), "po2", 4, True), TypeError, "w must be float32, float16 or bfloat16; got Int"),
    ("channel_quantize", (FLOAT, "po3", 4, True), ValueError, "codebook must be uniform, po2, po2plus or ternary; got po3"),
    ("channel_quantize", (FLOAT, "po2", 1, True), ValueError, "bits must be between 2 and 8; got 1"),
    ("channel_quantize", (FLOAT, "po2", 9, True), ValueError, "bits must be between 2 and 8; got 9"),
    ("clip_gradient", (FLOAT.half(), FLOAT, torch.ones(3)), TypeError, "grad must be Float; got Half"),
    ("clip_gradient", (FLOAT.t(), FLOAT, torch.ones(3)), ValueError, r"grad must be \[3, 2\]; got \[2, 3\]"),
    ("clip_gradient", (FLOAT[:2], FLOAT, torch.ones(3)), ValueError, r"grad must be \[3, 2\]; got \[2, 2\]"),
    ("clip_gradient", (FLOAT, FLOAT, torch.ones(2)), ValueError, r"limit must have 3 elements; got \[2\]"),
    ("clip_gradient", (FLOAT, FLOAT, torch.ones(3).double()), TypeError, "limit must be Float; got Double"),
    ("lsq_quantize", (FLOAT.double(), HALF, ONE, 15), TypeError, "x must be float32, float16 or bfloat16; got Double"),
    ("lsq_quantize", (FLOAT, HALF, ONE, 0), ValueError, "levels must be between 1 and 65535; got 0"),
    ("lsq_quantize", (FLOAT, HALF, ONE, 65536), ValueError, "levels must be between 1 and 65535; got 65536"),
    ("lsq_quantize", (FLOAT, HALF.half(), ONE, 15), TypeError, "step must be Float; got Half"),
    ("lsq_quantize", (FLOAT, torch.ones(3), ONE, 15), ValueError, r"step must have 1 elements; got \[3\]"),
    ("lsq_quantize", (FLOAT, HALF, torch.ones(2), 15), ValueError, r"zero_point must have 1 elements; got \[2\]"),
    ("lsq_backward", (FLOAT.half(), FLOAT, HALF, ONE, 15, 0.1), TypeError, "grad must be Float; got Half"),
    ("lsq_backward", (FLOAT.t(), FLOAT, HALF, ONE, 15, 0.1), ValueError, r"grad must be \[3, 2\]; got \[2, 3\]"),
    ("binary_quantize", (FLOAT.int(), 1.0, False), TypeError, "binary: w must be float32, float16 or bfloat16; got Int"),
    ("binary_quantize", (FLOAT, 0.0, False), ValueError, "binary: share must be above 0; got 0"),
    ("binary_backward", (FLOAT.t(), FLOAT, *PARTS, 1.0), ValueError, r"grad must be \[3, 2\]; got \[2, 3\]"),
    ("binary_backward", (FLOAT.half(), FLOAT, *PARTS, 1.0), TypeError, "grad must be Float; got Half"),
    ("binary_backward", (FLOAT, FLOAT, torch.ones(2), *PARTS[1:], 1.0), ValueError, r"scale must have 3 elements; got \[2\]"),
    ("binary_backward", (FLOAT, FLOAT, PARTS[0], torch.ones(6), PARTS[2], 1.0), ValueError, r"mean must have 3 elements; got \[6\]"),
    ("dorefa_quantize", (FLOAT, 0, True), ValueError, "dorefa: bits must be between 1 and 16; got 0"),
    ("dorefa_quantize", (FLOAT.double(), 2, True), TypeError, "dorefa: w must be float32, float16 or bfloat16; got Double"),
    ("dorefa_backward", (FLOAT, FLOAT, torch.ones(2)), ValueError, r"stats must have 3 elements; got \[2\]"),
    ("dorefa_backward", (FLOAT.t(), FLOAT, torch.ones(3)), ValueError, r"grad must be \[3, 2\]; got \[2, 3\]"),
    ("dorefa_gradient", (FLOAT, 1, SEED), ValueError, "dorefa_gradient: bits must be between 2 and 16; got 1"),
    ("dorefa_gradient", (FLOAT, 2, SEED[:1]), ValueError, r"seed must be an int64 CPU tensor \(seed, offset\); got Long \[1\]"),
    ("quantize_gradient", (FLOAT.int(), 2, SEED), TypeError, "grad must be float32, float16 or bfloat16; got Int"),
    ("sign_quantize", (FLOAT.int(), True), TypeError, "sign_quantize: x must be float32, float16 or bfloat16; got Int"),
    ("unit_quantize", (FLOAT, 0), ValueError, "unit_quantize: levels must be between 1 and 65535; got 0"),
    ("grid_backward", (FLOAT, torch.zeros(1), False), TypeError, "kept must be Byte; got Float"),
    ("grid_backward", (FLOAT, torch.zeros(2, dtype=torch.uint8), False), ValueError, r"kept must have 1 elements; got \[2\]"),
]


@pytest.mark.parametrize(("op", "arguments", "error", "message"), ERRORS)
def test_errors(op, arguments, error, message, on_device):
    with pytest.raises(error, match=message):
        getattr(ops, op)(*on_device(arguments))
