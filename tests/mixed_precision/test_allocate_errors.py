"""Bad arguments to allocate are named with what was expected; what an Allocation is."""

import math
import pickle
import re

import pytest
import torch
from allocation_problems import matrix, sensitivity
from torch import nn

import quantize


@pytest.fixture
def s():
    return sensitivity(matrix("low_rank", 4, 3, 0), 4)  # 2, 4 or 8 bytes a layer


TABLE = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"max_bytes": 7}, ValueError, "max_bytes must be at least 8, the bytes of the smallest choices; got 7"),
        ({"max_bytes": -math.inf}, ValueError, "max_bytes must be at least 8"),
        ({"max_bit_ops": 7.5}, ValueError, "max_bit_ops must be at least 8, the bit operations of the smallest choices; got 7.5"),
        (
            {"max_bytes": 10, "fixed": {"*0": (8, None)}},
            ValueError,
            "at least 14, the bytes of the smallest choices that fixed leaves; got 10",
        ),
        ({"max_bytes": math.nan}, ValueError, "max_bytes must not be NaN"),
        ({"max_bytes": "10"}, TypeError, "max_bytes must be a number; got '10'"),
        ({"max_bytes": True}, TypeError, "max_bytes must be a number; got True"),
        ({"max_bit_ops": torch.ones(2)}, TypeError, "max_bit_ops must be a number"),
        ({"time_limit": 0}, ValueError, "time_limit must be above 0 seconds; got 0"),
        ({"time_limit": -1.0}, ValueError, "time_limit must be above 0 seconds"),
        ({"time_limit": math.nan}, ValueError, "time_limit must not be NaN"),
        ({"time_limit": None}, TypeError, "time_limit must be a number; got None"),
        ({"latency": TABLE}, ValueError, "latency and max_latency must be given together; got latency without max_latency"),
        ({"max_latency": 1.0}, ValueError, "got max_latency without latency"),
        (
            {"latency": TABLE, "max_latency": 3.0},
            ValueError,
            "max_latency must be at least 4, the latency of the smallest choices; got 3.0",
        ),
        ({"latency": {}, "max_latency": 9.0}, TypeError, "latency must be a Tensor or rows of real numbers; got {}"),
        ({"latency": TABLE[:3], "max_latency": 9.0}, ValueError, r"latency must be \[4, 3\], .*; got \[3, 3\]"),
        (
            {"latency": TABLE * math.nan, "max_latency": 9.0},
            ValueError,
            "latency must be finite and at least 0; got nan for 'layer0' at w2",
        ),
        ({"latency": -TABLE, "max_latency": 9.0}, ValueError, "latency must be finite and at least 0; got -1.0 for 'layer0' at w2"),
        ({"latency": TABLE.to("meta"), "max_latency": 9.0}, TypeError, "latency must be a dense Tensor with values; got one on meta"),
        ({"latency": TABLE.to_sparse(), "max_latency": 9.0}, TypeError, "latency must be a dense Tensor .*; got torch.sparse_coo"),
        ({"latency": TABLE > 0, "max_latency": 9.0}, TypeError, "latency must be of real numbers; got torch.bool"),
        ({"fixed": [("layer0", (2, None))]}, TypeError, "fixed must be a mapping from glob patterns"),
        ({"fixed": {0: (2, None)}}, TypeError, "fixed's keys must be glob patterns over the layers' names; got 0"),
        ({"fixed": {"conv*": (2, None)}}, ValueError, re.escape("got 'conv*', which fits none")),
        ({"fixed": {"layer0": (3, None)}}, ValueError, re.escape("got (3, None) for 'layer0'")),
        ({"fixed": {"layer0": 2}}, ValueError, "got 2 for 'layer0'"),
    ],
)
def test_bad_arguments(s, arguments, error, says):
    with pytest.raises(error, match=says) as caught:
        quantize.allocate(s, **arguments)
    assert str(caught.value).startswith("allocate: ")


def test_not_a_sensitivity():
    with pytest.raises(TypeError, match="allocate: sensitivity must be a Sensitivity; got Tensor"):
        quantize.allocate(torch.eye(3))


def test_the_binding_checks_what_it_reads(s):
    good = [s.matrix, torch.empty(0, 4, 3, dtype=torch.float64), [], torch.zeros(4, 3, dtype=torch.float64), torch.ones(4, 3) > 0, 1.0]
    assert quantize._C.allocate(*good)["outcome"] == "found"
    for place, wrong in (
        (0, s.matrix[1:]),
        (0, s.matrix.T[:, ::2]),
        (0, s.matrix.float()),
        (1, TABLE),
        (3, TABLE),
        (4, TABLE),
        (4, TABLE[0] > 0),
    ):
        with pytest.raises(ValueError, match="allocate: "):
            quantize._C.allocate(*good[:place], wrong, *good[place + 1 :])


def test_allocation_cannot_be_changed(s):
    allocation = quantize.allocate(s, max_bytes=20)
    for name in ("objective", "choice", "anything"):
        with pytest.raises(AttributeError):
            setattr(allocation, name, 1)
    with pytest.raises(AttributeError):
        del allocation.choice
    allocation.choice.clear()
    allocation.config.clear()
    assert len(allocation.choice) == len(allocation) == 4
    restored = pickle.loads(pickle.dumps(allocation))
    assert restored.choice == allocation.choice and restored == allocation and str(restored) == str(allocation)


def test_prints_a_table():
    size = torch.tensor([[1024, 2048], [10240, 20480]])
    s = quantize.Sensitivity(
        ["conv", "fc"],
        [(4, 8), (8, 8)],
        torch.eye(4),
        size,
        size * 1000,
        shapes={"conv": {"weight": (8, 256)}, "fc": {"weight": (80, 256)}},
    )
    allocation = quantize.allocate(s, max_bytes=12288, latency=size * 1e-6, max_latency=1.0)
    assert allocation.average_bits == pytest.approx((8 * 8 + 4 * 80) / 88)
    assert (allocation.bytes, allocation.bit_ops, allocation.latency) == (12288, 12288000, pytest.approx(0.012288))
    lines = str(allocation).splitlines()
    assert lines[0].split() == ["layer", "weight", "bits", "activation", "bits", "KiB", "bit", "operations", "latency"]
    assert [line.split() for line in lines[2:4]] == [
        ["conv", "8", "8", "2.0", "2.0", "M", "0.00205"],
        ["fc", "4", "8", "10.0", "10.2", "M", "0.0102"],
    ]
    assert lines[5] == "12.0 KiB, 12.3 M bit operations, latency 0.01229, 4.36 bits a weight"
    assert re.fullmatch(r"objective 2, lower bound 2: proven in \d+\.\d\d s", lines[6])
    assert repr(allocation) == f"Allocation(2 layers, {lines[6]})"


def test_is_a_configuration():
    """Of groups every member; names with glob characters; None stays in full precision."""
    model = nn.ModuleDict({"a[1]": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4), "a1": nn.Linear(4, 4)})
    value = torch.diag(torch.tensor([1.0, 0.0, 1.0, 2.0]))
    s = quantize.Sensitivity(
        ["stage", "c"], [(2, None), (None, None)], value, torch.tensor([[1, 9], [1, 9]]), torch.ones(2, 2), members={"stage": ("a[1]", "b")}
    )
    allocation = quantize.allocate(s)
    assert allocation.choice == {"stage": (None, None), "c": (2, None)}
    assert allocation.config == dict(allocation) == {"a[[]1]": None, "b": None, "c": quantize.Uniform(2)}
    with pytest.raises(KeyError):
        allocation["a1"]
    allocation.check_model(model)
    fixed = quantize.allocate(s, fixed={"stage": (2, None)})
    quantize.prepare(model, fixed)
    bits = quantize.weight_bits(model)
    assert {name.split(".")[0] for name in bits} == {"a[1]", "b", "c"} or len(bits) == 3
    with pytest.raises(ValueError, match="'c'"):
        allocation.check_model(nn.ModuleDict({"a[1]": nn.Linear(4, 4), "b": nn.Linear(4, 4)}))
