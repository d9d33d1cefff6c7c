"""What is found before a sign: batch norms that can go into its thresholds, and ReLUs that leave it nothing to say."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantize.packed.signs import Path, find_paths


class Net(nn.Module):
    """A body of modules, and a forward made of them."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def conv(**options):
    return nn.Conv2d(8, 8, 3, padding=1, **options)


def paths(forward, kinds=None, **modules):
    return find_paths(Net(forward, **modules).eval(), kinds or {"conv": "sign"})


def test_norm_alone():
    assert paths(lambda m, x: m.conv(m.bn(x)), bn=nn.BatchNorm2d(8), conv=conv()) == {"conv": Path("conv", "bn")}


def test_whole_chain():
    found = paths(
        lambda m, x: m.conv(m.clip(m.bn(m.relu(m.first(x))))),
        first=conv(), relu=nn.ReLU(), bn=nn.BatchNorm2d(8), clip=nn.Hardtanh(), conv=conv(),
    )  # fmt: skip
    assert found == {"conv": Path("conv", "bn", "clip", "relu", "first")}
    assert found["conv"].removed == ("relu", "bn", "clip")


def test_clips_that_keep_the_threshold():
    for kind, clip, goes in [
        ("sign", nn.Hardtanh(), True),
        ("sign", nn.Hardtanh(0.0, 1.0), False),
        ("sign", nn.Hardtanh(0.1, 1.0), False),
        ("unit", nn.ReLU6(), True),
        ("unit", nn.ReLU(), True),
        ("unit", nn.Hardtanh(), True),
        ("unit", nn.Hardtanh(0.0, 0.5), False),
    ]:
        found = paths(lambda m, x: m.conv(m.clip(m.bn(x))), {"conv": kind}, bn=nn.BatchNorm2d(8), clip=clip, conv=conv())
        assert bool(found and found["conv"].norm) == goes, (kind, clip)


def test_norm_of_two_signs_goes_but_not_one_that_others_see():
    modules = lambda: {"bn": nn.BatchNorm2d(8), "clip": nn.Hardtanh(), "conv": conv(), "other": conv()}  # noqa: E731
    both = {"conv": "sign", "other": "sign"}

    def shared(m, x):
        y = m.clip(m.bn(x))
        return m.conv(y) + m.other(y)

    assert paths(shared, both, **modules()) == {n: Path(n, "bn", "clip") for n in both}
    assert paths(shared, {"conv": "sign"}, **modules()) == {}

    def also_norm(m, x):
        y = m.bn(x)
        return m.conv(m.clip(y)) + y

    assert paths(also_norm, **modules()) == {}


def test_source_is_seen_by_nobody_else():
    def residual(m, x):
        y = m.first(x)
        return m.conv(m.bn(y)) + y

    assert paths(residual, first=conv(), bn=nn.BatchNorm2d(8), conv=conv()) == {"conv": Path("conv", "bn")}


@pytest.mark.parametrize("hidden", ["hook", "twice", "read"])
def test_watched_norms_stay(hidden):
    norm, layer = nn.BatchNorm2d(8), conv()
    forward = {
        "twice": lambda m, x: m.conv(m.bn(m.bn(x))),
        "read": lambda m, x: m.conv(m.bn(x)) + m.bn.weight.sum(),
    }.get(hidden, lambda m, x: m.conv(m.bn(x)))
    if hidden == "hook":
        norm.register_forward_hook(lambda *_: None)
    assert paths(forward, bn=norm, conv=layer) == {}


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.conv(m.relu(x)),
        lambda m, x: m.conv(m.pool(m.relu(x))),
        lambda m, x: m.conv(F.relu(x)),
        lambda m, x: m.conv(x.relu()),
        lambda m, x: m.conv(F.max_pool2d(F.relu(x), 2)),
    ],
)
def test_inputs_that_are_never_negative(forward):
    modules = {"relu": nn.ReLU(), "pool": nn.MaxPool2d(2), "conv": conv()}
    assert paths(forward, **modules) == {"conv": Path("conv", constant=True)}
    assert paths(forward, {"conv": "unit"}, **modules) == {}  # a half is a fair threshold there


def less(x, by):
    x -= by  # a trace says "-"
    return x


@pytest.mark.parametrize(
    "change",
    [
        lambda m, y: y.sub_(0.5),
        lambda m, y: y.view(-1).sub_(0.5),
        lambda m, y: less(y, 0.5),
        lambda m, y: torch.sub(y, 0.5, out=y),
        lambda m, y: torch.sub(torch.ones(1), 0.5, out=y),
        lambda m, y: m.change(y),
        lambda m, y: m.drop(y).sub_(0.5),
    ],
)
@pytest.mark.parametrize("between", ["", "drop", "pool"])
def test_inputs_that_are_changed_in_place_can_be_negative(change, between):
    def forward(m, x):
        y = F.relu(x)
        change(m, y)
        return m.conv(getattr(m, between)(y) if between else y)

    def after(m, x):
        y = F.relu(x)
        z = m.conv(y) + m.other(y)
        change(m, y)
        return z

    modules = {"change": Net(lambda m, y: y.sub_(0.5)), "drop": nn.Dropout(), "pool": nn.MaxPool2d(2), "conv": conv(), "other": conv()}
    assert paths(forward, **modules) == {}
    assert paths(after, **modules) == {"conv": Path("conv", constant=True)}


def test_what_cannot_be_traced_keeps_its_norm():
    def branches(m, x):
        return m.conv(m.bn(x)) if x.sum() > 0 else m.conv(x)

    assert paths(branches, bn=nn.BatchNorm2d(8), conv=conv()) == {}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "forward, goes",
    [
        (lambda m, x: m.conv(m.bn(m.relu(m.first(x)))), True),
        (lambda m, x: m.conv(m.bn(m.relu(m.first(x) + x))), True),
        (lambda m, x: m.conv(m.bn(m.relu(y := m.first(x)))) + y, False),
        (lambda m, x: m.conv(m.bn(m.relu((y := m.first(x)).view(2, 8, 8, 8)))) + y, False),
        (lambda m, x: m.conv(m.bn(m.relu(operator.iadd(m.first(x), x)))), True),
        (lambda m, x: m.conv(m.bn(m.relu(operator.iadd(y := m.first(x), x)))) + y, False),
        (lambda m, x: m.conv(m.bn(m.relu(x))), False),
    ],
)
def test_relus_in_place_go_where_nobody_else_sees_their_input(forward, goes, inplace):
    (path,) = paths(forward, first=conv(), relu=nn.ReLU(inplace), bn=nn.BatchNorm2d(8), conv=conv()).values()
    assert path.norm == "bn" and path.relu == ("relu" if goes or not inplace else "")
