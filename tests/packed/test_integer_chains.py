"""Integer convolutions with what comes behind them: the bits of one after the other, and floats wherever somebody looks."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from packed_models import inside
from test_binary_layers import trained_norms
from torch import nn

import quantize
from quantize.packed.modules import PackedConv2d
from quantize.packed.pending import ADD, CLIP, CODES, Pending

LAYOUTS = [torch.contiguous_format, torch.channels_last]
CONFIG = quantize.Uniform(8, activation_bits=8)


class Through(nn.Module):
    """conv, what `then` makes of it, conv; the input is a shortcut's."""

    def __init__(self, then, second=lambda: nn.Conv2d(16, 16, 3, padding=1)):
        super().__init__()
        self.first, self.norm, self.then, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), then, second()
        self.act = nn.ReLU6()

    def forward(self, x):
        return self.second(self.then(self.norm(self.first(x)), x))


class Block(nn.Module):
    """torchvision's basic block: one ReLU, called twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


def mobile():
    """Depthwise and 1x1 convolutions, as MobileNets have them."""

    def conv(*args, **kwargs):
        return nn.Conv2d(*args, **kwargs, bias=False), nn.BatchNorm2d(args[1])

    return nn.Sequential(
        *conv(3, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Sequential(*conv(16, 16, 3, padding=1, groups=16), nn.ReLU6(inplace=True)),
        *conv(16, 24, 1), nn.Identity(), *conv(24, 24, 5, stride=2, padding=2, groups=24), nn.Hardtanh(0, 4), *conv(24, 40, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10),
    )  # fmt: skip


def convs(model):
    return [m for m in model.modules() if isinstance(m, PackedConv2d)]


def packed(model, x, config=CONFIG):
    prepared = quantize.prepare(trained_norms(model).eval(), config)
    quantize.calibrate(prepared, [x], "minmax")
    return quantize.convert(prepared)


def one_by_one(model):
    plain = copy.deepcopy(model)
    for layer in convs(plain):
        layer.__dict__.pop("_call", None)
        layer._steps = ()
    return plain


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", [CONFIG, quantize.PowerOfTwo(4, activation_bits=8), quantize.Ternary(activation_bits=2)], ids=str)
def test_chain_of_layers(each_isa, config, layout):
    x = torch.randn(2, 3, 33, 30).contiguous(memory_format=layout)
    model = packed(mobile(), x, config)
    assert [layer._steps for layer in convs(model)] == [(CLIP, CODES), (CLIP, CODES), (CODES,), (CLIP, CODES), (CLIP,)]
    with torch.no_grad():
        want = one_by_one(model)(x)
        for _ in range(2):  # the second call is C++'s
            assert type(out := model(x)) is torch.Tensor and torch.equal(out, want)
        assert type(part := model[:2](x)) is torch.Tensor and torch.equal(part, one_by_one(model)[:2](x))  # called by itself
        with inside(model):
            assert isinstance(model[:2](x), Pending)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_residual_block(each_isa, layout):
    x = torch.randn(2, 16, 9, 11).contiguous(memory_format=layout)
    model = packed(nn.Sequential(Block(), Block()), x)
    assert [layer._steps for layer in convs(model)] == [(CLIP, CODES), (ADD, CLIP)] * 2
    before = x.clone()
    with torch.no_grad():
        out, want = model(x), one_by_one(model)(x)
    assert torch.equal(out, want) and out.stride() == want.stride() and torch.equal(x, before)


CHAINS = {
    "F.relu": (lambda out, x: F.relu(out), (CLIP, CODES)),
    "F.relu, in place": (lambda out, x: F.relu(out, inplace=True), (CLIP, CODES)),
    "torch.relu": (lambda out, x: torch.relu(out), (CLIP, CODES)),
    "method": (lambda out, x: out.relu(), (CLIP, CODES)),
    "method, in place": (lambda out, x: out.relu_(), (CLIP, CODES)),
    "F.relu6": (lambda out, x: F.relu6(out), (CLIP, CODES)),
    "F.hardtanh": (lambda out, x: F.hardtanh(out, -0.5, 0.5), (CLIP, CODES)),
    "nothing": (lambda out, x: out, (CODES,)),
    "sum": (lambda out, x: out + x, (ADD, CODES)),
    "sum, clip": (lambda out, x: F.relu(x + out), (ADD, CLIP, CODES)),
    "clip, sum": (lambda out, x: F.relu(out) + x, (CLIP,)),
    "twice": (lambda out, x: F.relu(F.hardtanh(out)), (CLIP,)),
    "SiLU": (lambda out, x: F.silu(out), ()),
    "two users": (lambda out, x: F.relu(out) + out, ()),
    "clipped for two": (lambda out, x: (y := F.relu(out)) + y * 2, (CLIP,)),
    "something between": (lambda out, x: F.relu(out) if (x * 2) is not None else out, ()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CHAINS)
def test_what_comes_behind(name, layout):
    then, steps = CHAINS[name]
    x = torch.randn(2, 16, 8, 9).contiguous(memory_format=layout)
    model = packed(Through(then), x)
    assert model.first._steps == steps
    assert torch.equal(model(x), one_by_one(model)(x)) and torch.equal(model(x), one_by_one(model)(x))


SECONDS = {
    "reflect": (lambda: nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect"), CONFIG),
    "asymmetric": (lambda: nn.Conv2d(16, 8, 2, padding="same"), CONFIG),
    "groups": (lambda: nn.Conv2d(16, 32, 3, groups=2), CONFIG),
    "few in groups": (lambda: nn.Conv2d(16, 16, 3, groups=8), CONFIG),
    "transposed": (lambda: nn.ConvTranspose2d(16, 8, 3), CONFIG),
    "DoReFa's halves": (lambda: nn.Conv2d(16, 8, 3), {"first": CONFIG, "second": quantize.DoReFa(8, 8)}),
    "bit planes": (lambda: nn.Conv2d(16, 8, 3), {"first": CONFIG, "second": quantize.DoReFa(1, 2)}),
    "signs": (lambda: nn.Conv2d(16, 8, 3), {"first": CONFIG, "second": quantize.XNOR(activation_bits=None)}),
    "float inputs": (lambda: nn.Conv2d(16, 8, 3), {"first": CONFIG, "second": quantize.Uniform(4)}),
    "full precision": (lambda: nn.Conv2d(16, 8, 3), {"first": CONFIG}),
}


@pytest.mark.parametrize("name", SECONDS)
def test_layers_that_take_no_codes_get_floats(each_isa, name):
    second, config = SECONDS[name]
    x = torch.randn(2, 16, 8, 9)
    model = packed(Through(lambda out, x: F.relu(out), second), x, config)
    with torch.no_grad():
        assert torch.equal(model(x), one_by_one(model)(x))


@pytest.mark.parametrize("place", ["first", "norm", "act", "second", ""])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_see_floats(place, kind):
    class Model(Through):
        def forward(self, x):
            return self.second(self.act(self.norm(self.first(x))))

    x, seen = torch.randn(2, 16, 8, 9), []
    model = packed(Model(None), x)
    assert model.first._steps == (CLIP, CODES)
    want = one_by_one(model)(x)
    getattr(model.get_submodule(place), kind)(lambda module, args, *output: seen.append((*args, *output)))
    assert torch.equal(model(x), want)
    assert all(type(t) is torch.Tensor and t.dtype == torch.float32 for t in seen[0])


def test_hooks_of_containers_see_floats():
    x, seen = torch.randn(1, 3, 32, 32), []
    model = packed(mobile(), x)
    want = one_by_one(model)(x)
    model[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model[3].register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(model(x), want) and all(type(t) is torch.Tensor and t.dtype == torch.float32 for t in seen) and len(seen) == 2


def test_gradients_compilation_traces_and_copies(tmp_path):
    x = torch.randn(2, 3, 32, 32)
    plain = mobile()
    model = packed(copy.deepcopy(plain), x)
    with torch.no_grad():
        want = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.jit.trace(model, x)(x), want, rtol=1e-5, atol=1e-5)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), want)
        quantize.save(model, tmp_path / "model.safetensors")
        loaded = quantize.load(plain.eval(), tmp_path / "model.safetensors")
        assert [layer._steps for layer in convs(loaded)] == [layer._steps for layer in convs(model)] and torch.equal(loaded(x), want)
        again = quantize.load(loaded, tmp_path / "model.safetensors")  # onto a packed model
        assert [layer._steps for layer in convs(again)] == [layer._steps for layer in convs(model)] and torch.equal(again(x), want)
        torch.testing.assert_close(torch.func.functional_call(model, {}, (x,)), want)
        torch.testing.assert_close(torch.vmap(model)(x[:, None]).squeeze(1), want, rtol=1e-5, atol=1e-5)
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    assert leaf.grad.isfinite().all() and leaf.grad.any()


def test_changed_buffers_are_seen():
    x = torch.randn(2, 3, 32, 32)
    model = packed(mobile(), x)
    with torch.no_grad():
        model(x)
        for layer in convs(model)[1:3]:
            layer.step.mul_(1.5), layer.scales.mul_(0.5)
        assert torch.equal(model(x), one_by_one(model)(x))
        assert model(x[:0]).shape == (0, 10) and model.half()(x.half()).dtype == torch.float16


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_a_sum_of_more_dimensions(form):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x, more):
            return self.conv(x) + more

    model = quantize.prepare(Sum().eval(), quantize.Uniform(8, 8))
    x, more = torch.randn(2, 8, 6, 7).to(memory_format=form), torch.randn(3, 1, 8, 6, 7)
    with torch.no_grad():
        want = model(x, more)
        torch.testing.assert_close(quantize.convert(model)(x, more), want)
