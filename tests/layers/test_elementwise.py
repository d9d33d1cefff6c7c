"""Sigmoid, tanh, ELU, softplus and cubes by their packed derivative, PReLU by a bit and its packed input, addmm as a linear layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from calls import Call, CallWith
from exact_levels import EXACT, assert_same, keeps, levels, run
from torch import nn

import quantize


def config(bits, **more):
    return quantize.ActivationConfig(bits=bits, max_bits=bits, **more)


FUNCTIONS = {
    "sigmoid": nn.Sigmoid(), "torch.sigmoid": CallWith(lambda m, x: torch.sigmoid(x)), "x.sigmoid": CallWith(lambda m, x: x.sigmoid()),
    "F.sigmoid": CallWith(lambda m, x: F.sigmoid(x)), "tanh": nn.Tanh(), "torch.tanh": CallWith(lambda m, x: torch.tanh(x)),
    "F.tanh": CallWith(lambda m, x: F.tanh(x)), "elu": nn.ELU(), "F.elu": CallWith(lambda m, x: F.elu(x)), "softplus": nn.Softplus(),
    "F.softplus": CallWith(lambda m, x: F.softplus(x)), "x ** 3": CallWith(lambda m, x: x**3),
    "pow": CallWith(lambda m, x: torch.pow(x, 3.0)),
}  # fmt: skip
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "turned": lambda x: x.transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_plain_within_a_step(name, layout):
    x = LAYOUTS[layout](torch.randn(3, 8, 10, 12) * 2)
    plain = nn.Sequential(copy.deepcopy(FUNCTIONS[name]))
    ours = quantize.QModule(copy.deepcopy(plain), config(8, group_size=64))
    y, (grad,), _ = run(plain, x)
    got, (got_grad,), saved = run(ours, x)
    assert torch.equal(got, y) and got.stride() == y.stride()
    assert keeps(saved, ours, x) == {torch.uint8}
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    largest = 3 * float(x.abs().max()) ** 2 if "3" in name or name == "pow" else 1
    assert ((got_grad - grad).abs() <= 1.02 * largest / 255 * up.abs() + 1e-6).all()


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "elu", "softplus", "x ** 3"])
def test_gradients_are_unbiased(name):
    # Of 64 random sums over the elements the mean of 400 draws is normal around the exact one. False alarm at five deviations: 4e-5.
    x = torch.randn(4, 10, 60) * 2
    signs = torch.randint(2, (x.numel(), 64)) * 2.0 - 1
    plain = nn.Sequential(copy.deepcopy(FUNCTIONS[name]))
    exact = run(plain, x)[1][0].flatten() @ signs
    model = quantize.QModule(plain, config(2, group_size=64))
    draws = torch.stack([run(model, x)[1][0].flatten() @ signs for _ in range(400)])
    assert draws.std(0).min() > 0
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / 20).all()


@pytest.mark.parametrize("function", [
    lambda m, x: x.mean((2, 3), keepdim=True).sigmoid(), lambda m, x: F.elu(x, 0.5), lambda m, x: F.softplus(x, 2.0),
    lambda m, x: (x + 0).tanh_(), lambda m, x: F.elu(x + 0, inplace=True), lambda m, x: x.double().tanh(), lambda m, x: x**4,
    lambda m, x: torch.tanh(x.detach(), out=torch.empty(0)) + x, lambda m, x: x[:, 0, 0].sigmoid(),
])  # fmt: skip
def test_what_is_left_to_pytorch(function):
    x = torch.randn(3, 4, 8, 9)
    y, (grad,), _ = run(CallWith(function), x)
    ours = quantize.QModule(CallWith(function), config(2))
    got, (got_grad,), saved = run(ours, x)
    assert torch.equal(got, y) and torch.equal(got_grad, grad)
    assert torch.uint8 not in {t.dtype for t in saved}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slopes", [1, 8])
def test_prelu_at_exact_levels(slopes, layout):
    if slopes == 8 and layout == "turned":
        x = LAYOUTS[layout](levels(3, 10, 8, 12))
    else:
        x = LAYOUTS[layout](levels(3, 8, 10, 12))
    plain = nn.Sequential(nn.PReLU(slopes))
    nn.init.uniform_(plain[0].weight, -0.5, 0.5)
    ours = quantize.QModule(copy.deepcopy(plain), EXACT)
    y, (grad, slope), _ = run(plain, x)
    got, (got_grad, got_slope), saved = run(ours, x)
    assert torch.equal(got, y) and torch.equal(got_grad, grad)
    torch.testing.assert_close(got_slope, slope, rtol=1e-5, atol=1e-3)
    assert keeps(saved, ours, x) == {torch.uint8}
    assert ours.layer_bits() == {"0": 8.0}


def test_prelu_functions_frozen_slopes_and_small_inputs():
    x = levels(3, 8, 10, 12)
    for function in (lambda m, x: F.prelu(x, m.slope), lambda m, x: x.prelu(m.slope), lambda m, x: torch.prelu(x, m.slope)):
        plain = CallWith(function, slope=torch.tensor([0.25]))
        ours = quantize.QModule(copy.deepcopy(plain), EXACT)
        assert keeps(assert_same(ours, plain, x, rtol=1e-5, atol=1e-3), ours, x) == {torch.uint8}
    frozen = nn.Sequential(nn.PReLU(8)).requires_grad_(False)
    ours = quantize.QModule(copy.deepcopy(frozen), config(2))
    saved = assert_same(ours, frozen, x)
    assert sum(t.numel() for t in saved if t.dtype == torch.uint8) == x.numel() // 8  # the mask, and nothing of the input
    for small in (torch.randn(5), torch.randn(()), torch.randn(0, 8)):
        plain = nn.Sequential(nn.PReLU())
        assert_same(quantize.QModule(copy.deepcopy(plain), config(2)), plain, small)
    with pytest.raises(RuntimeError, match="Mismatch of parameter numbers"):
        quantize.QModule(nn.Sequential(nn.PReLU(5)), config(2))(x)


def test_prelu_learns_its_bits():
    model = quantize.QModule(nn.Sequential(nn.PReLU(8)), quantize.ActivationConfig(bits=2))
    x = torch.randn(8, 8, 16, 16) * torch.logspace(-2, 1, 8)[:, None, None, None]
    for _ in range(3):
        model(x).square().sum().backward()
    (state,) = model._control.layers
    model._control.begin_step()
    assert state.updates == 3
    assert state.used[-1] > state.used[0]


def test_the_report_tells_what_prelu_keeps():
    model, x = quantize.QModule(nn.Sequential(nn.PReLU(8)), config(4)), torch.randn(8, 8, 32, 32)
    (row,) = quantize.memory_report(model, x).layers
    assert (row.name, row.op, row.bits, row.reason) == ("0", "prelu", 4.0, "")
    assert x.numel() * 5 / 8 <= row.bytes < x.numel() * 5.2 / 8  # and the mask's bit


def test_prelu_under_autocast():
    plain, x = nn.Sequential(nn.PReLU(8)), torch.randn(3, 8, 10, 12)
    ours = quantize.QModule(copy.deepcopy(plain), config(8))
    saved = []
    for input in (x, x.bfloat16()):
        saved.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
                y = ours(input)
            assert y.dtype == torch.bfloat16 and torch.equal(y, plain(input))
        assert torch.uint8 in {t.dtype for t in saved}
        y.sum().backward()
        assert ours[0].weight.grad.dtype == torch.float32


def test_addmm_of_old():
    """Factors by position, which PyTorch warns of, and a base of two dimensions."""
    bias, x, weight = torch.randn(50), torch.randn(8, 40, requires_grad=True), nn.Parameter(torch.randn(40, 50))
    model = quantize.QModule(Call(lambda x: torch.addmm(1, bias, 1, x, weight)), config(2))
    assert torch.equal(model(x), torch.addmm(bias, x, weight))


def test_addmm_is_a_linear_layer():
    x = levels(3, 8, 40)
    parameters = {"weight": torch.randn(40, 50), "bias": torch.randn(50)}
    plain = CallWith(lambda m, x: torch.addmm(m.bias, x.view(-1, 40), m.weight).view(3, 8, 50), **parameters)
    ours = quantize.QModule(copy.deepcopy(plain), config(8, group_size="tensor"))
    y, grads, _ = run(plain, x)
    got, got_grads, saved = run(ours, x)
    assert torch.equal(got, y)
    for a, b in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert keeps(saved, ours, x) == {torch.uint8}
    for other in (
        lambda m, x: torch.addmm(m.bias, x[0], m.weight, alpha=2), lambda m, x: torch.addmm(m.bias.expand(8, 50), x[0], m.weight),
        lambda m, x: torch.addmm(m.bias, x[0], m.weight * 1),
    ):  # fmt: skip
        plain = CallWith(other, **parameters)
        assert torch.uint8 not in {t.dtype for t in assert_same(quantize.QModule(copy.deepcopy(plain), config(8)), plain, x)}
