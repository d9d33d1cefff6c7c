"""Binary weights and signs against short twins whose gradients autograd finds; prepare(XNOR()); on every ISA."""

import copy
import math

import pytest
import torch
from same_bits import assert_isas_agree, needs_isas
from torch import nn

import quantize
from quantize import XNOR, binary
from quantize.weight.binary import SignQuantizer

ops = torch.ops.quantize
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (5, 257), (16, 16, 3, 3), (8, 1, 3, 3), (4, 33, 5), (2, 3, 2, 2, 2), (9,)]
NASTY = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.0000001, -1.0000001, 0.5, 3e38, -3e38, 1e-45, -1e-45, torch.inf, -torch.inf, torch.nan])


def twin(w, tau=None):
    """Section 3.1 of arXiv 1603.05279 with straight-through signs, and ReCU's clamp; in float64."""
    rows = w.double() if w.dim() > 1 else w.double().reshape(1, -1)
    v = rows - rows.mean(1, keepdim=True) if w.dim() > 1 and w.shape[1] > 1 else rows
    limit = 1.0 if tau is None else -math.log(2 - 2 * tau) * float(v.detach().abs().mean())
    c = v.clamp(-limit, limit)
    sign = torch.where(c < 0, -1.0, 1.0).double()
    alpha = torch.where(c < 0, -c, c).flatten(1).mean(1).view(-1, *[1] * (c.dim() - 1))
    return ((c + (sign - c).detach()) * alpha).view(w.shape)


def both(w, grad, ours, reference):
    results = []
    for function in (ours, reference):
        own = w.clone().requires_grad_()
        y = function(own)
        results += [y.detach().double(), torch.autograd.grad(y, own, grad.to(y.dtype))[0].double()]
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_twin(each_isa, shape, dtype):
    w, grad = (torch.randn(shape) * 0.7).to(dtype), torch.randn(shape).to(dtype)
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for tau in (None, 0.85, 0.99):
        share = 1.0 if tau is None else -math.log(2 - 2 * tau)
        y, grad_w, want, want_grad = both(
            w, grad, lambda x, s=share, t=tau: ops.binarize(x, s, t is not None, 1.0), lambda x, t=tau: twin(x, t)
        )
        torch.testing.assert_close(y, want, rtol=tolerance, atol=0)
        torch.testing.assert_close(grad_w, want_grad, rtol=tolerance, atol=tolerance * 4)
    assert torch.equal(binary(w), ops.binarize(w, 1.0, False, 1.0))


def test_gradient_is_the_derivative_of_the_scale():
    # Signs fixed, a small step moves y only through alpha: what the paper's formula leaves out is in the difference quotient.
    w, grad = torch.randn(3, 40).double() * 0.3, torch.randn(3, 40).double()
    direction = torch.randn(3, 40).double()
    v = w - w.mean(1, keepdim=True)
    direction = torch.where(v.abs() > 1e-2, direction, 0)
    direction -= torch.where(v.abs() > 1e-2, direction.sum(1, keepdim=True) / (v.abs() > 1e-2).sum(1, keepdim=True), 0)  # the mean stays
    step = 1e-5
    quotient = float((grad * (twin(w + step * direction) - twin(w - step * direction))).sum()) / (2 * step)
    own = w.float().requires_grad_()
    (whole,) = torch.autograd.grad(binary(own), own, grad.float())
    alpha = v.abs().mean(1, keepdim=True)
    through_signs = float((grad * alpha * direction).sum())
    assert float((whole.double() * direction).sum()) - through_signs == pytest.approx(quotient, rel=1e-4, abs=1e-5)


def test_edges(each_isa):
    assert torch.equal(binary(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert torch.equal(binary(torch.tensor([0.5, -0.0, 0.0, -0.3])), torch.tensor([0.2, 0.2, 0.2, -0.2]))
    assert torch.equal(binary(torch.full((3, 8, 3, 3), 0.25)), torch.zeros(3, 8, 3, 3))  # nothing is left of a constant
    assert torch.equal(binary(torch.tensor([[5.0], [-5.0]])), torch.tensor([[1.0], [-1.0]]))  # clamped, not centred
    for bad in (torch.nan, torch.inf, -torch.inf):
        for shape in ((2, 40), (2, 1, 40)):
            w = torch.randn(shape)
            w.view(2, -1)[0, 17] = bad
            assert binary(w)[0].isnan().all() and binary(w)[1].isfinite().all()
    assert binary(torch.zeros(0, 3)).shape == (0, 3) and binary(torch.zeros(3, 0)).shape == (3, 0)
    for wrong in (torch.ones(2).int(), 3.0):
        with pytest.raises(TypeError, match="binary: w must be a floating-point Tensor"):
            binary(wrong)


@needs_isas
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_isa_gives_the_same_bits(dtype):
    weights = [(torch.randn(s) * 0.6).to(dtype) for s in [*SHAPES, (33, 300), (64, 65, 3, 3)]]
    x = torch.cat([torch.randn(10_003), NASTY]).to(dtype)

    def run():
        found = []
        for w in weights:
            for relative in (False, True):
                parts = ops.binary_quantize(w, 1.5, relative)
                found += [*parts, ops.binary_backward(w.flip(0), w, *parts[1:], 3.0)]
        for polynomial in (False, True):
            y, kept = ops.sign_quantize(x, polynomial)
            found += [y, kept, ops.grid_backward(x, kept, polynomial)]
        return found

    assert_isas_agree(run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 8, 15, 16, 17, 31, 1000])
def test_signs_and_their_gradients(each_isa, n, dtype):
    x, grad = (torch.randn(n) * 1.5).to(dtype), torch.randn(n).to(dtype)
    x[:1] = -0.0
    clip = x.clone().requires_grad_()
    y = SignQuantizer()(clip)
    assert torch.equal(y, torch.where(x < 0, -1, 1).to(dtype))
    assert torch.equal(torch.autograd.grad(y, clip, grad)[0], torch.where(x.abs() <= 1, grad, 0))
    smooth = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(SignQuantizer("polynomial")(smooth), smooth, grad)
    fifteenths = (15 - (x.float().abs().clamp(max=1) * 15).round()) * (2 / 15)
    torch.testing.assert_close(got, (grad.float() * fifteenths).to(dtype))
    exact = (2 - 2 * x.float().abs()).clamp(min=0)
    assert float((fifteenths - exact).abs().max()) <= 1 / 15 + 1e-6


def test_signs_of_nasty_values(each_isa):
    for polynomial in (False, True):
        y, kept = ops.sign_quantize(NASTY, polynomial)
        assert y[-1].isnan() and torch.equal(y[:-1], torch.where(NASTY[:-1] < 0, -1.0, 1.0))
        passed = ops.grid_backward(torch.ones_like(NASTY), kept, polynomial)
        if polynomial:
            assert passed.tolist() == pytest.approx([2, 2, 0, 0, 0, 0, 14 / 15, 0, 0, 2, 2, 0, 0, 2])  # 7.5 fifteenths: to even
        else:
            assert passed.tolist() == [1, 1, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0, 0, 1]


LAYOUTS = {
    "channels_last": lambda: torch.randn(4, 3, 5, 7).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(33, 5).t(),
    "gaps": lambda: torch.randn(6, 8, 10).transpose(0, 2)[..., ::2],
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
}


@pytest.mark.parametrize("polynomial", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_activations(each_isa, name, polynomial):
    x = LAYOUTS[name]().requires_grad_()
    grad = torch.randn(x.shape)  # contiguous, unlike what was kept
    (got,) = torch.autograd.grad(ops.sign_activation(x, polynomial), x, grad)
    flat = x.detach().reshape(-1).requires_grad_()
    (want,) = torch.autograd.grad(ops.sign_activation(flat, polynomial), flat, grad.reshape(-1))
    assert torch.equal(got, want.view(x.shape))


@pytest.mark.parametrize(("gradient", "most"), [("clip", 1), ("polynomial", 4)])
def test_what_is_kept_of_an_input(gradient, most):
    kept = []
    x = torch.randn(8, 16, 9, 9, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        SignQuantizer(gradient)(x)
    assert sum(t.untyped_storage().nbytes() for t in kept) * 8 <= most * x.numel()


def test_threads_do_not_matter():
    w, grad, x = torch.randn(37, 65, 3, 3), torch.randn(37, 65, 3, 3), torch.randn(100_003)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            parts = ops.binary_quantize(w, 3.9, True)
            results.append(
                [*parts, ops.binary_backward(grad, w, *parts[1:], 1.0), *ops.sign_quantize(x, True), *ops.sign_quantize(x, False)]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, groups=2, bias=False), nn.BatchNorm2d(16), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip


TRICKS = [XNOR(), XNOR(None), XNOR(rectify=0.99, sign_gradient="polynomial"), XNOR(rectify=1)]


@pytest.mark.parametrize("config", TRICKS, ids=str)
def test_training(config):
    model = quantize.prepare(net(), {"*": config, "0": None, "5": None})
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x, target = torch.randn(32, 3, 8, 8), torch.randint(10, (32,))
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert quantize.weight_bits(model) == {"2.weight": 1}
    layer = model[2]
    assert hasattr(layer, "activation_quantizer") == (config.activation_bits == 1)
    again = copy.deepcopy(model).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model.eval()(x))


LAYERS = [
    nn.Linear(7, 5),
    nn.Conv1d(4, 6, 3),
    nn.Conv2d(6, 6, 3, groups=6),
    nn.ConvTranspose2d(4, 6, 3),
    nn.ConvTranspose2d(4, 6, 3, groups=2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_levels_times_scales_are_the_weight(layer, dtype):
    layer = quantize.prepare(copy.deepcopy(layer).to(dtype), XNOR(rectify=0.9))
    chain = layer.parametrizations["weight"]
    levels, scales = chain[0].encode(chain.original)
    assert levels.dtype == scales.dtype == torch.float32 and levels.abs().eq(1).all() and len(scales) == len(levels)
    product = (levels * scales.view(-1, *[1] * (levels.dim() - 1))).movedim(0, chain[0].axis)
    assert torch.equal(product.to(dtype), layer.weight)


def test_levels_of_zeros():
    layer = quantize.prepare(nn.Linear(4, 2), XNOR())
    layer.parametrizations["weight"].original.data.zero_()
    levels, scales = layer.parametrizations["weight"][0].encode(layer.parametrizations["weight"].original)
    assert levels.eq(1).all() and scales.eq(0).all()


def test_reference_gradient():
    grads = []
    for reference in (False, True):
        torch.manual_seed(0)
        model = quantize.prepare(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8)), XNOR(None, reference_gradient=reference))
        model(torch.randn(2, 4, 8, 8)).square().sum().backward()
        grads.append([m.parametrizations["weight"].original.grad for m in model])
    torch.testing.assert_close(grads[1][0], grads[0][0] * (1 - 1 / 4) * 36)
    torch.testing.assert_close(grads[1][1], grads[0][1] * 9)  # one input channel: nothing was centred


def test_rectified_weights_of_the_tails_get_no_gradient():
    w = torch.randn(16, 1, 20, 20)
    own = w.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ops.binarize(own, -math.log(2 - 2 * 0.9), True, 1.0).sum(), own)
    limit = -math.log(2 - 2 * 0.9) * w.abs().mean()
    assert torch.equal(grad == 0, w.abs() > limit)


def test_compiles_whole():
    model = quantize.prepare(net(), {"*": XNOR(rectify=0.99, sign_gradient="polynomial"), "0": None})
    x = torch.randn(4, 3, 8, 8)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for own in (model, compiled):
        own(x).sum().backward()
    for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("config", [XNOR(), quantize.DoReFa(2, 2, 6)], ids=str)
def test_compressed_training_and_autocast(config):
    x, target = torch.randn(32, 3, 8, 8), torch.randint(10, (32,))
    model = quantize.prepare(net(), {"*": config, "0": None, "5": None})
    plain = quantize.memory_report(copy.deepcopy(model), x).baseline_bytes
    model = quantize.QModule(model, quantize.ActivationConfig(bits=1, max_bits=1)).train()
    assert quantize.memory_report(model, x).saved_bytes < plain / 8
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nn.functional.cross_entropy(model(x).float(), target).backward()


def test_other_modules_have_weights_alone():
    model = quantize.prepare(nn.ModuleList([nn.LSTM(6, 5), nn.MultiheadAttention(8, 2)]), XNOR())
    assert not any(isinstance(m, SignQuantizer) for m in model.modules())
    model[0](torch.randn(3, 2, 6))[0].sum().backward()
    assert model[0].weight_ih_l0[0].unique().numel() <= 2
    assert ops.binarize(torch.empty(4, 4, device="meta"), 1.0, False, 1.0).is_meta


def test_calibration_leaves_signs_alone():
    model = quantize.prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {"0": XNOR(), "1": quantize.Uniform(4, 4)})
    quantize.calibrate(model, [torch.randn(8, 4)])
    assert model[1].activation_quantizer.initialized and isinstance(model[0].activation_quantizer, SignQuantizer)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"activation_bits": 2}, ValueError, "XNOR: activation_bits must be 1 or None; got 2"),
        ({"activation_bits": True}, TypeError, "XNOR: activation_bits must be 1 or None; got True"),
        ({"rectify": 0.5}, ValueError, "XNOR: rectify must be a number above 0.5, at most 1, or None; got 0.5"),
        ({"rectify": 1.01}, ValueError, "XNOR: rectify must be a number above 0.5, at most 1, or None; got 1.01"),
        ({"rectify": float("nan")}, ValueError, "XNOR: rectify must be a number above 0.5"),
        ({"rectify": "0.9"}, TypeError, "XNOR: rectify must be a number above 0.5"),
        ({"sign_gradient": "tanh"}, ValueError, "XNOR: sign_gradient must be one of 'clip', 'polynomial'; got 'tanh'"),
        ({"reference_gradient": 1}, TypeError, "XNOR: reference_gradient must be a bool; got 1"),
    ],
)
def test_errors_of_the_configuration(arguments, error, message):
    with pytest.raises(error, match=message):
        XNOR(**arguments)


@pytest.mark.parametrize(
    "function", [binary, quantize.ternary, lambda w: quantize.dorefa_weight(w, 3), lambda w: quantize.dorefa_activation(w, 2)]
)
def test_float64_is_computed_in_float32(function):
    w = torch.randn(5, 8, 3).double()
    results = []
    for own in (w.clone().requires_grad_(), w.float().requires_grad_()):
        y = function(own)
        y.square().sum().backward()
        assert y.dtype == own.grad.dtype == own.dtype
        results.append((y.float(), own.grad.float()))
    assert torch.equal(results[0][0], results[1][0]) and torch.allclose(results[0][1], results[1][1], rtol=1e-5)
