"""Batch norm, clip and max pool right behind a first convolution that stays float: computed with it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from packed_models import inside
from same_bits import on_every_isa
from torch import fx, nn

import quantize
from quantize.packed.pending import Pending
from quantize.packed.stems import PackedBatchNorm2d, stem_panels

op = torch.ops.quantize.stem_conv2d
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def inference():
    """With gradients the layers are the plain ones."""
    with torch.no_grad():
        yield


# outputs, channels, kernel, image, batch; window, stride, padding
POOLED = [
    ((64, 3, 7, (64, 64), 2), ((3, 3), (2, 2), (1, 1))),
    ((40, 3, 7, (61, 75), 2), ((3, 3), (2, 2), (1, 1))),
    ((17, 1, 5, (33, 40), 3), ((2, 2), (2, 2), (0, 0))),
    ((64, 4, 8, (50, 51), 1), ((5, 3), (3, 1), (2, 0))),
    ((16, 2, 6, (40, 38), 2), ((2, 3), (9, 5), (1, 1))),
    ((33, 3, 7, (20, 30), 1), ((10, 15), (1, 1), (5, 7))),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "pool"), POOLED)
def test_pooled_is_the_pool_of_what_is_not(shape, pool, layout):
    outputs, channels, kernel, image, batch = shape
    torch.manual_seed(outputs)
    x, weight, bias = torch.randn(batch, channels, *image), torch.randn(outputs, channels, kernel, kernel), torch.randn(outputs)
    x, panels, threads = x.to(memory_format=layout), stem_panels(weight), torch.get_num_threads()
    arguments = (x, weight, bias, panels, [2, 2], [3, 3])

    def run():
        return op(*arguments, None, None, *pool), op(*arguments, -1.0, 2.0, *pool), op(*arguments, low=0.0), op(*arguments)

    for pooled, clipped, positive, all_of_it in on_every_isa(run).values():
        want = F.max_pool2d(all_of_it, *pool)
        assert torch.equal(pooled, want) and pooled.stride() == want.stride()
        assert torch.equal(clipped, want.clamp(-1, 2)) and torch.equal(positive, all_of_it.relu())
    try:
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(op(*arguments, None, None, *pool), F.max_pool2d(op(*arguments), *pool))
    finally:
        torch.set_num_threads(threads)
    meta = op(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments), None, None, *pool)
    assert meta.shape == want.shape and meta.stride() == want.stride()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite(each_isa, value):
    x, weight = torch.randn(1, 3, 40, 40), torch.randn(16, 3, 7, 7)
    x[0, 1, 17, 23] = value
    arguments = (x, weight, None, stem_panels(weight), [2, 2], [3, 3])
    got, want = op(*arguments, None, None, [3, 3], [2, 2], [1, 1]), F.max_pool2d(op(*arguments), 3, 2, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert not want.isfinite().all()


@pytest.mark.parametrize("window", [([3, 3], [2, 2], [2, 2]), ([40, 40], [1, 1], [0, 0]), ([0, 3], [1, 1], [0, 0])])
def test_bad_windows_get_pytorchs_error(window):
    weight = torch.randn(16, 3, 7, 7)
    with pytest.raises(RuntimeError) as expected:
        F.max_pool2d(torch.randn(1, 16, 20, 20), *window)
    with pytest.raises(RuntimeError) as got:
        op(torch.randn(1, 3, 40, 40), weight, None, stem_panels(weight), [2, 2], [3, 3], None, None, *window)
    assert str(got.value).split("\n")[0] == str(expected.value).split("\n")[0]


# ---------------------------------------------------------------------------------------------------------------- models


def what_the_tail_gives(y, conv):
    return y


class Network(nn.Module):
    """`tail` between the first convolution and the last one."""

    def __init__(self, *tail, join=what_the_tail_gives):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 7, 2, 3, bias=len(tail) % 2 == 0)
        self.tail, self.last, self.join = nn.Sequential(*tail), nn.Conv2d(16, 4, 1), join

    def forward(self, x):
        y = self.conv(x)
        return self.last(self.join(self.tail(y), y))


def norm():
    made = nn.BatchNorm2d(16)
    made.running_mean.normal_(), made.running_var.uniform_(0.5, 2), made.weight.normal_(), made.bias.normal_()
    return made


def prepared(*tail, **options):
    torch.manual_seed(0)
    return quantize.prepare(Network(*tail, **options), {"*": quantize.Uniform(8), "conv": None}).eval()


TAILS = [
    ((lambda: nn.MaxPool2d(3, 2, 1),), ("pool",)),
    ((norm,), ("norm",)),
    ((nn.ReLU,), ("clip",)),
    ((norm, nn.ReLU, lambda: nn.MaxPool2d(3, 2, 1)), ("norm", "clip", "pool")),
    ((nn.Identity, norm, nn.Identity, nn.ReLU6), ("norm", "clip")),
    ((norm, lambda: nn.MaxPool2d((2, 3), 2)), ("norm", "pool")),
    ((lambda: nn.Hardtanh(-0.5, 0.25), lambda: nn.MaxPool2d(2)), ("clip", "pool")),
    ((lambda: nn.MaxPool2d(2), nn.ReLU, norm), ("pool",)),
    ((nn.ReLU, norm), ("clip",)),
    ((norm, norm), ("norm",)),
    ((lambda: nn.MaxPool2d(2, ceil_mode=True),), ()),
    ((lambda: nn.MaxPool2d(2, dilation=2),), ()),
    ((nn.GELU, norm), ()),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("tail", "steps"), TAILS, ids=lambda value: "-".join(value) if value and isinstance(value[0], str) else "")
def test_models_give_what_they_gave(tail, steps, layout, tmp_path):
    model = prepared(*(make() for make in tail))
    packed, x = quantize.convert(model), torch.randn(2, 3, 41, 50).contiguous(memory_format=layout)
    assert packed.conv._steps == steps
    want, got = model(x), packed(x)
    torch.testing.assert_close(got, want, **CLOSE)
    with inside(packed):
        assert isinstance(packed.conv(x), Pending) == bool(steps)
    quantize.save(packed, tmp_path / "file")
    loaded = quantize.load(Network(*(make() for make in tail)), tmp_path / "file")
    again = quantize.load(loaded, tmp_path / "file")
    for made in (loaded, again, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert made.conv._steps == steps and torch.equal(made(x), got)
    assert packed.state_dict().keys() == loaded.state_dict().keys()
    assert quantize.summary(packed, x).macs == quantize.summary(model, x).macs


@pytest.mark.parametrize(
    "join", [lambda y, conv: y + conv.mean(), lambda y, conv: conv[..., : y.shape[-2], : y.shape[-1]] + y], ids=["mean", "sum"]
)
def test_an_output_that_is_seen_twice_is_computed(join):
    model, x = prepared(norm(), nn.ReLU(), join=join), torch.randn(2, 3, 41, 50)
    packed = quantize.convert(model)
    assert not packed.conv._steps
    torch.testing.assert_close(packed(x), model(x), **CLOSE)


@pytest.mark.parametrize("name", ["conv", "tail", "tail.0", "tail.1", "tail.2"])
def test_hooks_see_what_they_saw(name):
    model, x, seen = prepared(norm(), nn.ReLU(), nn.MaxPool2d(3, 2, 1)), torch.randn(2, 3, 41, 50), []
    packed = quantize.convert(model)
    want = packed(x)
    for each in (model, packed):
        handle = each.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        torch.testing.assert_close(each(x), want, **CLOSE)
        handle.remove()
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0], **CLOSE)
    assert torch.equal(packed(x), want)


def test_a_norm_that_changes_is_seen():
    model, x = prepared(norm(), nn.ReLU(), nn.MaxPool2d(3, 2, 1)), torch.randn(2, 3, 41, 50)
    packed = quantize.convert(model)
    packed(x)
    for change in (
        lambda bn: bn.running_mean.add_(1),
        lambda bn: bn.running_var.mul_(2),
        lambda bn: bn.weight.neg_(),
        lambda bn: setattr(bn, "bias", nn.Parameter(torch.randn(16))),
        lambda bn: setattr(bn, "eps", 0.5),
    ):
        for each in (model, packed):
            torch.manual_seed(1)
            change(each.tail[0])
        torch.testing.assert_close(packed(x), model(x), **CLOSE)


def test_a_norm_in_training_counts_as_one():
    model, x = prepared(norm(), nn.ReLU()), torch.randn(2, 3, 41, 50)
    packed = quantize.convert(model)
    for each in (model, packed):
        each.tail[0].train()
    torch.testing.assert_close(packed(x), model(x), **CLOSE)
    torch.testing.assert_close(packed.tail[0].running_mean, model.tail[0].running_mean, **CLOSE)
    assert type(packed.tail[0]) is PackedBatchNorm2d


def test_gradients_are_the_plain_networks():
    model, x = prepared(norm(), nn.ReLU(), nn.MaxPool2d(3, 2, 1)), torch.randn(2, 3, 41, 50)
    packed = quantize.convert(model)
    with torch.enable_grad():
        got, want = ([torch.autograd.grad(each(own).sum(), own)[0] for own in (x.clone().requires_grad_(),)][0] for each in (packed, model))
        torch.testing.assert_close(got, want, **CLOSE)
        frozen = packed.requires_grad_(False)
        frozen.tail[0].bias.requires_grad_(True)  # asked for, behind a convolution that is not
        (slope,) = torch.autograd.grad(frozen(x).sum(), frozen.tail[0].bias)
        assert slope.abs().sum() > 0


def test_functional_calls_and_traces():
    class Functional(Network):
        def forward(self, x):
            return self.last(F.max_pool2d(F.relu(self.tail(self.conv(x))), 3, 2, 1))

    torch.manual_seed(0)
    model, x = quantize.prepare(Functional(norm()), {"*": quantize.Uniform(8), "conv": None}).eval(), torch.randn(2, 3, 41, 50)
    packed = quantize.convert(model)
    assert packed.conv._steps == ("norm", "clip")
    want = packed(x)
    torch.testing.assert_close(want, model(x), **CLOSE)
    torch.testing.assert_close(torch.jit.trace(packed, x)(x), want, **CLOSE)
    torch.testing.assert_close(fx.symbolic_trace(packed)(x), want, **CLOSE)
    torch.testing.assert_close(packed.double()(x.double()).float(), want, **CLOSE)


INPUTS = {
    "every second": lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, ::2],
    "turned": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "empty": lambda x: x[:0],
    "a pixel": lambda x: x[:1, :, :1, :1],
    "a row": lambda x: x[:, :, :1],
}


@pytest.mark.parametrize("kind", INPUTS)
def test_unusual_inputs(kind):
    model, x = prepared(norm(), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)), INPUTS[kind](torch.randn(4, 3, 41, 50))
    want, got = model(x), quantize.convert(model)(x)
    torch.testing.assert_close(got, want, **CLOSE)


def test_other_dtypes_go_the_plain_way():
    model, x = prepared(norm(), nn.ReLU(), nn.MaxPool2d(3, 2, 1)), torch.randn(2, 3, 41, 50)
    packed = quantize.convert(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(packed(x), model(x), rtol=0.1, atol=0.1)
    assert copy.deepcopy(packed).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_modules_that_are_called_twice():
    class Twice(Network):
        def forward(self, x):
            return super().forward(x) + super().forward(2 * x)

    torch.manual_seed(0)
    model, x = quantize.prepare(Twice(norm(), nn.ReLU()), {"*": quantize.Uniform(8), "conv": None}).eval(), torch.randn(2, 3, 41, 50)
    torch.testing.assert_close(quantize.convert(model)(x), model(x), **CLOSE)
