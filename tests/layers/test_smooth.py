"""SiLU, hardswish, Mish, GELU: outputs bit-equal, gradients unbiased and off by at most a step of the packed derivative."""

import pytest
import torch
import torch.nn.functional as F
from calls import Call
from exact_levels import keeps, run
from torch import nn

import quantize

FUNCTIONS = {
    "silu": nn.SiLU(), "silu, in place": nn.SiLU(inplace=True), "hardswish": nn.Hardswish(), "hardswish, in place": nn.Hardswish(True),
    "mish": nn.Mish(), "mish, in place": nn.Mish(inplace=True), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"),
}  # fmt: skip
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 2),
    "samples inside": lambda x: x.transpose(0, 1),
    "sliced": lambda x: x[:, :, ::2],
}


def fixed(bits):
    return quantize.ActivationConfig(bits=bits, max_bits=bits, group_size=64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_plain_within_a_step(name, layout):
    x = LAYOUTS[layout](torch.randn(3, 4, 10, 12) * 3)
    layer = FUNCTIONS[name]
    plain, ours = nn.Sequential(nn.Identity(), layer), quantize.QModule(nn.Sequential(nn.Identity(), layer), fixed(8))
    ours.inplace = plain.inplace = getattr(layer, "inplace", False)
    y, (grad,), _ = run(plain, x)
    got, (got_grad,), saved = run(ours, x)
    assert torch.equal(got, y)
    assert got.stride() == y.stride()
    assert keeps(saved, ours, x) == {torch.uint8}
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    step = 1.02 * 2 / 255  # hardswish has the widest derivative, from -0.5 to 1.5
    assert ((got_grad - grad).abs() <= step * up.abs() + 1e-6).all()


@pytest.mark.parametrize("function", [
    F.silu, F.hardswish, F.mish, F.gelu, lambda x: F.gelu(x, approximate="tanh"), lambda x: F.silu(x + 0, inplace=True),
    lambda x: F.hardswish(x + 0, True),
])  # fmt: skip
def test_functional_calls(function):
    x = torch.randn(3, 4, 10, 12)
    ours = quantize.QModule(Call(function), fixed(2))
    y, (grad,), saved = run(ours, x)
    assert torch.equal(y, function(x))
    assert keeps(saved, ours, x) == {torch.uint8}
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", ["silu", "hardswish", "mish", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("bits", [1, 2])
def test_gradients_are_unbiased(name, bits):
    # Null: the sum over 400 draws of (draw - exact), weighted by 1, is normal with the variance that group_variance gives exactly.
    # False alarm at five deviations: below 1e-6 a case.
    x = torch.randn(4, 600) * 2
    derivative = torch.ops.quantize.smooth_derivative(x, name)
    variance = torch.ops.quantize.group_variance(derivative, 64)[:, {1: 0, 2: 1}[bits]].sum()
    model = quantize.QModule(Call(FUNCTIONS[name]), fixed(bits))
    leaf = x.clone().requires_grad_()
    total = sum(float((torch.autograd.grad(model(leaf).sum(), leaf)[0] - derivative).double().sum()) for _ in range(400))
    assert abs(total) < 5 * float(variance * 400) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    x = torch.randn(3, 400).to(dtype)
    ours = quantize.QModule(Call(F.silu), fixed(8))
    y, (grad,), _ = run(ours, x)
    plain, (plain_grad,), _ = run(Call(F.silu), x)
    assert torch.equal(y, plain)
    torch.testing.assert_close(grad, plain_grad, atol=0 if dtype == torch.float64 else 0.05, rtol=0 if dtype == torch.float64 else 0.02)


def test_layers_have_their_names_and_configs():
    model = nn.Sequential(nn.Linear(40, 50), nn.SiLU(), nn.Linear(50, 60), nn.GELU())
    model = quantize.QModule(model, {"*": fixed(2), "3": fixed(4), "1": None})
    x = torch.randn(3, 40, requires_grad=True)
    model(x).sum().backward()
    assert model.layer_bits() == {"0": 2.0, "2": 2.0, "3": 4.0}
    report = quantize.memory_report(model, x)
    assert {(row.name, row.op, row.bits) for row in report.layers if row.name in "13"} == {("1", "silu", 32.0), ("3", "gelu", 4.0)}


def test_adaptive_bits_are_used_and_learned():
    model = quantize.QModule(nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU()))
    for _ in range(3):
        model(torch.randn(16, 64)).square().sum().backward()
    model._control.begin_step()
    state = {s.name: s for s in model._control.states()}["3"]
    assert state.updates == 3
    assert all(a >= b >= 0 for a, b in zip(state.curve, state.curve[1:], strict=False))


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (5,)])
@pytest.mark.parametrize("name", ["silu", "hardswish", "mish", "gelu", "gelu_tanh"])
def test_few_elements(name, shape):
    layer, x = FUNCTIONS[name], torch.randn(shape)
    y, (grad,), _ = run(Call(layer), x)
    got, (got_grad,), _ = run(quantize.QModule(Call(layer), fixed(8)), x)
    assert torch.equal(got, y)
    torch.testing.assert_close(got_grad, grad, atol=0.01, rtol=0)


@pytest.mark.parametrize("name", ["silu", "hardswish", "mish", "gelu", "gelu_tanh"])
def test_nan_stays_in_its_group_and_huge_values_are_finite(each_isa, name):
    x = torch.cat([torch.full((64,), 1e30), torch.full((64,), -1e30), torch.randn(64)])
    x[130] = torch.nan
    derivative = torch.ops.quantize.smooth_derivative(x, name)
    assert derivative.isnan().nonzero().tolist() == [[130]]
    torch.testing.assert_close(derivative[:128], torch.cat([torch.ones(64), torch.zeros(64)]), atol=1e-6, rtol=0)
    leaf = x[None].clone().requires_grad_()
    quantize.QModule(Call(FUNCTIONS[name]), fixed(2))(leaf).sum().backward()
    assert leaf.grad[0].isnan().tolist() == [False] * 128 + [True] * 64


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group_size", [1, 7, 64, 5000, 0, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_made_and_packed_at_once(each_isa, dtype, group_size, layout):
    ops, seed = torch.ops.quantize, torch.tensor([3, 4])
    x = LAYOUTS[layout](torch.randn(3, 6, 31, 150) * 2).to(dtype)  # samples of more than a part, all of them more than a piece
    grad = torch.randn_like(x)
    for bits in (1, 2, 4, 8):
        codes, ranges = ops.smooth_quantize(x, "silu", bits, group_size, seed)
        derivative = ops.smooth_derivative(x, "silu")
        want_codes, want_ranges = ops.group_quantize(derivative, bits, group_size, seed)
        assert torch.equal(codes, want_codes) and torch.equal(ranges, want_ranges)
        got = ops.smooth_backward(grad, codes, ranges, None, bits, group_size, seed)
        dense = derivative.stride()
        unpacked = ops.group_dequantize(codes, ranges, None, bits, group_size, x.shape, dense, dtype, seed)
        assert torch.equal(got, unpacked * grad) and got.stride() == dense


def test_product_with_bits_of_each_sample(each_isa):
    ops, seed = torch.ops.quantize, torch.tensor([3, 4])
    x, bits = torch.randn(4, 3000), torch.tensor([1, 8, 2, 4], dtype=torch.uint8)
    codes, ranges = ops.group_quantize_mixed(x, bits, 15, 64, seed)
    unpacked = ops.group_dequantize(codes, ranges, bits, 0, 64, x.shape, x.stride(), x.dtype, seed)
    assert torch.equal(ops.smooth_backward(x, codes, ranges, bits, 0, 64, seed), unpacked * x)


def test_bad_arguments():
    x, seed = torch.randn(3, 64), torch.tensor([3, 4])
    codes, ranges = torch.ops.quantize.group_quantize(x, 2, 64, seed)
    for bad, message in (
        (lambda: torch.ops.quantize.smooth_derivative(x, "relu"), "function must be silu"),
        (lambda: torch.ops.quantize.smooth_quantize(x, "relu", 2, 64, seed), "function must be silu"),
        (lambda: torch.ops.quantize.smooth_quantize(x, "silu", 3, 64, seed), "bits must be"),
        (lambda: torch.ops.quantize.smooth_backward(torch.randn(4, 64), codes, ranges, None, 2, 64, seed), "smooth_backward"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
