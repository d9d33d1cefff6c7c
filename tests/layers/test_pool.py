"""Pools: everything exact; at most a byte an output kept by max pools, nothing but shapes by the others."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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


WINDOWS = [  # kernel, stride, padding, dilation, ceil_mode
    (2, 2, 0, 1, False),
    (3, 2, 1, 1, False),
    (3, 2, 1, 1, True),
    (3, 1, 1, 1, False),
    (1, 2, 0, 1, True),
    ((2, 5), (3, 3), (1, 2), (2, 1), False),
    ((5, 2), (1, 4), (2, 1), (1, 3), True),
    ((16, 16), (5, 2), (8, 8), (1, 1), False),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernels_of_images_are_pytorchs(each_isa, window, channels, dtype):
    ops, padded = torch.ops.quantize, [[n, n] if isinstance(n, int) else list(n) for n in window[:4]]
    for size in ((19, 37), (16, 16), (20, 5)):
        x = torch.randn(2, channels, *size)
        spoiled = torch.where(torch.rand_like(x) < 0.02, torch.nan, x)
        spoiled[0, 0] = -torch.inf
        signs = torch.where(torch.rand_like(x) < 0.5, 0.0, -0.0)  # of equal values the first one counts
        for own in (x, x.round(), spoiled, signs):
            for form in (torch.contiguous_format, torch.channels_last):
                moved = own.to(dtype).contiguous(memory_format=form).requires_grad_()
                want, indices = F.max_pool2d(moved, *window, return_indices=True)
                y, offsets = ops.max_pool_offsets(moved.detach(), *padded, window[4])
                torch.testing.assert_close(y, want.detach(), rtol=0, atol=0, equal_nan=True)
                assert torch.equal(torch.signbit(y), torch.signbit(want)) or own is spoiled
                assert y.stride() == offsets.stride() == want.stride()
                assert torch.equal(ops.unpack_pool_indices(offsets, size, *padded), indices)
                values = ops.max_pool_values(moved.detach(), *padded, window[4])
                torch.testing.assert_close(values, want.detach(), rtol=0, atol=0, equal_nan=True)
                grad = torch.randn_like(y)
                (slope,) = torch.autograd.grad(want, moved, grad)
                got = ops.max_pool_backward(grad, offsets, moved.shape, moved.stride(), *padded, window[4])
                assert torch.equal(got, slope) and got.stride() == slope.stride()


def test_windows_in_the_padding_alone_are_left_to_pytorch():
    x = torch.randn(1, 2, 1, 1)
    window = [2, 2], [1, 1], [1, 1], [2, 2], False
    for got in (torch.ops.quantize.max_pool_offsets(x, *window)[0], torch.ops.quantize.max_pool_values(x, *window)):
        assert torch.equal(got, F.max_pool2d(x, *window))


@pytest.mark.parametrize(
    ("offsets", "padding", "message"),
    [
        (torch.zeros(1, 1, 2, 2), 0, "must be Byte"),
        (torch.zeros(1, 1, 2, 3, dtype=torch.uint8), 0, "must be as many"),
        (torch.full((1, 1, 2, 2), 4, dtype=torch.uint8), 0, "must lie in windows"),
        (torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), 1, "must lie in windows"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 1, "must lie in windows"),  # in the padding
    ],
)
def test_offsets_of_something_else_are_refused(offsets, padding, message):
    size = 4 - 2 * padding
    with pytest.raises((TypeError, ValueError), match=f"max_pool_backward: offsets {message}"):
        torch.ops.quantize.max_pool_backward(
            torch.zeros(1, 1, 2, 2), offsets, [1, 1, size, size], [size**2, size**2, size, 1], [2, 2], [2, 2], [padding] * 2, [1, 1], False
        )


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
        (QMaxPool2d(4), (2, 3, 2, 2)),
        (QMaxPool2d(2, padding=2), (2, 3, 8, 8)),
        (QMaxPool2d((2, 2, 2)), (2, 3, 8, 8)),
        (QAvgPool2d(2, (2, 2, 2)), (2, 3, 8, 8)),
        (QAvgPool2d(4), (2, 3, 2, 2)),
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


@pytest.mark.parametrize("layer", [quantize.QMaxPool2d, quantize.QAvgPool2d])
def test_numpys_integers_count(layer):
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    for arguments in ((np.int64(2),), ((np.int32(3), 2), np.int64(2)), (2, ())):
        plain = [tuple(map(int, a)) if isinstance(a, tuple) else int(a) for a in arguments]
        assert torch.equal(layer(*arguments)(x), layer.plain(*plain)(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_means_are_pytorchs_own(n, training):
    plain, ours = twins((None, quantize.QAdaptiveAvgPool1d, quantize.QAdaptiveAvgPool2d, quantize.QAdaptiveAvgPool3d)[n], 1)
    x = torch.randn(4, 24, *[7] * n)
    assert torch.equal(ours.train(training)(x.clone().requires_grad_()), plain.train(training)(x.clone().requires_grad_()))
