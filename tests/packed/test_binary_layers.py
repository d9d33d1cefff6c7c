"""1-bit and DoReFa layers from prepare() to files: what is packed computes what was trained, and says what it is."""

import copy

import pytest
import torch
from packed_models import inside
from torch import nn

import quantize
from quantize.packed.grid import SignGrid
from quantize.packed.kernels import reason
from quantize.packed.modules import PackedConv2d, PackedLinear
from quantize.weight.dorefa import quantize_gradient_of


def block(inputs, outputs, **options):
    return [nn.BatchNorm2d(inputs), nn.Hardtanh(), nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **options)]


def trained_norms(model):
    """Running statistics and affine parameters of no special value, some weights negative or zero."""
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for t, low, high in ((m.weight, -1.0, 1.5), (m.bias, -0.5, 0.5), (m.running_mean, -0.5, 0.5), (m.running_var, 0.3, 2.0)):
                nn.init.uniform_(t, low, high)
            nn.init.zeros_(m.weight[:1].detach())
    return model


def plain_model(relu=False):
    middle = block(24, 40, stride=2)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3),
        *middle,
        *([nn.ReLU()] if relu else []),
        *block(40, 33),
        nn.BatchNorm2d(33),
        nn.Flatten(),
        nn.Linear(33 * 16, 5),
    )
    return trained_norms(model)


def layers_of(model, kind=PackedConv2d):
    return [m for m in model.modules() if isinstance(m, kind)]


def prepared(config, relu=False, **options):
    model = quantize.prepare(plain_model(relu, **options), {"*": config, "0": None, "10" if relu else "9": None})
    return model.eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 10, 10)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("config", [quantize.XNOR(), quantize.DoReFa(1, 1)])
def test_what_stands_before_signs_goes_into_them(config, relu, x):
    model = prepared(config, relu)
    packed = quantize.convert(model)
    first, second = layers_of(packed)
    assert all(isinstance(layer.grid, SignGrid) and reason(layer) == "" for layer in (first, second))
    assert first.grid.removed == ("1", "2") and second.grid.removed == (("4", "5", "6") if relu else ("4", "5"))
    assert all(type(packed[i]) is nn.Identity for i in map(int, (*first.grid.removed, *second.grid.removed)))
    assert first._next is second and first.feeds == second_name(packed, second)
    assert torch.allclose(packed(x), model(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert first(packed[0](x)).dtype == torch.float32
        with inside(packed):
            assert first(packed[0](x)).dtype == torch.uint8  # bits, which nobody but the next layer sees
    bits = quantize.summary(packed, x).layers
    assert [(row.weight_bits, row.activation_bits) for row in bits if row.kind == "Conv2d"][1:] == [(1, 1), (1, 1)]
    assert quantize.summary(packed, x).macs == quantize.summary(model, x).macs


def second_name(model, module):
    return next(name for name, m in model.named_modules() if m is module)


def test_floats_between_layers_give_the_same_as_bits(x):
    packed = quantize.convert(prepared(quantize.XNOR()))
    first, second = layers_of(packed)
    apart = copy.deepcopy(packed)
    assert layers_of(apart)[0]._next is layers_of(apart)[1]  # and not the original's
    layers_of(apart)[0].feeds = layers_of(apart)[0]._next = None
    with torch.no_grad():
        assert torch.equal(apart(x), packed(x))
        seen = []
        hook = second.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
        assert torch.equal(apart(x), packed(x))
        hook.remove()
        packed(x)
    assert seen == [torch.float32]  # hooks see floats
    half = copy.deepcopy(packed).half()
    assert layers_of(half)[0].threshold.dtype == torch.float32
    between = x.half()
    for layer, of_floats in zip(half, apart, strict=True):  # one by one: a rounding may turn the next layer's signs
        with torch.no_grad():
            want, between = of_floats(between.float()), layer(between)
        assert float((between.float() - want).norm()) <= torch.finfo(torch.float16).eps * float(want.norm())


def test_files_hold_bits_and_thresholds(tmp_path, x):
    model = prepared(quantize.XNOR(), relu=True)
    packed = quantize.convert(model)
    path = tmp_path / "model.safetensors"
    quantize.save(packed, path)
    loaded = quantize.load(plain_model(relu=True), path)
    with torch.no_grad():
        assert torch.equal(loaded(x), packed(x))  # on bits
    assert torch.equal(loaded(x), packed(x))  # on decoded weights, since the first layer has a gradient
    assert layers_of(loaded)[0]._next is layers_of(loaded)[1] and type(loaded[5]) is nn.Identity
    again = tmp_path / "again.safetensors"
    quantize.save(loaded, again)
    assert path.read_bytes() == again.read_bytes()
    with torch.no_grad():
        assert torch.equal(quantize.load(copy.deepcopy(packed), path)(x), packed(x))
    report = quantize.size_report(packed)
    assert report.bytes == quantize.size_report(model).bytes == quantize.size_report(loaded).bytes
    assert report.float_bytes == quantize.size_report(plain_model(relu=True)).float_bytes
    # rows of 9 * 24 bits in 4 words, scales, and a threshold and a flip for each input
    row = next(r for r in report.layers if r.name == "3")
    assert (row.method, row.bits, row.bytes) == ("xnor", 1, 40 * 32 + 40 * 4 + 24 * 5)


@pytest.mark.parametrize("weight_bits, activation_bits", [(1, 2), (2, 1), (2, 2), (3, 4), (4, 4), (5, 8), (7, 8), (8, 8), (1, 8), (8, 1)])
def test_dorefa_runs_on_integers(weight_bits, activation_bits, x):
    model = prepared(quantize.DoReFa(weight_bits, activation_bits))
    packed = quantize.convert(model)
    assert [reason(layer) for layer in layers_of(packed)] == ["", ""]
    assert torch.allclose(packed(x), model(x), rtol=1e-4, atol=1e-4)


def test_gradient_bits_are_no_part_of_it(x):
    packed = quantize.convert(prepared(quantize.DoReFa(2, 2, 6)))
    assert not any(hook is quantize_gradient_of for m in packed.modules() for hook in m._forward_hooks.values())
    assert type(packed[7]) is nn.Identity  # the last norm went into the layer before it


@pytest.mark.parametrize("weight_bits, activation_bits", [(16, 16), (16, 8), (2, 32), (1, 32), (8, None)])
def test_dorefa_beyond_integers_says_so(weight_bits, activation_bits, x, tmp_path):
    model = prepared(quantize.DoReFa(weight_bits, activation_bits))
    packed = quantize.convert(model)
    assert all(reason(layer).startswith("decoded at each use: ") for layer in layers_of(packed))
    assert torch.allclose(packed(x), model(x), rtol=1e-4, atol=1e-5)
    quantize.save(packed, tmp_path / "m")
    assert torch.equal(quantize.load(plain_model(), tmp_path / "m")(x), packed(x))


@pytest.mark.parametrize("config", [quantize.XNOR(), quantize.DoReFa(1, 1), quantize.DoReFa(3, 4), quantize.DoReFa(8, 8)])
def test_linear_layers(config):
    model = trained_norms(nn.Sequential(nn.BatchNorm1d(70), nn.Linear(70, 130), nn.BatchNorm1d(130), nn.Linear(130, 9, bias=False)))
    model = quantize.prepare(model, config).eval()
    packed = quantize.convert(model)
    for batch in (1, 5):
        rows = torch.randn(batch, 70)
        assert torch.allclose(packed(rows), model(rows), rtol=1e-4, atol=1e-4)
    assert (layers_of(packed, PackedLinear)[0]._next is not None) == (config.weight_bits == 1)
    if config.weight_bits == 1:
        with pytest.raises(ValueError, match="input must have 2 dimensions"):
            packed(torch.randn(2, 70, 70))


def test_binary_weights_with_float_inputs(x):
    model = prepared(quantize.XNOR(activation_bits=None))
    packed = quantize.convert(model)
    assert [reason(layer) for layer in layers_of(packed)] == ["decoded at each use: float inputs"] * 2
    assert torch.allclose(packed(x), model(x), rtol=1e-4, atol=1e-5)
    linear = quantize.convert(quantize.prepare(nn.Linear(70, 30), quantize.XNOR(activation_bits=None)))
    assert reason(linear) == ""
    rows = torch.randn(3, 70)
    assert torch.allclose(linear(rows), nn.functional.linear(rows, linear.weight, linear.bias), rtol=1e-4, atol=1e-5)


def test_shapes_without_kernels_compute_signs_all_the_same():
    for plain, shape in [
        (nn.Conv3d(6, 8, 3, padding=1), (2, 6, 4, 5, 5)),
        (nn.ConvTranspose2d(6, 8, 3, stride=2), (2, 6, 4, 4)),
        (nn.Conv1d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 9)),
        (nn.Conv2d(6, 8, 3, padding="same", groups=2), (2, 6, 5, 5)),
        (nn.Conv2d(6, 6, 4, padding="same", groups=6), (6, 5, 5)),
    ]:
        for config in (quantize.XNOR(), quantize.DoReFa(1, 1)):
            model = quantize.prepare(copy.deepcopy(plain), config).eval()
            x = torch.randn(shape)
            assert torch.allclose(quantize.convert(model)(x), model(x), rtol=1e-4, atol=1e-4), (plain, config)


def test_input_without_signs_is_named():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    model = quantize.prepare(model, {"*": quantize.XNOR(), "0": None, "4": None})
    with pytest.raises(ValueError, match=r"convert: the input of layer '2' must have both signs; it comes from a ReLU"):
        quantize.convert(model)


def test_norm_that_others_see_stays(x):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            y = self.bn(x)
            return self.conv(y) + y

    model = quantize.prepare(trained_norms(Residual()), quantize.XNOR()).eval()
    packed = quantize.convert(model)
    assert isinstance(packed.bn, nn.BatchNorm2d) and packed.conv.threshold is None
    assert torch.allclose(packed(x), model(x), rtol=1e-4, atol=1e-5)


def test_norm_before_two_signs(x):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.clip = nn.BatchNorm2d(3), nn.Hardtanh()
            self.conv, self.short = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(3, 8, 1, 2)

        def forward(self, x):
            y = self.clip(self.bn(x))
            return self.conv(y) + self.short(y)

    model = quantize.prepare(trained_norms(Branches()), quantize.XNOR()).eval()
    packed = quantize.convert(model)
    assert type(packed.bn) is type(packed.clip) is nn.Identity
    assert torch.equal(packed.conv.threshold, packed.short.threshold) and packed.conv._next is None
    assert quantize.size_report(packed).float_bytes == quantize.size_report(Branches()).float_bytes
    assert torch.allclose(packed(x), model(x), rtol=1e-4, atol=1e-5)


def test_gradient_stops_at_signs(x):
    packed = quantize.convert(prepared(quantize.XNOR()))
    inputs = x.clone().requires_grad_()
    packed(inputs).sum().backward()
    assert inputs.grad is None


@pytest.mark.parametrize("config, low", [(quantize.XNOR(), -1), (quantize.DoReFa(1, 1), 0)])
def test_long_rows_of_bits_fit_sums(each_isa, config, low):
    signs = torch.ones(100_000)
    if low:  # XNOR takes the mean off
        signs[1::2] = -1
    half = signs * torch.arange(100_000).lt(50_000).mul(2).sub(1)
    plain = nn.Linear(100_000, 3, bias=False)
    plain.weight.data = 0.5 * torch.stack([signs, -signs, half])
    packed = quantize.convert(quantize.prepare(plain, config))
    assert reason(packed) == ""
    with torch.no_grad():  # the largest sums there are, of halves: exact
        got = packed(torch.stack([signs, low * signs]))
    assert torch.equal(got, torch.tensor([[50_000.0, -50_000, 0], [low * 50_000, -low * 50_000, 0]]))


def test_dorefa_has_no_zero_point(tmp_path):
    packed = quantize.convert(quantize.prepare(nn.Linear(6, 3), quantize.DoReFa(2, 2)).eval())
    packed.zero_point.fill_(1)
    quantize.save(packed, tmp_path / "m")
    with pytest.raises(ValueError, match="zero_point must be 0 for dorefa; got 1.0"):
        quantize.load(nn.Linear(6, 3), tmp_path / "m")
