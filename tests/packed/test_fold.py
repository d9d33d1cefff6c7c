"""Batch norms: folded where that is right, left where it is not. Every case is also compared with the prepared model."""

import pytest
import torch
from packed_models import Residual, packed_of, warm
from torch import nn

from quantize.packed.convert import convert
from quantize.packed.modules import PackedLayer
from quantize.weight.config import PowerOfTwo, Uniform
from quantize.weight.prepare import prepare

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def conv(groups=1, **kwargs):
    return nn.Conv2d(3, 6, 3, groups=groups, **kwargs)


class Two(nn.Module):
    """conv and bn, used as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.bn, self.how = conv(), nn.BatchNorm2d(6), how

    def forward(self, x, skip=None):
        return self.how(self, x, skip)


class Untraceable(nn.Module):
    """Decides by its data; its children do not."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if float(x.sum()) != 12345 else x


class ReachesIn(nn.Module):
    """Runs a child whole, and a part of it again; the other child cannot be traced."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.other = inner, Untraceable(nn.Conv2d(6, 6, 1))

    def forward(self, x):
        return self.other(self.inner(x)) + self.inner[0](x)


class ReadsNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn.running_mean.sum() + self.bn.weight.sum()


class ReadsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv.weight.sum() + self.conv.bias.sum()


def hooked(model, name, register="register_forward_hook"):
    getattr(model.get_submodule(name), register)(lambda *args: None)
    return model


def shared():
    bn = nn.BatchNorm2d(6)
    return nn.Sequential(conv(), bn, nn.Conv2d(6, 6, 1), bn)


def twice():
    layer, bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    return nn.Sequential(layer, bn, nn.Sequential(layer, bn))


def running_less():
    return nn.Sequential(conv(), nn.BatchNorm2d(6, track_running_stats=False))


FOLDED = {
    "in a row": lambda: nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()),
    "no bias": lambda: nn.Sequential(conv(bias=False), nn.BatchNorm2d(6)),
    "no affine": lambda: nn.Sequential(conv(), nn.BatchNorm2d(6, affine=False)),
    "eps": lambda: nn.Sequential(conv(), nn.BatchNorm2d(6, eps=0.5)),
    "groups": lambda: nn.Sequential(conv(groups=3), nn.BatchNorm2d(6)),
    "padding mode": lambda: nn.Sequential(conv(padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 3, 2), nn.BatchNorm2d(6)),
    "transposed, groups": lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)),
    "synchronised": lambda: nn.Sequential(conv(), nn.SyncBatchNorm(6)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6)),
    "one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)),
    "nested": lambda: nn.Sequential(nn.Sequential(conv()), nn.Sequential(nn.BatchNorm2d(6), nn.Identity())),
    "inside what cannot be traced": lambda: Untraceable(nn.Sequential(conv(), nn.BatchNorm2d(6))),
    "beside what cannot be traced": lambda: nn.Sequential(conv(), nn.BatchNorm2d(6), nn.Sequential(Untraceable(nn.Conv2d(6, 6, 1)))),
    "deep inside": lambda: Untraceable(nn.Sequential(Untraceable(nn.Sequential(conv(), nn.BatchNorm2d(6))), nn.ReLU())),
    "by a forward": lambda: Two(lambda m, x, skip: m.bn(m.conv(x)).relu()),
    "optional argument beside": lambda: Two(lambda m, x, skip: m.bn(m.conv(x)) + (0 if skip is None else skip)),
}
LEFT = {
    "two consumers": lambda: Two(lambda m, x, skip: m.bn(y := m.conv(x)) + y),
    "output too": lambda: Two(lambda m, x, skip: (y := m.conv(x), m.bn(y))[1] * y),
    "something between": lambda: nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(6)),
    "before": lambda: nn.Sequential(nn.BatchNorm2d(3), conv()),
    "layer called twice": lambda: Two(lambda m, x, skip: m.bn(m.conv(x)) + m.conv(-x)),
    "norm called twice": lambda: Two(lambda m, x, skip: m.bn(m.conv(x)) + m.bn(x.repeat(1, 2, 1, 1)[..., 2:, 2:])),
    "only without the optional argument": lambda: Two(lambda m, x, skip: m.bn(m.conv(x)) if skip is None else m.conv(x)),
    "only with it": lambda: Two(lambda m, x, skip: m.bn(m.conv(x)) if skip is not None else m.bn(m.conv(x)) + m.conv(x)),
    "norm shared": shared,
    "both shared": twice,
    "reached into by what cannot be traced": lambda: ReachesIn(nn.Sequential(conv(), nn.BatchNorm2d(6))),
    "norm read": ReadsNorm,
    "weight read": ReadsWeight,
    "no running statistics": running_less,
    "double": lambda: nn.Sequential(conv(), nn.BatchNorm2d(6).double()),
    "hook on the layer": lambda: hooked(nn.Sequential(conv(), nn.BatchNorm2d(6)), "0"),
    "pre-hook on the layer": lambda: hooked(nn.Sequential(conv(), nn.BatchNorm2d(6)), "0", "register_forward_pre_hook"),
    "hook on the norm": lambda: hooked(nn.Sequential(conv(), nn.BatchNorm2d(6)), "1"),
    "pre-hook on the norm": lambda: hooked(nn.Sequential(conv(), nn.BatchNorm2d(6)), "1", "register_forward_pre_hook"),
    "backward hook": lambda: hooked(nn.Sequential(conv(), nn.BatchNorm2d(6)), "0", "register_full_backward_hook"),
    "another norm": lambda: nn.Sequential(conv(), nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
    "channels that differ": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(64, 6), nn.BatchNorm1d(3)),
}


def compare(prepared, packed, x):
    with torch.no_grad():
        torch.testing.assert_close(packed(x), prepared(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", FOLDED)
@pytest.mark.parametrize("config", [PowerOfTwo(4), Uniform(8, activation_bits=8)], ids=["po2", "uniform"])
def test_folded(case, config):
    prepared, packed = packed_of(FOLDED[case](), config, X)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in packed.modules())
    layer = next(m for m in packed.modules() if isinstance(m, PackedLayer))
    assert type(packed.get_submodule(layer.folded[0])) is nn.Identity and layer.bias is not None
    compare(prepared, packed, X)


@pytest.mark.parametrize("case", LEFT)
def test_left(case):
    model = LEFT[case]()
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    prepared = prepare(warm(model), {"*": Uniform(4)})
    packed = convert(prepared)
    assert [n for n, m in packed.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)] == norms
    assert all(m.folded is None for m in packed.modules() if isinstance(m, PackedLayer))
    if case != "double":
        compare(prepared, packed, X)


def test_unprepared_layers_keep_their_norms():
    prepared, packed = packed_of(Residual(), {"fc": Uniform(4)})
    assert type(packed.bn1) is type(packed.bn2) is nn.BatchNorm2d
    compare(prepared, packed, X)


def test_norm_with_two_users_of_its_layer_stays_beside_one_that_goes():
    prepared, packed = packed_of(Residual(), Uniform(4))
    assert type(packed.bn1) is nn.Identity and type(packed.bn2) is nn.BatchNorm2d
    compare(prepared, packed, X)


def test_infinite_scales_are_not_folded():
    model = warm(nn.Sequential(conv(), nn.BatchNorm2d(6, eps=0.0)))
    model[1].running_var[2] = 0
    assert type(convert(prepare(model, Uniform(4)))[1]) is nn.BatchNorm2d


def test_folded_layers_want_the_norms_input():
    """A batch norm after nn.Linear normalises dimension 1, which is the features only in two dimensions."""
    _, packed = packed_of(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), Uniform(4))
    packed(torch.randn(3, 5))
    with pytest.raises(ValueError, match="PackedLinear '0': input must have 2 dimensions, as its folded batch norm '1' wants"):
        packed(torch.randn(3, 6, 5))


def test_tracing_leaves_no_trace():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.calls, self.last = conv(), nn.BatchNorm2d(6), 0, None
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.calls, self.last = self.calls + 1, x
            self.steps += 1
            return self.bn(self.conv(x)) + torch.rand(())

    model = prepare(warm(Counts()), Uniform(4))
    state = torch.get_rng_state()
    packed = convert(model)
    assert torch.equal(torch.get_rng_state(), state)
    for m in (model, packed):
        assert (m.calls, m.last, float(m.steps)) == (0, None, 0)
    assert type(packed.bn) is nn.Identity
