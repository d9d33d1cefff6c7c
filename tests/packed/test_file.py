"""save and load: bit-equal models, equal bytes, sizes by formula, and other architectures refused by name."""

import copy
import json
import os
import struct
import sys
from pathlib import Path

import pytest
import torch
from copies import through_torch_save
from packed_models import Attention, PaddedConv, Residual, Tied, packed_of, warm
from safetensors import safe_open
from torch import nn

from quantize import ActivationConfig, QModule
from quantize.packed.convert import convert
from quantize.packed.file import load, save
from quantize.packed.modules import PackedConv2d
from quantize.packed.size_report import size_report
from quantize.weight.config import PowerOfTwo, Uniform
from quantize.weight.prepare import prepare

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))


def header_bytes(path):
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def layers_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["quantize"])["layers"]


class Buffers(nn.Module):
    """Tensors of every sort beside a layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.bfloat16))
        self.register_buffer("mask", torch.tensor([True, False] * 4))
        self.register_buffer("empty", torch.empty(0, 3, dtype=torch.float16))
        self.register_buffer("counts", torch.arange(6).view(2, 3).t())
        self.register_buffer("scratch", torch.randn(5), persistent=False)

    def forward(self, x):
        return self.fc(x) * self.mask * self.scale


MODELS = {
    "residual": (Residual, IMAGE),
    "one convolution": (lambda: nn.Conv2d(3, 17, 5, 2, padding=(2, 1), dilation=(1, 2)), IMAGE),
    "same": (lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding="same", padding_mode="circular", groups=3)), IMAGE),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 3, 2, 1, 1, groups=3), nn.BatchNorm2d(6)), IMAGE),
    "one-dimensional": (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 3, 2)), IMAGE),
    "attention": (Attention, TOKENS),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), TOKENS),
    "own forward": (lambda: nn.Sequential(PaddedConv(3, 4, 2), nn.Conv2d(4, 4, 1)), IMAGE),
    "tied": (Tied, torch.arange(6)),
    "buffers": (Buffers, TOKENS),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", [PowerOfTwo(4), Uniform(3), Uniform(8, activation_bits=6)], ids=["po2", "3 bits", "8/6 bits"])
def test_round_trip(name, config, tmp_path):
    make, x = MODELS[name]
    _, packed = packed_of(make(), config, x)
    a, b = tmp_path / "a", tmp_path / "b"
    save(packed, a)
    model = warm(make())
    loaded = load(model, a)
    assert loaded is model and not any(m.training for m in loaded.modules())
    with torch.no_grad():
        assert torch.equal(loaded(x), packed(x))
    save(loaded, b)
    assert a.read_bytes() == b.read_bytes()
    assert a.stat().st_size == header_bytes(a) + size_report(packed).bytes == header_bytes(a) + size_report(loaded).bytes
    assert size_report(packed).layers == size_report(loaded).layers
    with torch.no_grad():
        assert torch.equal(load(convert(prepare(warm(make()), Uniform(2))), a)(x), packed(x))  # over another converted one
    save(load(loaded, a), b)
    assert a.read_bytes() == b.read_bytes()
    with safe_open(a, "pt") as file:  # the format is safetensors'
        assert list(file.metadata()) == ["quantize"] and file.keys()


def test_the_same_bytes_each_time(tmp_path):
    _, packed = packed_of(Residual(), Uniform(4))
    twins = [packed, copy.deepcopy(packed), packed.train(), through_torch_save(packed)]
    for i, twin in enumerate(twins):
        save(twin, tmp_path / str(i))
    assert len({(tmp_path / str(i)).read_bytes() for i in range(len(twins))}) == 1
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2", "3"]  # no temporary file is left


def test_bytes_of_a_layer(tmp_path):
    packed = convert(prepare(nn.Conv2d(256, 256, 3, bias=False), PowerOfTwo(4)))
    save(packed, tmp_path / "f")
    assert (tmp_path / "f").stat().st_size - header_bytes(tmp_path / "f") == 294_912 + 1_024 == size_report(packed).bytes


@pytest.mark.parametrize("config", [PowerOfTwo(4), Uniform(8, activation_bits=8)], ids=["po2", "uniform"])
def test_resnet20_is_its_parts_and_a_short_header(config, tmp_path):
    examples = Path(__file__).resolve().parents[2] / "examples"
    if not examples.exists():
        pytest.skip("needs the source tree")
    sys.path.insert(0, str(examples))
    try:
        from models.cifar_resnet import CifarResNet
    finally:
        sys.path.remove(str(examples))
    x = torch.randn(1, 3, 32, 32)
    _, packed = packed_of(CifarResNet(20), config, x)
    save(packed, tmp_path / "f")
    assert header_bytes(tmp_path / "f") < 16 << 10
    parts = 0
    for module in packed.modules():
        if hasattr(module, "codes"):
            n, k = module.shape[0], module.weight[0].numel()
            parts += n * -(-k * (4 if module.bits == 4 else 8) // 64) * 8 + 4 * n + 4 * n + (8 if module.activation_bits else 0)
    assert (tmp_path / "f").stat().st_size == parts + header_bytes(tmp_path / "f")
    assert torch.equal(load(CifarResNet(20), tmp_path / "f")(x), packed(x))


def test_tied_tensors_are_stored_once(tmp_path):
    packed = convert(prepare(Tied(), Uniform(8)))
    save(packed, tmp_path / "f")
    with safe_open(tmp_path / "f", "pt") as file:
        assert sorted(file.keys()) == ["embedding.weight", "head.bias", "inner.codes", "inner.scales"]
    assert layers_of(tmp_path / "f")[1]["tied"] == {"codes": "inner.codes", "scales": "inner.scales"}
    loaded = load(Tied(), tmp_path / "f")
    assert loaded.inner.codes is loaded.head.codes


def test_what_compressed_training_leaves_does_not_matter(tmp_path):
    _, packed = packed_of(Residual(), Uniform(4))
    save(packed, tmp_path / "f")
    model = QModule(Residual(), ActivationConfig(bits=2, max_bits=2))
    loaded = load(model, tmp_path / "f")
    assert type(loaded.conv1) is PackedConv2d and torch.equal(loaded(IMAGE), packed(IMAGE))


def test_half_models(tmp_path):
    packed = convert(prepare(Residual().half(), Uniform(4)))
    save(packed, tmp_path / "f")
    x = IMAGE.half()
    assert torch.equal(load(Residual().half(), tmp_path / "f")(x), packed(x))
    with pytest.raises(ValueError, match=r"layer 'bn1': expected tensor 'bn1.bias', float32 \[6\]; found float16 \[6\]"):
        load(Residual(), tmp_path / "f")


def other(**kwargs):
    return lambda: nn.Sequential(nn.Conv2d(3, 8, 3, **kwargs), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))


def without(index):
    model = other()()
    model[index] = nn.Identity()
    return model


ARCHITECTURES = {
    "stride": (other(stride=2), r"layer '0': expected stride \[2, 2\], .*; found 1"),
    "padding": (other(padding=1), r"layer '0': expected padding \[1, 1\], .*; found 0"),
    "same": (other(padding="same"), "layer '0': expected padding same, .*; found 0"),
    "dilation": (other(dilation=2), r"layer '0': expected dilation \[2, 2\], .*; found 1"),
    "padding mode": (other(padding_mode="reflect"), "layer '0': expected padding_mode reflect, .*; found 'zeros'"),
    "bias": (other(bias=False), "layer '0': expected bias False, .*; found True"),
    "kind": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 3)),
        "layer '0': expected kind ConvTranspose2d, .*; found 'Conv2d'",
    ),
    "own forward": (lambda: nn.Sequential(PaddedConv(3, 8, 3)), "layer '0': expected kind PaddedConv, .*; found 'Conv2d'"),
    "channels": (lambda: nn.Sequential(nn.Conv2d(3, 9, 3)), r"layer '0': expected weight of shape \[9, 3, 3, 3\].* found \[8, 3, 3, 3\]"),
    "groups": (lambda: nn.Sequential(nn.Conv2d(24, 8, 3, groups=8)), "layer '0': expected groups 8, .*; found 1"),
    "later layer": (
        lambda: nn.Sequential(*other()()[:3], nn.Linear(288, 6)),
        r"layer '3': expected weight of shape \[6, 288\].* found \[5, 288\]",
    ),
    "more layers": (
        lambda: nn.Sequential(*other()(), nn.Linear(5, 5)),
        r"layer '4': expected tensor '4.bias', float32 \[5\]; found none",
    ),
    "fewer layers": (lambda: other()()[:3], r"layer '3': expected no such layer, .*; found Linear \[5, 288\]"),
    "gap": (lambda: without(0), "layer '0': expected kind Identity, .*; found 'Conv2d'"),
    "names": (
        lambda: nn.Sequential(*[nn.Sequential(m) for m in other()()]),
        "layer '0': expected kind Sequential, .*; found 'Conv2d'",
    ),
    "nothing": (nn.Identity, "layer '0': expected no such layer"),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_another_architecture(case, tmp_path):
    make, message = ARCHITECTURES[case]
    _, packed = packed_of(other()(), Uniform(4))
    save(packed, tmp_path / "f")
    model = make()
    before, shown = {k: v.clone() for k, v in model.state_dict().items()}, str(model)
    with pytest.raises(ValueError, match=f"load: {tmp_path / 'f'}: {message}"):
        load(model, tmp_path / "f")
    assert str(model) == shown and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_definitions_with_parametrizations(tmp_path):
    define = lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)))  # noqa: E731
    prepared = prepare(define(), Uniform(4))
    save(convert(prepared), tmp_path / "f")
    with pytest.raises(
        ValueError,
        match="layer '0': expected a plain parameter 'weight', .* has _WeightNorm .*remove_parametrizations\\(layer, 'weight'\\)",
    ):
        load(define(), tmp_path / "f")
    x, plain = torch.randn(2, 8), define()
    nn.utils.parametrize.remove_parametrizations(plain[0], "weight")
    assert torch.equal(load(plain, tmp_path / "f")(x), convert(prepared)(x))
    assert torch.equal(load(nn.Sequential(nn.Linear(8, 4)), tmp_path / "f")(x), convert(prepared)(x))


def test_padded_sequences(tmp_path):
    define = lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)  # noqa: E731
    _, packed = packed_of(define(), Uniform(8, activation_bits=8), TOKENS)
    save(packed, tmp_path / "f")
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        whole, short = packed(TOKENS, src_key_padding_mask=mask), packed(TOKENS[1:, :3])
        torch.testing.assert_close(whole[1:, :3], short)
        torch.testing.assert_close(whole[:1], packed(TOKENS[:1]))
        assert torch.equal(load(define(), tmp_path / "f")(TOKENS, src_key_padding_mask=mask), whole)


def test_heads_and_norms_of_another_architecture(tmp_path):
    class Heads(Attention):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 4, batch_first=True)

    _, packed = packed_of(Attention(), Uniform(4))
    save(packed, tmp_path / "f")
    with pytest.raises(ValueError, match="layer 'attn': expected num_heads 4, as in the model; found 2"):
        load(Heads(), tmp_path / "f")
    _, packed = packed_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), Uniform(4))
    save(packed, tmp_path / "f")
    for norm, words in ((nn.ReLU(), r"ReLU\(\)"), (nn.BatchNorm2d(5), r"BatchNorm2d\(5\)")):
        with pytest.raises(ValueError, match=f"layer '1': expected {words}, as in the model; found a batch norm of 4 channels"):
            load(nn.Sequential(nn.Conv2d(3, 4, 1), norm), tmp_path / "f")
    with pytest.raises(ValueError, match="layer '1': expected a batch norm of the model"):
        load(nn.Sequential(nn.Conv2d(3, 4, 1)), tmp_path / "f")


def test_models_that_load_refuses(tmp_path):
    _, packed = packed_of(nn.Sequential(nn.Linear(4, 4)), Uniform(4))
    save(packed, tmp_path / "f")
    with pytest.raises(ValueError, match="model must be the float definition; '0.weight' is prepared"):
        load(prepare(nn.Sequential(nn.Linear(4, 4)), Uniform(4)), tmp_path / "f")
    with pytest.raises(ValueError, match="layer '0': expected kind LazyLinear, as in the model; found 'Linear'"):
        load(nn.Sequential(nn.LazyLinear(4)), tmp_path / "f")
    with pytest.raises(ValueError, match="layer '0': expected a model with its tensors in memory; weight has no values yet"):
        load(nn.Sequential(nn.Linear(4, 4, device="meta")), tmp_path / "f")
    with pytest.raises(TypeError, match="load: model must be an nn.Module"):
        load(None, tmp_path / "f")
    with pytest.raises(FileNotFoundError):
        load(nn.Linear(4, 4), tmp_path / "none")
    packed = convert(prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {"1": Uniform(4)}))
    save(packed, tmp_path / "f")
    with pytest.raises(ValueError, match="layer '0': expected Linear, packed, as the model has it; found no layer of that name"):
        load(convert(prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), Uniform(4))), tmp_path / "f")


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}


def test_models_that_save_refuses(tmp_path):
    path = tmp_path / "f"
    with pytest.raises(TypeError, match="save: model must be an nn.Module"):
        save({}, path)
    with pytest.raises(ValueError, match="save: model must be converted; '0.weight' is only prepared. Call quantize.convert first"):
        save(prepare(nn.Sequential(nn.Linear(4, 4)), Uniform(4)), path)
    with pytest.raises(ValueError, match="it has no packed weights. Call quantize.prepare and quantize.convert first"):
        save(nn.Linear(4, 4), path)
    packed = convert(prepare(nn.Sequential(nn.Linear(4, 4), Extra(4, 4)), {"0": Uniform(4)}))
    with pytest.raises(ValueError, match="the state of '1' must be tensors; Extra has an extra state"):
        save(packed, path)
    packed = convert(prepare(Attention(), Uniform(4)))
    with torch.no_grad():
        packed.attn.in_proj_weight[0, 0] += 1
    with pytest.raises(ValueError, match="in_proj_weight of 'attn' must be what convert made it; it was changed since"):
        save(packed, path)
    packed = convert(prepare(nn.Sequential(nn.Linear(4, 4)), Uniform(4)))
    packed.register_buffer("z", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="'z' must be a dense tensor of F64, .*; got torch.complex64"):
        save(packed, path)
    assert not os.listdir(tmp_path)


def test_an_older_file_survives_a_failure(tmp_path, monkeypatch):
    packed = convert(prepare(nn.Linear(4, 4), Uniform(4)))
    save(packed, tmp_path / "f")
    before = (tmp_path / "f").read_bytes()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        save(convert(prepare(nn.Linear(4, 4), Uniform(8))), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == before and os.listdir(tmp_path) == ["f"]


def test_relative_paths_and_strings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packed, x = convert(prepare(nn.Linear(4, 4), Uniform(4))), torch.randn(3, 4)
    save(packed, "f.safetensors")
    assert os.listdir(tmp_path) == ["f.safetensors"]
    assert torch.equal(load(nn.Linear(4, 4), "f.safetensors")(x), packed(x))


def backbone():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))


def test_a_converted_part_in_another_model(tmp_path):
    packed = convert(prepare(warm(backbone()).eval(), Uniform(4)))
    whole = nn.Sequential()
    whole.inner = nn.Sequential(packed)
    whole.head = nn.Conv2d(8, 2, 1)
    save(whole, tmp_path / "f")
    other = nn.Sequential()
    other.inner, other.head = nn.Sequential(backbone()), nn.Conv2d(8, 2, 1)
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(load(other, tmp_path / "f")(x), whole(x))
    save(other.inner, tmp_path / "g")  # and out of it again
    assert torch.equal(load(nn.Sequential(backbone()).eval(), tmp_path / "g")(x), packed(x))
    save(other.inner[0], tmp_path / "h")
    assert torch.equal(load(backbone().eval(), tmp_path / "h")(x), packed(x))


def test_a_part_that_lacks_what_it_was_converted_with(tmp_path):
    packed = convert(prepare(warm(backbone()).eval(), Uniform(4)))
    with pytest.raises(ValueError, match="save: layer '0' was converted together with '4', which must be in the model too"):
        save(nn.Sequential(packed[3]), tmp_path / "f")
    packed[4] = nn.BatchNorm2d(8)
    with pytest.raises(ValueError, match="save: layer '3' was converted together with '4'"):
        save(packed, tmp_path / "f")
    assert not (tmp_path / "f").exists()
