"""DoReFa's weights, activations and gradients against short twins whose gradients autograd finds; prepare(DoReFa()); on every ISA."""

import copy
import pickle

import pytest
import torch
from same_bits import assert_isas_agree, needs_isas
from torch import nn
from torch.utils.checkpoint import checkpoint

import quantize
from quantize import DoReFa, dorefa_activation, dorefa_weight
from quantize.seed import draw_seed
from quantize.weight.dorefa import UnitQuantizer, quantize_gradient_of

ops = torch.ops.quantize
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1,), (7,), (3, 17), (16, 3, 3, 3), (65, 129), (2, 5000)]
SEED = torch.tensor([11, 13])


def twin(w, bits, adjusted=False):
    """Section 2.3 of arXiv 1606.06160 and the deviation's factor, in float64."""
    w = w.double()
    if bits == 1:
        return w + (torch.where(w < 0, -1.0, 1.0) * w.abs().mean() - w).detach()
    levels, t = 2**bits - 1, w.tanh()
    v = t / (2 * t.abs().max()) + 0.5
    y = 2 * (v + ((v * levels).round() / levels - v).detach()) - 1
    deviation = w.detach().std(correction=0) / y.detach().std(correction=0) if adjusted and w.numel() > 1 else 1
    return y * deviation


def assert_gradient(got, expected, w, grad, deviation, adjusted):
    """A rounding to the dtype, and float32's of the terms: each weight's own, and for the largest the sum over all that it shares."""
    w, grad, expected = w.double(), grad.double(), expected.detach()
    top = w.tanh().abs().max()
    terms = torch.where(w.abs() == w.abs().max(), grad.norm() / top, grad.abs()) * deviation / top
    # A level that falls to the other side changes the adjustment, by 1e-5 at most here.
    relative = torch.finfo(got.dtype).eps / 2 + (2e-5 if adjusted else 1e-6)
    bound = relative * expected.abs() + 4 * 2.0**-24 * terms + torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    assert ((got.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_as_twin(each_isa, bits, dtype):
    tolerance = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for shape in SHAPES:
        for adjusted in (False, True):
            w, grad = (torch.randn(shape) * 0.4).to(dtype), torch.randn(shape).to(dtype)
            ours, reference = w.clone().requires_grad_(), w.double().requires_grad_()
            y, want = ops.dorefa(ours, bits, adjusted), twin(reference, bits, adjusted)
            if bits == 8 and dtype == torch.float32:  # a value between two levels may fall to either side
                apart = (y.double() - want).abs() > 1e-5
                assert apart.sum() <= 0.002 * apart.numel() + 1
            else:
                torch.testing.assert_close(y.detach().double(), want.detach(), rtol=tolerance, atol=1e-6)
            got, expected = torch.autograd.grad(y, ours, grad)[0], torch.autograd.grad(want, reference, grad.double())[0]
            if bits == 1:
                assert torch.equal(got, grad)
            else:
                assert_gradient(got, expected, w, grad, want.detach().abs().max(), adjusted)  # the largest level is 1 before it is adjusted
        assert torch.equal(dorefa_weight(w, bits), ops.dorefa(w, bits, False))


def test_tanh_is_good_to_a_few_units(each_isa):
    # With one weight that is the largest, 16 bits and no ties: levels give tanh only coarsely, the gradient (1 - t^2) / m finely.
    x = torch.cat([torch.linspace(-9, 9, 200_001), torch.linspace(-1e-3, 1e-3, 20_001), torch.tensor([0.625, -0.625, 1e-30])])
    w = torch.cat([x, torch.tensor([20.0])])  # tanh(20) is 1
    grad = torch.ones_like(w)
    _, _, stats = ops.dorefa_quantize(w, 8, False)
    assert stats[1] == 1
    grad[-1] = 0
    got = ops.dorefa_backward(grad, w, stats)[:-1].double()
    want = 1 - x.double().tanh() ** 2
    # (1 - t)(1 + t) with t good to 2^-23: where t is near 1, that much of 1 is left out.
    assert float((got - want).abs().max()) <= 4 * 2.0**-23
    top = torch.stack([ops.dorefa_quantize(v.view(1), 8, False)[2][1] for v in x[::997]]).double()
    exact = x[::997].double().abs().tanh()
    assert float(((top - exact) / exact.clamp(min=1e-300)).abs().max()) <= 3 * 2.0**-23


def test_levels_are_odd_and_symmetric(each_isa):
    for bits in (2, 3, 4, 8, 16):
        w, top = torch.randn(5000), 2**bits - 1
        y, scale, _ = ops.dorefa_quantize(w, bits, False)
        levels = (y / scale).round()
        assert torch.equal(levels * scale, y) and torch.equal(scale, torch.tensor([1.0]) / top)
        assert levels.remainder(2).eq(1).all() and levels.abs().max() == top
        mirrored = (ops.dorefa_quantize(-w, bits, False)[0] / scale).round()
        if bits <= 8:  # beyond, floats have no room for the fraction that decides
            assert (levels + mirrored).abs().gt(0).sum() <= 3  # ties


def test_edges(each_isa):
    for bits in (2, 4):
        top = 2**bits - 1
        assert torch.equal(dorefa_weight(torch.zeros(3, 4), bits), torch.full((3, 4), 1 / top))  # the level next to zero
        assert torch.equal(dorefa_weight(torch.full((5,), -0.3), bits), torch.full((5,), -1.0))
        assert dorefa_weight(torch.full((5,), 1e-40), bits).isfinite().all()
        zeros = torch.zeros(4, requires_grad=True)
        assert torch.equal(torch.autograd.grad(dorefa_weight(zeros, bits).sum(), zeros)[0], torch.ones(4))
        for adjusted in (False, True):
            for bad in (torch.nan, torch.inf):
                w = torch.randn(5000)
                w[4321] = bad
                assert ops.dorefa(w, bits, adjusted).isnan().all()
        constant = torch.full((40,), 0.7)
        assert torch.equal(ops.dorefa(constant, bits, True), ops.dorefa(constant, bits, False))
    assert torch.equal(dorefa_weight(torch.tensor([-0.0, 0.0, 2.0, -2.0]), 1), torch.tensor([1.0, 1.0, 1.0, -1.0]))
    assert dorefa_weight(torch.tensor([1.0, torch.nan]), 1).isnan().all()
    assert dorefa_weight(torch.zeros(0, 3), 2).shape == (0, 3)


def test_the_largest_share_their_gradient():
    w = torch.tensor([0.8, -0.8, 0.1, 0.3], requires_grad=True)
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    (got,) = torch.autograd.grad(dorefa_weight(w, 4), w, grad)
    t = w.detach().double().tanh()
    top, total = t[0], float((grad * t).sum())
    want = (1 - t * t) * (grad / top)
    want[0] -= (1 - top * top) * total / top**2 / 2
    want[1] += (1 - top * top) * total / top**2 / 2
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("deviation", [0.01, 0.1, 1.0])
def test_adjusted_weights_keep_their_deviation(bits, deviation):
    w = torch.randn(64, 64, 3, 3) * deviation + 0.2 * deviation
    plain, adjusted = ops.dorefa(w, bits, False), ops.dorefa(w, bits, True)
    assert adjusted.std().item() == pytest.approx(w.std().item(), rel=1e-4)
    if deviation < 1:
        assert plain.std() > 1.5 * w.std()  # what makes it diverge
    big = w + 1000 * deviation  # a mean far from zero cancels nothing
    assert ops.dorefa(big * 1e-4, 8, True).std().item() == pytest.approx((big * 1e-4).std().item(), rel=1e-2)


@needs_isas
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_isa_gives_the_same_bits(dtype):
    nasty = torch.tensor([0.0, -0.0, 0.625, 0.62499, 9.99, 10.0, 1e-45, -1e-30, 1e30])
    w, grad = torch.cat([torch.randn(20_011), nasty]).to(dtype), torch.randn(20_020).to(dtype)
    broken = w.clone()
    broken[77] = torch.nan

    def run():
        found = []
        for bits in (1, 2, 5, 8, 16):
            for x in (w, broken):
                for adjusted in (False, True):
                    y, scale, stats = ops.dorefa_quantize(x, bits, adjusted)
                    found += [y, scale, stats, ops.dorefa_backward(grad, x, stats)]
                y, kept = ops.unit_quantize(x, 2**bits - 1)
                found += [y, kept, ops.grid_backward(grad, kept, False)]
                if bits > 1:
                    found += [ops.dorefa_gradient(x.view(20, -1), bits, SEED), ops.dorefa_gradient(x.view(-1, 5), bits, SEED)]
        return found

    assert_isas_agree(run)


def test_threads_do_not_matter():
    w, grad = torch.randn(300, 333), torch.randn(300, 333)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y, scale, stats = ops.dorefa_quantize(w, 3, True)
            results.append([y, scale, stats, ops.dorefa_backward(grad, w, stats), ops.dorefa_gradient(grad, 4, SEED)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_activations(each_isa, bits, dtype):
    levels = 2**bits - 1
    x = torch.cat([torch.randn(1003), torch.tensor([0.0, -0.0, 1.0, 1.001, -0.001, torch.inf, -torch.inf])]).to(dtype)
    grad = torch.randn(len(x)).to(dtype)
    own = x.clone().requires_grad_()
    y = dorefa_activation(own, bits)
    step = torch.tensor(1 / levels)
    want = (x.float() * (1 / step)).round().clamp(0, levels) * step
    assert torch.equal(y, want.to(dtype))
    if 2 <= levels <= 255:  # the packed layers' codes
        assert torch.equal(y, ops.lsq_quantize(x, step, torch.tensor(0.0), levels))
    assert torch.equal(torch.autograd.grad(y, own, grad)[0], torch.where((x >= 0) & (x <= 1), grad, 0))
    broken, kept = ops.unit_quantize(torch.tensor([torch.nan, 0.5]), levels)
    assert broken.isnan().tolist() == [True, False]
    assert kept.tolist() == [3]


def test_what_is_kept_of_an_input():
    kept = []
    x = torch.randn(8, 16, 9, 9, requires_grad=True)
    quantizer = UnitQuantizer(4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantizer(x)
    assert sum(t.untyped_storage().nbytes() for t in kept) * 8 <= x.numel()
    assert not list(quantizer.buffers()) and not quantizer.state_dict()
    assert quantizer.bits == 4 and quantizer.kind == "unit" and quantizer.initialized


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_rounded_without_bias(each_isa, bits):
    g = torch.randn(4, 50) * torch.tensor([1.0, 1e-3, 100.0, 0.0]).view(4, 1)
    top, levels, draws = g.abs().amax(1, keepdim=True), 2**bits - 1, 3000
    rounded = torch.stack([ops.dorefa_gradient(g, bits, torch.tensor([5, i])) for i in range(draws)]).double()
    steps = rounded[:, :3] * levels / top[:3]
    assert float((steps - steps.round()).abs().max()) < 1e-3 and steps.round().remainder(2).eq(1).all()  # odd levels
    assert rounded[:, 3].eq(0).all()
    assert bool((rounded.abs() <= top * 1.0001).all())
    # The distance of two levels is 2 top / levels, the deviation at most half of it: five deviations of the mean of so many.
    assert bool(((rounded.mean(0) - g).abs() <= 5 * (top / levels) / draws**0.5 + 1e-9).all())
    assert float((rounded[0] - rounded[1]).abs().max()) > 0


def test_noise_is_of_the_seed_and_the_place():
    g = torch.randn(2, 3, 8, 8)
    assert torch.equal(ops.dorefa_gradient(g, 4, SEED), ops.dorefa_gradient(g, 4, SEED))
    assert not torch.equal(ops.dorefa_gradient(g, 4, SEED), ops.dorefa_gradient(g, 4, SEED + 1))
    last = g.to(memory_format=torch.channels_last)
    assert ops.dorefa_gradient(last, 4, SEED).is_contiguous(memory_format=torch.channels_last)
    flat = g.permute(0, 2, 3, 1).contiguous()
    assert torch.equal(ops.dorefa_gradient(last, 4, SEED).permute(0, 2, 3, 1), ops.dorefa_gradient(flat, 4, SEED))
    for bad in (torch.nan, torch.inf):
        broken = g.clone()
        broken[1, 2, 3, 4] = bad
        result = ops.dorefa_gradient(broken, 4, SEED)
        assert result[1].isnan().all() and result[0].isfinite().all()
    assert ops.dorefa_gradient(torch.tensor(3.0), 2, SEED) == 3 and ops.dorefa_gradient(torch.zeros(0, 3), 2, SEED).shape == (0, 3)


def net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(256, 10)
    )


@pytest.mark.parametrize(
    "config", [DoReFa(1, 1), DoReFa(2, 2), DoReFa(2, 2, 4), DoReFa(2, 2, 6, False), DoReFa(8, 8, 8), DoReFa(16, 32)], ids=str
)
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
    assert quantize.weight_bits(model) == {"2.weight": config.weight_bits}
    assert hasattr(model[2], "activation_quantizer") == (config.activation_bits is not None)
    again = copy.deepcopy(model).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model.eval()(x))


def test_gradient_bits_are_of_training_alone():
    model = quantize.prepare(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3)), DoReFa(4, None, 2))
    assert [list(m._forward_hooks.values()) for m in (model[0], model[2])] == [[quantize_gradient_of]] * 2
    assert pickle.loads(pickle.dumps(quantize_gradient_of)) is quantize_gradient_of
    x, target = torch.randn(4, 2, 8, 8), torch.randn(4, 3)

    def gradient(own):
        own.zero_grad()
        (own(x) * target).sum().backward()
        return own[2].bias.grad.clone()

    exact = target.sum(0)
    torch.manual_seed(1)
    first = gradient(model)
    torch.manual_seed(1)
    assert torch.equal(gradient(model), first) and torch.equal(gradient(copy.deepcopy(model).eval()), exact)
    torch.manual_seed(1)
    assert torch.equal(gradient(copy.deepcopy(model)), first)
    assert not torch.allclose(first, exact)
    per_sample = torch.autograd.grad(ops.quantize_gradient(x.requires_grad_(), 2, SEED).sum(), x)[0]
    assert per_sample.abs().unique().numel() == 1  # all as large as the largest: nothing to round
    with torch.no_grad():
        assert not model(x).requires_grad


LAYERS = [nn.Linear(7, 5), nn.Conv1d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.ConvTranspose2d(4, 6, 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_levels_times_scales_are_the_weight(layer, dtype):
    for bits in (1, 2, 5, 8, 16):
        for adjusted in (False, True):
            own = quantize.prepare(copy.deepcopy(layer).to(dtype), DoReFa(bits, None, scale_adjusted=adjusted))
            chain = own.parametrizations["weight"]
            levels, scales = chain[0].encode(chain.original)
            assert levels.dtype == scales.dtype == torch.float32 and len(levels) == len(scales) == own.weight.shape[chain[0].axis]
            assert levels.remainder(2).eq(1).all() and levels.abs().max() <= 2**bits - 1
            product = (levels * scales.view(-1, *[1] * (levels.dim() - 1))).movedim(0, chain[0].axis)
            assert torch.equal(product.to(dtype), own.weight)


def test_compiles_whole():
    model = quantize.prepare(net(), {"*": DoReFa(2, 2, 4), "0": None})
    x = torch.randn(4, 3, 8, 8)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in compiled.parameters())
    torch.testing.assert_close(model[5].bias.grad, compiled._orig_mod[5].bias.grad)  # of constant gradients: nothing to round


def test_other_modules_have_weights_alone():
    model = quantize.prepare(nn.ModuleList([nn.LSTM(6, 5), nn.MultiheadAttention(8, 2)]), DoReFa(2, 2, 4))
    assert not any(isinstance(m, UnitQuantizer) or m._forward_hooks for m in model.modules())
    model[0](torch.randn(3, 2, 6))[0].sum().backward()
    assert model[0].weight_ih_l0.unique().numel() <= 4


def test_tied_weights_share_a_quantizer():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    quantize.prepare(model, DoReFa(2, 4))
    assert model[0].parametrizations["weight"][0] is model[1].parametrizations["weight"][0]
    model(torch.randn(2, 6)).sum().backward()


def test_32_bits_are_none():
    assert DoReFa(2, 32) == DoReFa(2, None) and DoReFa(2, 32).activation_bits is None
    assert not hasattr(quantize.prepare(nn.Linear(2, 2), DoReFa(2, 32)), "activation_quantizer")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 2), ValueError, "DoReFa: weight_bits must be an integer from 1 to 8, or 16; got 0"),
        ((9, 2), ValueError, "DoReFa: weight_bits must be an integer from 1 to 8, or 16; got 9"),
        ((32, 2), ValueError, "DoReFa: weight_bits must be an integer from 1 to 8, or 16; got 32"),
        ((2.0, 2), TypeError, "DoReFa: weight_bits must be an integer from 1 to 8, or 16; got 2.0"),
        ((2, 0), ValueError, "DoReFa: activation_bits must be an integer from 1 to 8, 16, 32 or None; got 0"),
        ((2, True), TypeError, "DoReFa: activation_bits must be an integer from 1 to 8, 16, 32 or None; got True"),
        ((2, 2, 1), ValueError, "DoReFa: gradient_bits must be an integer from 2 to 8, 16 or 32; got 1"),
        ((2, 2, None), TypeError, "DoReFa: gradient_bits must be an integer from 2 to 8, 16 or 32; got None"),
        ((2, 2, 32, 1), TypeError, "DoReFa: scale_adjusted must be a bool; got 1"),
    ],
)
def test_errors_of_the_configuration(arguments, error, message):
    with pytest.raises(error, match=message):
        DoReFa(*arguments)


@pytest.mark.parametrize("function", [dorefa_weight, dorefa_activation])
def test_errors_of_the_functions(function):
    name = function.__name__
    for wrong in (torch.ones(2).int(), 3.0):
        with pytest.raises(TypeError, match=f"{name}: . must be a floating-point Tensor"):
            function(wrong, 2)
    for bits, error in ((0, ValueError), (17, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"{name}: bits must be an integer from 1 to 16; got {bits}"):
            function(torch.ones(2), bits)


def test_gradients_in_reentrant_checkpoints_have_noise_of_their_own(monkeypatch):
    drawn = []

    def noted():
        drawn.append(draw_seed())
        return drawn[-1]

    monkeypatch.setattr("quantize.weight.dorefa.draw_seed", noted)
    layers = nn.ModuleList(quantize.prepare(nn.Linear(4, 4), DoReFa(8, None, gradient_bits=2)) for _ in range(3))
    x = torch.randn(2, 4, requires_grad=True)
    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=True)
    x.sum().backward()
    assert len(drawn) == 6
    assert len({tuple(seed.tolist()) for seed in drawn}) == 3  # each again when it is recomputed
