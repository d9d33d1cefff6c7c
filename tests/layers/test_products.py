"""Products of two activations, squares and softmax: outputs bit-equal, gradients those of packed operands and unbiased."""

import copy

import pytest
import torch
import torch.nn.functional as F
from calls import Call
from exact_levels import EXACT, keeps, levels, run
from torch import nn

import quantize


def config(bits, **more):
    return quantize.ActivationConfig(bits=bits, max_bits=bits, **more)


def halves(x):
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def ends(x):
    """Levels in both halves of each sample, with both ends of their range."""
    y = levels(*x)
    for half in halves(y):
        rows = half.flatten(1)
        half[(slice(None), *[0] * (half.dim() - 1))], half[(slice(None), *[-1] * (half.dim() - 1))] = y.min(), y.max()
        assert rows.shape[0] == x[0]
    return y


def product(x):
    a, b = halves(x)
    return a * b


def matrices(x):
    a, b = halves(x)
    return a @ b.transpose(-1, -2)


def broadcast(x):
    a, b = halves(x)
    return a.unsqueeze(1) @ b[0].mT


FUNCTIONS = {
    "a * b": product,
    "torch.mul": lambda x: torch.mul(*halves(x)),
    "a @ b": matrices,
    "torch.matmul": lambda x: torch.matmul(halves(x)[0], halves(x)[1].mT),
    "bmm": lambda x: halves(x)[0].bmm(halves(x)[1].mT),
    "torch.bmm": lambda x: torch.bmm(halves(x)[0], halves(x)[1].mT),
    "x * x": lambda x: x * x,
    "square": lambda x: x.square() + torch.square(x),
    "power": lambda x: x**2 + torch.pow(x, 2.0) + x.pow(2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_plain_at_exact_levels(name):
    x = ends((3, 20, 128))
    plain = Call(FUNCTIONS[name])
    y, grads, _ = run(plain, x)
    ours = quantize.QModule(copy.deepcopy(plain), EXACT)
    got, got_grads, saved = run(ours, x)
    assert torch.equal(got, y) and got.stride() == y.stride()
    torch.testing.assert_close(got_grads[0], grads[0], rtol=1e-6, atol=1e-5)  # sums of matrices in another order
    assert keeps(saved, ours, x) == {torch.uint8}


def test_broadcast_batches():
    x = ends((3, 20, 128))
    y, grads, _ = run(Call(broadcast), x)
    ours = quantize.QModule(Call(broadcast), config(8, group_size="tensor"))
    got, got_grads, saved = run(ours, x)
    assert torch.equal(got, y)
    assert keeps(saved, ours, x) == {torch.uint8}
    torch.testing.assert_close(got_grads[0], grads[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("function", [product, matrices, lambda x: x.square()], ids=["product", "matrices", "square"])
def test_gradients_are_unbiased(function):
    # Of 64 random sums over the elements the mean of 400 draws is normal around the exact one. False alarm at five deviations: 4e-5.
    x = torch.randn(3, 20, 128)
    signs = torch.randint(2, (x.numel(), 64)) * 2.0 - 1
    exact = run(Call(function), x)[1][0].flatten() @ signs
    model = quantize.QModule(Call(function), config(2, group_size=32))
    draws = torch.stack([run(model, x)[1][0].flatten() @ signs for _ in range(400)])
    assert draws.std(0).min() > 0.01 * exact.abs().mean()
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / 20).all()


@pytest.mark.parametrize("function", [
    lambda x: F.softmax(x, -1), lambda x: F.softmax(x, dim=1), lambda x: torch.softmax(x, 2), lambda x: x.softmax(dim=-1),
    lambda x: F.softmax(x, -1, dtype=torch.float32), nn.Softmax(-1),
])  # fmt: skip
def test_softmax(function):
    x = torch.randn(3, 40, 50) * 2
    y, (grad,), _ = run(Call(function), x)
    ours = quantize.QModule(Call(function), config(2))
    got, (got_grad,), saved = run(ours, x)
    assert torch.equal(got, y)
    assert keeps(saved, ours, x) == {torch.uint8}
    assert F.cosine_similarity(got_grad.flatten(), grad.flatten(), dim=0) > 0.999
    mean = torch.stack([run(ours, x)[1][0] for _ in range(100)]).mean(0)
    assert (mean - grad).norm() / grad.norm() < 0.005


def test_an_attention_that_is_written_out():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

        def forward(self, x):
            query, key, value = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
            scores = F.dropout((query @ key.mT / 4).softmax(-1), 0.1)
            return self.out((scores @ value).transpose(1, 2).flatten(2))

    plain, x = Attention(), torch.randn(8, 100, 64)
    model = quantize.QModule(copy.deepcopy(plain), config(2))
    report = quantize.memory_report(model, x)
    assert report.ratio > 5  # 8 bits of the softmax, two of it after the dropout and its bit, of 64
    assert not [row for row in report.layers if row.reason and row.bytes > 4096]
    model(x).square().mean().backward()
    assert model.layer_bits() == {"qkv": 2.0, "out": 2.0, "matmul#1": 2.0, "softmax#2": 8.0, "matmul#3": 2.0}


def test_expanded_factors_are_kept_small():
    """A gate expanded over its positions, as in ECA's attention, is a gate."""
    x = torch.randn(4, 32, 16, 16)
    model = quantize.QModule(Call(lambda x: (x + 1) * x.mean((2, 3), keepdim=True).exp().expand_as(x)), config(2))
    _, _, saved = run(model, x)
    assert sum(t.numel() for t in saved if t.dtype == torch.uint8) == x.numel() // 4
    a = torch.randn(1, 20, 64).expand(8, 20, 64)
    _, _, saved = run(quantize.QModule(Call(lambda b: a.detach().requires_grad_() @ b.mT), config(2)), torch.randn(8, 20, 64))
    assert torch.uint8 not in {t.dtype for t in saved}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x = ends((3, 20, 128)).to(dtype)
    for function in (product, matrices, lambda x: F.softmax(x, -1)):
        y, (grad,), _ = run(Call(function), x)
        got, (got_grad,), _ = run(quantize.QModule(Call(function), EXACT), x)
        assert torch.equal(got, y)
        torch.testing.assert_close(got_grad, grad, rtol=0.02, atol=0.05)


def test_autocast():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 128)

        def forward(self, x):
            y = matrices(self.a(x)).softmax(-1)
            return y @ product(self.a(x))

    plain, x = Net(), torch.randn(3, 20, 64)
    ours = quantize.QModule(copy.deepcopy(plain), config(8))
    for model in (plain, ours):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        y.float().square().sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain(x), ours(x))
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert a.grad.dtype == b.grad.dtype and F.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0) > 0.999


def test_what_autocast_computes_in_float32(monkeypatch):
    """As on CUDA: PyTorch's own cast is made here, where CPUs have none."""
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: op in ("aten::pow.Tensor_Scalar", "aten::softmax.int")
    )
    x = torch.randn(3, 20, 64).bfloat16().requires_grad_()
    for function in (lambda x: x**2, lambda x: x**3, lambda x: x.softmax(-1)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = quantize.QModule(Call(function), config(8))(x)
        assert y.dtype == torch.float32 and torch.equal(y, function(x.detach().float()))
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "function", [product, matrices, lambda x: x.square(), lambda x: x.softmax(-1)], ids=["*", "@", "square", "softmax"]
)
def test_nan_and_inf_stay_in_their_sample(function):
    for bad in (torch.nan, torch.inf):
        x = torch.randn(4, 20, 128)
        x[1, 3, 5] = x[1, 3, 70] = bad
        model = quantize.QModule(Call(function), config(2))
        _, (grad,), _ = run(model, x)
        assert grad[[0, 2, 3]].isfinite().all()
        assert not grad[1].isfinite().all()


@pytest.mark.parametrize("function", [
    lambda x: x * x.detach(), lambda x: x[0] @ x[1].T, lambda x: x.double() * x.double(), lambda x: x @ x[0, 0, :], lambda x: x**4,
    lambda x: 2**x, lambda x: x.abs().pow(x), lambda x: F.softmax(x[0, 0], 0), lambda x: x[:0] @ x[:0].mT,
    lambda x: x.softmax(-1, dtype=torch.float64), lambda x: torch.square(x.detach(), out=torch.empty(0)) * x.detach() + x,
])  # fmt: skip
def test_what_is_left_to_pytorch(function):
    x = torch.randn(3, 20, 64)
    y, (grad,), _ = run(Call(function), x)
    ours = quantize.QModule(Call(function), config(2))
    got, (got_grad,), saved = run(ours, x)
    assert torch.equal(got, y) and torch.equal(got_grad, grad)
    assert torch.uint8 not in {t.dtype for t in saved}


@pytest.mark.parametrize("function", [lambda x: x @ x, lambda x: x.bmm(x), lambda x: x.softmax(7), lambda x: torch.bmm(x[0], x[0])])
def test_errors_are_pytorch_s(function):
    x = torch.randn(3, 20, 64, requires_grad=True)
    with pytest.raises((RuntimeError, IndexError)) as plain:
        function(x)
    with pytest.raises((RuntimeError, IndexError)) as ours:
        quantize.QModule(Call(function), config(2))(x)
    assert str(ours.value) == str(plain.value)


def test_layers_that_are_told_to_stay_plain():
    model = quantize.QModule(nn.Sequential(Call(product)), {"*": config(2), "": None})
    assert torch.uint8 not in {t.dtype for t in run(model, torch.randn(3, 20, 64))[2]}


def test_bad_arguments():
    x = torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match="product: packed must be codes, ranges and seed of 2 inputs, .* got 1 tensors and 2 numbers"):
        torch.ops.quantize.product(x, x, False, [x], [2, 2], 16)
