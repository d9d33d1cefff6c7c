"""Files of 1-bit layers, damaged on purpose: what stands for norms and links between layers is checked like everything else."""

import struct

import pytest
import torch
from test_hostile_files import HUGE, build, layer, refused, split, tensor, write
from torch import nn

import quantize


def define():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardtanh(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.BatchNorm2d(12), nn.Conv2d(12, 4, 1)
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Layers 0 (float), 3 and 6 (signs): 3 hands bits to 6."""
    torch.manual_seed(0)
    packed = quantize.convert(quantize.prepare(define(), {"*": quantize.XNOR(), "0": None}))
    path = tmp_path_factory.mktemp("good") / "f"
    quantize.save(packed, path)
    loaded = quantize.load(define(), path)
    assert torch.equal(loaded(x := torch.randn(2, 3, 9, 9)), packed(x)) and loaded[3].feeds == "6"
    return path.read_bytes()


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Layer 0 hands its floats to a tanh, and they become the signs that layer 2 takes."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3))
    path = tmp_path_factory.mktemp("apart") / "f"
    quantize.save(quantize.convert(quantize.prepare(model, quantize.XNOR())), path)
    return path.read_bytes()


def test_links_that_the_model_has_not(good, apart, tmp_path):
    header, fields, data = split(apart)
    layer(0, feeds="2")(header, fields, data)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3))
    message = "layer '0': feeds must be the layer that alone takes its output in the model's forward; got '2'"
    refused(tmp_path, build(header, fields, data), message, model)

    class Both(nn.Sequential):
        def forward(self, x):
            x = self[:4](x)
            return self[4:](x).mean() + x

    refused(tmp_path, good, message.replace("'0'", "'3'").replace("'2'", "'6'"), Both(*define()))


NAN = struct.pack("<f", float("nan"))
HOSTILE = {
    "input": (layer(0, input="magic"), r"layers\[0\].input must be one of sign, unit; got 'magic'"),
    "input of steps": (layer(0, input=...), r"layers\[0\].input must be there: thresholds are of one bit"),
    "bits of input": (layer(0, activation_bits=2), r"layers\[0\].activation_bits must be 1 for input 'sign'; got 2"),
    "no bits of input": (layer(0, activation_bits=...), r"layers\[0\].activation_bits must be 1 for input 'sign'; got None"),
    "removed nothing": (layer(0, removed=[]), r"layers\[0\].removed must be a list of 1 to 3 strings; got \[\]"),
    "removed numbers": (layer(0, removed=[1]), r"layers\[0\].removed must be a list of 1 to 3 strings"),
    "removed without bytes": (layer(0, removed_bytes=...), r"layers\[0\] must have removed and removed_bytes, or neither"),
    "removed bytes": (layer(0, removed_bytes=-1), r"layers\[0\].removed_bytes must be an integer"),
    "removed another norm": (layer(0, removed=["5"]), "layers: '5' must be removed with the same modules everywhere"),
    "removed a layer": (layer(0, removed=["0"]), r"layer '0': expected Conv2d\(\), as in the model; found what stands before the sign"),
    "removed nobody": (layer(0, removed=["1", "2", "nobody"]), "layer 'nobody': expected what stands before a sign in the model"),
    "removed too little": (layer(0, removed=["2"]), "layer '1': expected tensor '1."),
    "norm kept": (layer(0, removed=..., removed_bytes=...), "layer '1': expected tensor '1."),
    "feeds nobody": (layer(0, feeds="nobody"), "layer '3': feeds must be a Conv2d with an input of 12 signs; got 'nobody'"),
    "feeds itself": (layer(0, feeds="3"), "layer '3': feeds must be a Conv2d"),
    "feeds backwards": (layer(1, feeds="3"), "layer '6': feeds must be a Conv2d with an input of 4 signs; got '3'"),
    "feeds numbers": (layer(0, feeds=3), r"layers\[0\].feeds must be a string"),
    "threshold": (write("3.threshold", NAN, 4), "layer '3': threshold must not be NaN"),
    "flip": (write("3.flip", b"\2", 1), "layer '3': flip must be 0 or 1; got 2"),
    "flip of others": (tensor("3.flip", shape=[2, 4]), r"layer '3': expected tensor '3.flip', uint8 \[8\]; found uint8 \[2, 4\]"),
    "threshold of integers": (tensor("3.threshold", dtype="I32"), r"expected tensor '3.threshold', float32 \[8\]; found int32 \[8\]"),
    "storage": (layer(0, storage=2), r"layers\[0\].storage must be 1 for 1 bits; got 2"),
    "bits of weights": (layer(0, method="uniform", bits=8, storage=8), r"layers\[0\].bits must be 1 for input 'sign'; got 8"),
    "bits": (layer(0, bits=2), r"layers\[0\].bits must be 1 to 1 for xnor; got 2"),
    "groups": (layer(0, groups=HUGE), "layer '1': expected .* found what stands before the sign of 8796093022208 channels"),
    "padding": (write("3.codes", b"\1", 15), "layer '3': codes: the padding after a row's 72 codes must be zero bits"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(case, good, tmp_path):
    change, message = HOSTILE[case]
    header, fields, data = split(good)
    data = bytearray(data)
    change(header, fields, data)
    refused(tmp_path, build(header, fields, bytes(data)), message, define())


def test_another_architecture(good, tmp_path):
    for model, message in [
        (nn.Sequential(*define()[:1], nn.BatchNorm2d(9), *define()[2:]), r"layer '1': expected BatchNorm2d\(9\), as in the model"),
        (nn.Sequential(*define()[:1], nn.Sigmoid(), *define()[2:]), r"layer '1': expected Sigmoid\(\), as in the model"),
        (define()[:6], "layer '6': expected no such layer"),
    ]:
        refused(tmp_path, good, message, model)
