"""Layer, RMS, group and instance norms: outputs bit-equal, gradients equal where one bit holds the normalized input."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from calls import CallWith
from exact_levels import assert_same, keeps, run
from torch import nn

import quantize
from quantize.activation.intercept import state_of
from quantize.layers import row_norms

EPS = 3.0  # of values a step of 1 beside their mean: a deviation of 2, so that they are normalized to one half and minus one half
ONE_BIT = quantize.ActivationConfig(bits=1, max_bits=1, group_size="sample")
NORMS = {
    "layer": (nn.LayerNorm(64, EPS), (3, 10, 64)),
    "layer of two": (nn.LayerNorm((12, 64), EPS), (3, 5, 12, 64)),
    "layer, rows": (nn.LayerNorm(64, EPS), (9, 64)),
    "layer without bias": (nn.LayerNorm(64, EPS, bias=False), (3, 10, 64)),
    "layer without both": (nn.LayerNorm(64, EPS, elementwise_affine=False), (3, 10, 64)),
    "group": (nn.GroupNorm(4, 16, EPS), (3, 16, 7, 9)),
    "group, one": (nn.GroupNorm(1, 16, EPS), (3, 16, 40)),
    "group of volumes": (nn.GroupNorm(4, 16, EPS), (3, 16, 4, 5, 6)),
    "group of vectors": (nn.GroupNorm(2, 64, EPS), (9, 64)),
    "group without both": (nn.GroupNorm(4, 16, EPS, affine=False), (3, 16, 7, 9)),
    "instance": (nn.InstanceNorm2d(16, EPS), (3, 16, 7, 10)),
    "instance with both": (nn.InstanceNorm2d(16, EPS, affine=True), (3, 16, 7, 10)),
    "instance with statistics": (nn.InstanceNorm2d(16, EPS, affine=True, track_running_stats=True), (3, 16, 7, 10)),
    "instance 1d": (nn.InstanceNorm1d(16, EPS, affine=True), (3, 16, 60)),
    "instance 3d": (nn.InstanceNorm3d(16, EPS, track_running_stats=True), (3, 16, 4, 5, 6)),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "turned": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
}


def halves(layer: nn.Module, shape, dtype=torch.float32) -> torch.Tensor:
    """Rows of as many values one above their mean as one below it, for `layer`."""
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        length = math.prod(layer.normalized_shape)
    else:
        length = math.prod(shape[1:]) // (layer.num_groups if isinstance(layer, nn.GroupNorm) else shape[1])
    signs = torch.rand(math.prod(shape) // length, length).argsort(1) % 2 * 2.0 - 1
    means = torch.randint(-4, 5, (len(signs), 1)) * (not isinstance(layer, nn.RMSNorm))
    return (signs + means).view(shape).to(dtype)


@pytest.fixture
def exact(monkeypatch):
    """PyTorch's sums over a row are a bit off: what is to be packed becomes what one bit holds."""
    pack = row_norms.pack
    monkeypatch.setattr(row_norms, "pack", lambda state, x, is_norm: pack(state, (2 * x).round() / 2, is_norm))


def assert_near(ours, plain, x):
    """assert_same, of gradients up to that bit."""
    tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
    return assert_same(ours, plain, x, rtol=tolerance, atol=tolerance)


def drawn(layer: nn.Module) -> nn.Module:
    """A copy with weights and biases that are not ones and zeros."""
    layer = copy.deepcopy(layer)
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 2)
    return nn.Sequential(layer)


def compressed(plain: nn.Module, config=ONE_BIT) -> nn.Module:
    return quantize.QModule(copy.deepcopy(plain), config)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NORMS)
def test_as_plain_where_one_bit_is_exact(exact, name, layout):
    layer, shape = NORMS[name]
    plain, x = drawn(layer), LAYOUTS[layout](halves(layer, shape))
    ours = compressed(plain)
    saved = assert_near(ours, plain, x)
    assert keeps(saved, ours, x) == {torch.uint8}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "weight"), [((64,), True), ((64,), False), ((10, 64), True)])
def test_rms_norm(exact, shape, weight, layout):
    layer = nn.RMSNorm(shape, EPS, elementwise_affine=weight)
    plain, x = drawn(layer), LAYOUTS[layout](halves(layer, (3, 10, 64)))
    ours = compressed(plain)
    saved = assert_near(ours, plain, x)
    assert keeps(saved, ours, x) == {torch.uint8}


@pytest.mark.parametrize("function", [
    lambda m, x: F.layer_norm(x, (64,), m.rows, eps=EPS), lambda m, x: torch.layer_norm(x, [64], m.rows, None, EPS),
    lambda m, x: F.layer_norm(input=x, normalized_shape=[64], bias=m.rows, eps=EPS), lambda m, x: F.rms_norm(x, (64,), m.rows, EPS),
    lambda m, x: torch.rms_norm(x, (64,), eps=EPS), lambda m, x: F.group_norm(x, 10, m.channels, None, EPS),
    lambda m, x: torch.group_norm(x, 10, m.channels, None, EPS), lambda m, x: F.instance_norm(x, weight=m.channels, eps=EPS),
    lambda m, x: torch.instance_norm(x, m.channels, None, None, None, True, 0.1, EPS, True),
])  # fmt: skip
def test_functional_calls(exact, function):
    plain, x = CallWith(function, rows=torch.rand(64), channels=torch.rand(10)), halves(nn.RMSNorm(64), (3, 10, 64))
    y, grads, _ = run(plain, x)
    ours = compressed(plain)
    got, got_grads, saved = run(ours, x)
    assert torch.equal(got, y)
    for a, b in zip(got_grads, grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert keeps(saved, ours, x) == {torch.uint8}


@pytest.mark.parametrize("name", ["layer", "group", "instance with statistics"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
def test_dtypes(exact, name, dtypes):
    layer, shape = NORMS[name]
    plain, x = drawn(layer).to(dtypes[1]), halves(layer, shape, dtypes[0])
    ours = compressed(plain)
    assert keeps(assert_near(ours, plain, x), ours, x) == {torch.uint8}


@pytest.mark.parametrize("name", ["layer", "group", "instance with both"])
def test_autocast_computes_what_it_does_without_us(name):
    layer, shape = NORMS[name]
    plain, x = nn.Sequential(nn.Conv1d(shape[1], shape[1], 1), drawn(layer)), torch.randn(shape)
    ours = compressed(plain, quantize.ActivationConfig(bits=8, max_bits=8))
    if len(shape) == 4:
        plain[0], ours[0] = nn.Identity(), nn.Identity()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, got = plain(x), ours(x)
    assert y.dtype == got.dtype and torch.equal(y, got)
    assert all(p.grad.dtype == p.dtype for p in (got.sum().backward(), [p for p in ours.parameters() if p.requires_grad])[1])


def test_running_statistics_are_pytorch_s():
    plain = drawn(NORMS["instance with statistics"][0])
    ours = compressed(plain, quantize.ActivationConfig(bits=2, max_bits=2))
    for _ in range(3):
        x = torch.randn(4, 16, 5, 6) * 3 + 1
        assert torch.equal(plain(x), ours(x))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), ours.buffers(), strict=True))
    assert plain[0].running_mean.abs().min() > 0
    x = torch.randn(4, 16, 5, 6)
    assert_same(ours.eval(), plain.eval(), x)  # by statistics that are fixed: PyTorch's


def test_what_is_left_to_pytorch():
    x = torch.randn(3, 16, 8, 8)
    for layer, shaped in (
        (nn.LayerNorm(16), x[0, :, 0, 0]),
        (nn.GroupNorm(2, 16), x.double()),
        (nn.LayerNorm([8, 8]), x[:0]),
        (nn.LayerNorm(8), x),
        (nn.GroupNorm(4, 16), x[:, :, 0, :3]),
        (nn.InstanceNorm2d(16), x[..., :3, :5]),
    ):
        layer = layer.to(shaped.dtype)
        ours = compressed(nn.Sequential(layer))
        assert torch.uint8 not in {t.dtype for t in assert_same(ours, nn.Sequential(layer), shaped)}
    frozen = nn.Sequential(nn.LayerNorm(64).requires_grad_(False))
    frozen[0].bias.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compressed(frozen)(x.flatten(2))  # the bias alone, which needs no input
    assert torch.uint8 not in {t.dtype for t in saved}
    for layer in (nn.LayerNorm(9), nn.GroupNorm(2, 8), nn.RMSNorm(9)):
        with pytest.raises(RuntimeError) as ours:
            compressed(nn.Sequential(layer))(x)
        with pytest.raises(RuntimeError) as plain:
            layer(x)
        assert str(ours.value) == str(plain.value)
    for layer, small in ((nn.GroupNorm(2, 2), x[:1, :2, 0, 0]), (nn.InstanceNorm2d(16), x[..., :1, :1])):
        with pytest.raises(ValueError, match="Expected more than 1"):
            compressed(nn.Sequential(layer))(small)


def test_frozen_weights_and_inputs_without_gradients(exact):
    for layer, shape in (NORMS["layer"], NORMS["group"], NORMS["instance with both"]):
        x = halves(layer, shape)
        frozen = drawn(layer)
        frozen[0].weight.requires_grad_(False)
        assert_near(compressed(frozen), frozen, x)
        model = drawn(layer)
        ours = compressed(model)
        for m in (model, ours):
            m(x).square().sum().backward()  # x itself is nobody's output
        for a, b in zip(model.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("layer", [nn.LayerNorm(64), nn.RMSNorm(64), nn.GroupNorm(2, 10), nn.InstanceNorm1d(10, affine=True)])
def test_nan_and_inf_stay_in_their_sample(layer):
    for bad in (torch.nan, torch.inf):
        x = torch.randn(4, 10, 64)
        x[1, 3, 5] = bad
        _, (grad, *_), _ = run(compressed(nn.Sequential(layer), quantize.ActivationConfig(bits=2, max_bits=2)), x)
        assert grad[[0, 2, 3]].isfinite().all()
        assert not grad[1].isfinite().all()


@pytest.mark.parametrize("layer", [nn.LayerNorm(64), nn.RMSNorm(64), nn.GroupNorm(2, 10), nn.InstanceNorm1d(10, affine=True)])
@pytest.mark.parametrize(
    "config", [quantize.ActivationConfig(bits=8, max_bits=8), quantize.ActivationConfig(bits=8)], ids=["8", "adaptive"]
)
def test_a_layer_twice_in_one_forward(layer, config):
    x, plain = torch.randn(4, 10, 64), nn.Sequential(layer, nn.Linear(64, 64), layer)
    ours = compressed(plain, quantize.ActivationConfig(bits=8, max_bits=8))
    assert ours[0] is ours[2]
    for _ in range(2):
        y, grads, _ = run(plain, x)
        got, got_grads, _ = run(ours, x)
        assert torch.equal(got, y)
        for a, b in zip(got_grads, grads, strict=True):
            assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


class Turned(nn.LayerNorm):
    """Channels last for the norm, as timm's LayerNorm2d."""

    def forward(self, x):
        return F.layer_norm(x.transpose(1, -1), self.normalized_shape, self.weight, self.bias, self.eps).transpose(1, -1)


def test_subclasses_keep_their_forward(exact):
    plain, x = nn.Sequential(Turned(64, EPS)), halves(nn.LayerNorm(64), (3, 10, 64)).transpose(1, 2)
    ours = compressed(plain)
    assert type(ours[0]) is Turned
    assert keeps(assert_near(ours, plain, x), ours, x) == {torch.uint8}
    assert ours.layer_bits() == {"0": 1.0}


@pytest.mark.parametrize("layer", [
    quantize.QLayerNorm(64), quantize.QRMSNorm(64), quantize.QGroupNorm(2, 10), quantize.QInstanceNorm1d(10, affine=True),
])  # fmt: skip
def test_layers_by_hand_compile(layer):
    x = torch.randn(4, 10, 64)
    compiled, grads = torch.compile(layer, fullgraph=True, backend="aot_eager"), []
    for forward in (layer, compiled):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(forward(x).square().sum(), list(layer.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compiled(x)
    assert keeps(saved, layer, x) == {torch.uint8}


@pytest.mark.parametrize("layer", [nn.LayerNorm(64), nn.RMSNorm(64), nn.GroupNorm(2, 10), nn.InstanceNorm1d(10, affine=True)])
def test_reentrant_checkpoints_draw_the_same_dropout(layer):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = copy.deepcopy(layer), nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.norm(x))

    block, x = quantize.QModule(Block(), quantize.ActivationConfig(bits=8, max_bits=8)), torch.randn(3, 10, 64, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(block.forward, x, use_reentrant=True)
    y.sum().backward()
    kept = (y != 0).float()
    expected = torch.autograd.grad(block.norm.plain.forward(block.norm, x), x, 2 * kept)[0]
    assert F.cosine_similarity(x.grad.flatten(), expected.flatten(), dim=0) > 0.99


def test_names_configs_and_the_report():
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.RMSNorm(64), nn.LayerNorm(64))
    two, four = (quantize.ActivationConfig(bits=b, max_bits=b) for b in (2, 4))
    model = quantize.QModule(model, {"*": two, "2": four, "3": None})
    x = torch.randn(8, 100, 64)
    model(x).sum().backward()
    assert model.layer_bits() == {"0": 2.0, "1": 2.0, "2": 4.0}
    report = quantize.memory_report(model, x)
    rows = {(row.name, row.op, row.bits): row.reason for row in report.layers}
    assert rows[("0", "LayerNorm", 2.0)] == "" and rows[("2", "RMSNorm", 4.0)] == ""
    assert rows[("3", "layer_norm", 32)] == "disabled by its config"  # which was not converted
    rows = quantize.memory_report(quantize.QModule(model, two), torch.randn(80, 100, 64)).layers
    reasons = {row.reason for row in rows if "norm" in row.op.lower() and row.bits == 32 and row.bytes > 4096}
    assert reasons == {"statistics, a number a row"}


def test_rows_of_other_sizes_beside_them_do_no_harm():
    """Rows a million times as large, in the same group: the small ones' gradients are off by noise of their own size."""
    x = torch.randn(4, 64, 64) * torch.tensor([1e-3, 1e3]).repeat(32)[:, None]
    plain = nn.Sequential(nn.LayerNorm(64))
    for config, least in ((quantize.ActivationConfig(bits=8, max_bits=8), 0.999), (quantize.ActivationConfig(bits=2, max_bits=2), 0.9)):
        _, (exact, *_), _ = run(plain, x)
        _, (grad, *_), _ = run(compressed(plain, config), x)
        for rows in (slice(0, None, 2), slice(1, None, 2)):
            assert F.cosine_similarity(grad[:, rows].flatten(), exact[:, rows].flatten(), dim=0) > least


class Probe(nn.Module):
    """A norm between a parameter that stands for the layers before it, and an output's gradient that is the same in each draw."""

    def __init__(self, layer, shape):
        super().__init__()
        self.norm, self.before = layer, nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.norm(self.before * 1)


@pytest.mark.parametrize("name", ["layer", "group", "instance with both", "rms"])
def test_variances_are_those_reported(name):
    """Draws against the energies that bits are allocated by, and their mean against the exact gradients."""
    layer, shape = (nn.RMSNorm(64), (3, 10, 64)) if name == "rms" else NORMS[name]
    shape = (8, *shape[1:])
    model = Probe(drawn(layer)[0], shape)
    grad = torch.randn(shape) + 0.7 * model.before.detach()  # correlated with the input, or noise would be all there is
    exact = torch.autograd.grad(model(None), [model.norm.weight, model.before], grad)
    ours = quantize.QModule(model, quantize.ActivationConfig(bits=2, max_bits=8, group_size=32))
    draws, predicted = [], None
    for _ in range(400):
        state = state_of(ours.norm)
        state.budget, state.steps = 2.0, 0  # nothing is learned
        draws.append(torch.autograd.grad(ours(None), [ours.norm.weight, ours.before], grad))
        (record,) = state.records
        bits = {1: 0, 2: 1, 4: 2, 8: 3}
        spent = torch.stack([v[bits[int(b)]] for v, b in zip(record.variance, state.used, strict=True)])
        predicted = (spent[:, None] * record.energies[0]).sum(0)
    weight, input = (torch.stack(parts) for parts in zip(*draws, strict=True))
    found = weight.var(0).sum(), input.var(0).sum() / exact[1].square().sum()
    for got, want in zip(found, predicted, strict=True):
        assert 0.8 * want < got < 1.25 * want
    # Five deviations of a mean of 400; of the weight's it has no bias at all.
    assert ((weight.mean(0) - exact[0]).abs() < 5 * weight.std(0) / 20).all()
    off = (input.mean(0) - exact[1]).norm() / exact[1].norm()
    assert off < 1.2 * float(found[1] / 400) ** 0.5 + 0.02
