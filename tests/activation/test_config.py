"""ActivationConfig, mappings of configs, and pack_activations."""

import dataclasses

import pytest
import torch
from torch import nn

import quantize
from quantize import ActivationConfig
from quantize.patterns import resolve


def test_defaults_and_equality():
    config = ActivationConfig()
    assert dataclasses.astuple(config) == (2, 8, 256, True, False, True, False)
    assert config == ActivationConfig(bits=2)
    assert hash(config) == hash(ActivationConfig(bits=2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 4


@pytest.mark.parametrize(
    ("arguments", "adaptive"),
    [({}, True), ({"bits": 2, "max_bits": 2}, False), ({"bits": 1.5}, True), ({"group_size": "tensor"}, False), ({"bits": 8}, False)],
)
def test_adaptive(arguments, adaptive):
    assert ActivationConfig(**arguments).adaptive == adaptive


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bits": 0}, ValueError, r"bits must lie between 1 and max_bits \(8\); got 0"),
        ({"bits": 9}, ValueError, "bits must lie between 1 and max_bits"),
        ({"bits": 4, "max_bits": 2}, ValueError, r"bits must lie between 1 and max_bits \(2\); got 4"),
        ({"bits": float("nan")}, ValueError, "bits must lie"),
        ({"bits": "2"}, TypeError, "bits must be a number; got '2'"),
        ({"bits": True}, TypeError, "bits must be a number"),
        ({"bits": None}, TypeError, "bits must be a number"),
        ({"max_bits": 3}, ValueError, "max_bits must be 1, 2, 4 or 8; got 3"),
        ({"max_bits": 16}, ValueError, "max_bits must be 1, 2, 4 or 8"),
        ({"max_bits": [8]}, TypeError, "max_bits must be a number"),
        ({"max_bits": 8.0}, TypeError, "max_bits must be an integer; got 8.0"),
        ({"group_size": 2**70}, ValueError, r"group_size must be a positive integer below 2\^63.*got 1180591620717411303424"),
        ({"group_size": 0}, ValueError, "group_size must be a positive integer"),
        ({"group_size": -1}, ValueError, "group_size must be a positive integer"),
        ({"group_size": "channel"}, ValueError, "group_size must be .*got 'channel'"),
        ({"group_size": 2.5}, TypeError, "group_size must be"),
        ({"group_size": True}, TypeError, "group_size must be"),
        ({"per_layer": 1}, TypeError, "per_layer must be a bool; got 1"),
        ({"use_gradient": "yes"}, TypeError, "use_gradient must be a bool"),
        ({"enabled": None}, TypeError, "enabled must be a bool"),
    ],
)
def test_bad_configs_are_named(arguments, error, message):
    with pytest.raises(error, match=f"ActivationConfig: {message}"):
        ActivationConfig(**arguments)


@pytest.mark.parametrize("bits", [3, 2.5, 5])
def test_fixed_bits_must_be_a_width(bits):
    with pytest.raises(ValueError, match="max_bits must be 1, 2, 4 or 8"):
        ActivationConfig(bits=bits, max_bits=bits)


def test_a_range_for_the_tensor_needs_whole_bits():
    # Nothing adapts there, so what is asked for must be a width.
    with pytest.raises(ValueError, match="bits must be 1, 2, 4 or 8"):
        ActivationConfig(bits=3, group_size="tensor")


@pytest.mark.parametrize(
    ("name", "expected"), [("", "all"), ("conv1", None), ("layer1.conv1", "layer"), ("layer1.0.fc", None), ("fc", None), ("head", "all")]
)
def test_the_last_matching_pattern_wins(name, expected):
    assert resolve({"*": "all", "layer?.*": "layer", "conv1": None, "*fc": None}, name) == expected


def test_no_match_is_none():
    assert resolve({"layer*": "x"}, "conv") is None
    assert resolve("x", "conv") == "x"


@pytest.mark.parametrize("config", [2, "2 bits", {"*": 2}, {"*": "x"}, {1: ActivationConfig()}, [ActivationConfig()], None])
def test_qmodule_names_a_bad_config(config):
    with pytest.raises(TypeError, match="QModule: config"):
        quantize.QModule(nn.Linear(3, 3), config)


# ---------------------------------------------------------------------------------------------------------------- pack_activations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [1, 64, 256, 1000, "sample", "tensor"])
def test_pack_and_unpack(group_size, dtype):
    for shape in ((3, 5, 7, 9), (2, 600), (4,), (), (0, 3)):
        x = torch.randn(shape).to(dtype)
        for bits in (1, 2, 4, 8):
            packed = quantize.pack_activations(x, bits, group_size)
            back = packed.unpack()
            assert (back.shape, back.dtype, back.stride()) == (x.shape, x.dtype, x.stride())
            assert packed.nbytes <= max(x.nbytes, 0)
            if x.numel():
                assert (back.float() - x.float()).abs().max() <= 1.05 * (x.max() - x.min()).float() / (2**bits - 1) + 0.05


def test_bytes_and_reproducibility():
    x = torch.randn(4, 64, 8, 8)
    packed = quantize.pack_activations(x, 2, seed=3, offset=4)
    assert packed.nbytes == packed.codes.nbytes + packed.ranges.nbytes == 4 * (1024 + 16 * 4)
    again, other, moved = (quantize.pack_activations(x, 2, seed=s, offset=o) for s, o in ((3, 4), (4, 4), (3, 5)))
    assert torch.equal(packed.codes, again.codes)
    assert not torch.equal(packed.codes, other.codes)
    assert not torch.equal(packed.codes, moved.codes)
    assert torch.equal(packed.unpack(), packed.unpack())
    quantize.pack_activations(x, 2, seed=2**64 - 1, offset=2**63)
    assert repr(packed) == "PackedActivations((4, 64, 8, 8), torch.float32, bits=2, group_size=256, nbytes=4352)"


def test_gradients_do_not_follow():
    x = torch.randn(4, 300, requires_grad=True)
    assert not quantize.pack_activations(x, 2).unpack().requires_grad


def test_exact_levels_and_memory_format():
    x = torch.randint(256, (2, 3, 16, 16)).float().to(memory_format=torch.channels_last)
    x[:, 0, 0, 0], x[:, 2, 15, 15] = 0, 255
    back = quantize.pack_activations(x, 8, "sample").unpack()
    assert torch.equal(back, x)
    assert back.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a Tensor; got list"),
        ({"x": torch.ones(3, dtype=torch.int64)}, TypeError, "x must be float32, float16 or bfloat16; got torch.int64"),
        ({"x": torch.ones(3).double()}, TypeError, "x must be float32"),
        ({"x": torch.ones(3, dtype=torch.complex64)}, TypeError, "x must be float32"),
        ({"x": torch.eye(3).to_sparse()}, TypeError, "x must be a dense Tensor; got torch.sparse_coo"),
        ({"x": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, TypeError, "x must be a dense Tensor; got a nested one"),
        ({"x": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)}, TypeError, "x must be a dense Tensor"),
        ({"group_size": 2**70}, ValueError, "group_size must be a positive integer below"),
        ({"bits": 3}, ValueError, "bits must be 1, 2, 4 or 8; got 3"),
        ({"bits": 2.0}, TypeError, "bits must be 1, 2, 4 or 8"),
        ({"bits": True}, TypeError, "bits must be"),
        ({"group_size": 0}, ValueError, "group_size must be"),
        ({"group_size": "row"}, ValueError, "group_size must be"),
        ({"seed": 1.5}, TypeError, "seed must be an integer; got 1.5"),
        ({"offset": "x"}, TypeError, "offset must be an integer; got 'x'"),
        ({"seed": True}, TypeError, "seed must be an integer; got True"),
        ({"offset": False}, TypeError, "offset must be an integer; got False"),
    ],
)
def test_pack_activations_names_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        quantize.pack_activations(**{"x": torch.randn(3, 4), "bits": 2, **changes})
