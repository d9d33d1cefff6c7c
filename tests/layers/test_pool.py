"""Pools: everything exact; at most a byte an output kept by max pools, nothing but shapes by the others."""

import pytest
import torch
from exact_levels import assert_same, run, twins
from torch import nn

import quantize
from quantize import (
    QAdaptiveAvgPool1d,
    QAdaptiveAvgPool2d,
    QAdaptiveAvgPool3d,
    QAvgPool1d,
    QAvgPool2d,
    QAvgPool3d,
    QMaxPool1d,
    QMaxPool2d,
    QMaxPool3d,
    QUpsample,
)

MAX = [
    (QMaxPool1d, (2,), {}, (2, 3, 20)),
    (QMaxPool1d, (3,), {"stride": 2, "padding": 1, "dilation": 2, "ceil_mode": True}, (2, 3, 21)),
    (QMaxPool2d, (2,), {}, (2, 3, 8, 9)),
    (QMaxPool2d, (3, 2, 1), {}, (2, 3, 8, 9)),
    (QMaxPool2d, (3, 2, 1), {"ceil_mode": True}, (2, 3, 8, 9)),
    (QMaxPool2d, ((3, 2),), {"stride": (1, 3), "padding": (1, 0), "dilation": (2, 3)}, (2, 3, 11, 10)),
    (QMaxPool2d, (16,), {"stride": 1}, (1, 2, 20, 18)),
    (QMaxPool3d, (2,), {}, (2, 3, 4, 5, 6)),
    (QMaxPool3d, ((3, 2, 3),), {"stride": 2, "padding": 1, "ceil_mode": True}, (2, 3, 5, 6, 7)),
]
AVERAGE = [
    (QAvgPool1d, (2,), {}, (2, 3, 20)),
    (QAvgPool1d, (3,), {"stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False}, (2, 3, 21)),
    (QAvgPool2d, (2,), {}, (2, 3, 8, 9)),
    (QAvgPool2d, ((3, 2),), {"stride": (2, 1), "padding": (1, 0), "ceil_mode": True}, (2, 3, 9, 8)),
    (QAvgPool2d, (3,), {"padding": 1, "count_include_pad": False, "divisor_override": 5}, (2, 3, 8, 9)),
    (QAvgPool3d, (2,), {"stride": 1, "divisor_override": 3}, (2, 3, 4, 5, 6)),
    (QAdaptiveAvgPool1d, (4,), {}, (2, 3, 10)),
    (QAdaptiveAvgPool2d, (1,), {}, (2, 3, 8, 9)),
    (QAdaptiveAvgPool2d, ((3, None),), {}, (2, 3, 8, 9)),
    (QAdaptiveAvgPool2d, (11,), {}, (2, 3, 8, 9)),
    (QAdaptiveAvgPool3d, ((2, 1, 3),), {}, (2, 3, 4, 5, 6)),
    (QAdaptiveAvgPool3d, (1,), {}, (2, 3, 4, 5, 6)),
    (QUpsample, (), {"scale_factor": 2}, (2, 3, 8, 9)),
    (QUpsample, (), {"size": (5, 12), "mode": "bilinear", "align_corners": True}, (2, 3, 8, 9)),
]


def formats(x):
    """x, and x with channels last where there is such a format."""
    yield x
    if x.dim() in (4, 5):
        yield x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def name(case):
    return case.__name__ if isinstance(case, type) else str(case)


@pytest.mark.parametrize(("cls", "args", "kwargs", "shape"), MAX, ids=name)
def test_max_pools(cls, args, kwargs, shape):
    plain, ours = twins(cls, *args, **kwargs)
    for x in (*formats(torch.randn(shape)), *formats(torch.ones(shape)), *formats(torch.randn(shape).bfloat16())):
        saved = assert_same(ours, plain, x)
        assert sum(t.nbytes for t in saved) == plain(x).numel()
    assert_same(ours, plain, torch.randn(shape[1:]))
    poisoned = torch.randn(shape)
    poisoned[torch.rand(shape) < 0.05] = torch.nan
    poisoned[torch.rand(shape) < 0.05] = -torch.inf
    assert_same(ours, plain, poisoned)
    assert_same(ours, plain, torch.randn(shape).transpose(-1, -2).contiguous().transpose(-1, -2))
    assert_same(ours, plain, torch.randn(shape).double())
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize(("cls", "args", "kwargs", "shape"), AVERAGE, ids=name)
def test_average_pools_and_upsampling(cls, args, kwargs, shape):
    plain, ours = twins(cls, *args, **kwargs)
    halves = [] if cls is QAvgPool3d else formats(torch.randn(shape).bfloat16())  # PyTorch has no such kernel
    for x in (*formats(torch.randn(shape)), *halves):
        assert not [t for t in assert_same(ours, plain, x) if t.numel() > 0 and t.dim() > 0]
    if cls is not QUpsample:
        assert_same(ours, plain, torch.randn(shape[1:]))
    assert_same(ours, plain, torch.randn(shape).transpose(-1, -2).contiguous().transpose(-1, -2))
    assert_same(ours, plain, torch.randn(shape).double())
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize(("cls", "args", "kwargs", "shape"), [*MAX, *AVERAGE], ids=name)
def test_empty_batches(cls, args, kwargs, shape):
    plain, ours = twins(cls, *args, **kwargs)
    assert_same(ours, plain, torch.empty(0, *shape[1:]))


@pytest.mark.parametrize("cls", [QMaxPool1d, QMaxPool2d, QMaxPool3d])
def test_return_indices(cls):
    n = int(cls.__name__[-2])
    plain, ours = twins(cls, 2, return_indices=True)
    x = torch.randn(2, 3, *[6] * n, requires_grad=True)
    for got, want in zip(ours(x), plain(x), strict=True):
        assert torch.equal(got, want)
    unpool = getattr(nn, f"MaxUnpool{n}d")(2)
    assert unpool(*ours(x)).shape == x.shape


def test_windows_of_more_than_256_positions_keep_pytorchs_indices():
    plain, ours = twins(QMaxPool2d, (17, 16), stride=3)
    x = torch.randn(1, 2, 30, 31)
    saved = assert_same(ours, plain, x)
    assert torch.uint8 not in {t.dtype for t in saved}


@pytest.mark.parametrize("layer", [QMaxPool2d(2), QAvgPool2d(2), QAdaptiveAvgPool2d(3)], ids=lambda m: type(m).__name__)
def test_double_backward_is_refused_by_name(layer):
    x = torch.randn(1, 1, 6, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="_pool: the backward of a layer with compressed activations is not differentiable"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (QMaxPool2d(2), (6,)),
        (QMaxPool2d(2), (2, 3, 4, 5, 6)),
        (QMaxPool2d(4), (2, 3, 2, 2)),
        (QMaxPool2d(2, padding=2), (2, 3, 8, 8)),
        (QMaxPool2d((2, 2, 2)), (2, 3, 8, 8)),
        (QAvgPool2d(2, (2, 2, 2)), (2, 3, 8, 8)),
        (QAvgPool2d(4), (2, 3, 2, 2)),
        (QAvgPool3d(2), (2, 3)),
        (QAdaptiveAvgPool2d(-1), (2, 3, 4, 4)),
    ],
    ids=str,
)
def test_bad_arguments_get_pytorchs_error(layer, shape):
    x = torch.randn(shape)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        layer.plain.forward(layer, x)
    with pytest.raises(type(expected.value)) as got:
        layer(x.requires_grad_())
    assert str(got.value).split("\n")[0] == str(expected.value).split("\n")[0]


def test_lists_of_one_number_count_for_every_dimension():
    x = torch.randn(2, 3, 8, 9)
    assert_same(QMaxPool2d([3], [2], [1], [1]), nn.MaxPool2d(3, 2, 1), x)
    assert_same(QAvgPool2d([3], [2], [1]), nn.AvgPool2d(3, 2, 1), x)


def test_disabled():
    ours = QMaxPool2d(2, config=quantize.ActivationConfig(enabled=False))
    assert torch.int64 in {t.dtype for t in run(ours, torch.randn(1, 1, 6, 6))[2]}
