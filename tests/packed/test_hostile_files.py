"""Damaged and hostile files: always a ValueError that names the file, never a crash, an allocation by claims, or a changed model."""

import contextlib
import json
import struct
import time
import tracemalloc
import zlib

import pytest
import torch
from packed_models import packed_of
from torch import nn

from quantize.packed.file import load, save
from quantize.packed.header import layers_checksum, metadata_text
from quantize.packed.inspect_file import inspect_file
from quantize.weight.config import Uniform


def define():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 2), nn.BatchNorm2d(4))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a small file: a convolution with its batch norm, a linear layer with activation bits, a norm that stays."""
    torch.manual_seed(0)
    model = define()
    model.forward = lambda x: model[2](model[3](model[1](model[0](x)))[..., :5])
    _, packed = packed_of(model, {"0": Uniform(4), "2": Uniform(3, activation_bits=8)}, torch.randn(2, 3, 7, 7))
    path = tmp_path_factory.mktemp("good") / "f"
    save(packed, path)
    load(define(), path)
    return path.read_bytes()


def split(data):
    """(header as JSON, layers, tensors' bytes)."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["quantize"]), data[8 + length :]


def tensor_checksum(header, data):
    checksum = 0
    for name in sorted(name for name in header if name != "__metadata__"):
        start, end = header[name]["data_offsets"]
        checksum = zlib.crc32(data[start:end], checksum)
    return checksum


def build(header, fields, data):
    """A file whose checksum is right, so that the other checks have to find what is wrong."""
    with contextlib.suppress(KeyError, TypeError, ValueError):  # a header too broken for a checksum
        checksum = layers_checksum(fields["layers"], tensor_checksum(header, data))
        fields = {**fields, "checksum": checksum if fields["checksum"] != -1 else -1}
    header = {**header, "__metadata__": {"quantize": json.dumps(fields)}} if "__metadata__" in header else header
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refused(tmp_path, data, match="load: ", model=None):
    """load() refuses it by ValueError, leaving the model as it is, and allocates little."""
    path = tmp_path / "bad"
    path.write_bytes(data)
    model = define() if model is None else model
    before, shown = {k: v.clone() for k, v in model.state_dict().items()}, str(model)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match) as error:
            load(model, path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value) and len(str(error.value)) < 1000
    assert str(model) == shown and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    try:
        inspect_file(path)  # may think well of it, since it does not know the model, but never fails otherwise
    except ValueError as bad:
        assert str(path) in str(bad)


def test_truncated_anywhere(good, tmp_path):
    header = 8 + struct.unpack("<Q", good[:8])[0]
    offsets = {*range(0, 40), *range(40, header, 37), *range(header, len(good), 5), len(good) - 1}
    for offset in sorted(offsets):
        refused(tmp_path, good[:offset])
    refused(tmp_path, good + b"\0", "tensors must fill the file")
    refused(tmp_path, b"", "the file has 0 bytes")


def test_every_byte_of_the_header_flipped(good, tmp_path):
    header = 8 + struct.unpack("<Q", good[:8])[0]
    model, path = define(), tmp_path / "bad"
    shown = str(model)
    for offset in range(header):
        for flip in (0x01, 0x20, 0xFF) if offset % 7 == 0 else (0x01,):
            data = bytearray(good)
            data[offset] ^= flip
            path.write_bytes(data)
            with pytest.raises(ValueError, match="load: "):
                load(model, path)
    assert str(model) == shown


def test_every_byte_of_the_tensors_flipped(good, tmp_path):
    header = 8 + struct.unpack("<Q", good[:8])[0]
    model, path = define(), tmp_path / "bad"
    for offset in range(header, len(good)):
        data = bytearray(good)
        data[offset] ^= 0x10
        path.write_bytes(data)
        with pytest.raises(ValueError, match="the file is damaged"):
            load(model, path)


def edit(**changes):
    def apply(header, fields, data):
        for key, value in changes.items():
            fields[key] = value

    return apply


def layer(index, **changes):
    def apply(header, fields, data):
        for key, value in changes.items():
            if value is ...:
                fields["layers"][index].pop(key)
            else:
                fields["layers"][index][key] = value

    return apply


def tensor(name, **changes):
    def apply(header, fields, data):
        header[name].update(changes)

    return apply


def write(name, value, at=0):
    """Other bytes in a tensor."""

    def apply(header, fields, data):
        start = header[name]["data_offsets"][0] + at
        data[start : start + len(value)] = value

    return apply


def rename(old, new):
    def apply(header, fields, data):
        header[new] = header.pop(old)

    return apply


def extra(header, fields, data):
    header["zz"] = {"dtype": "U8", "shape": [4], "data_offsets": [len(data), len(data) + 4]}
    data += b"abcd"


def twice(header, fields, data):
    fields["layers"].append(fields["layers"][0])


def overlap(header, fields, data):
    header["zz"] = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def hole(header, fields, data):
    data += b"abcd"
    header["zz"] = {"dtype": "U8", "shape": [2], "data_offsets": [len(data) - 2, len(data)]}


HUGE = 2**40
HOSTILE = {
    "format": (edit(format="other"), "format must be 'quantize'; got 'other'"),
    "version 2": (edit(version=2), "version must be 1; got 2, of a newer quantize"),
    "version 0": (edit(version=0), "version must be 1; got 0"),
    "version true": (edit(version=True), "version must be 1; got True"),
    "version text": (edit(version="1"), "version must be 1; got '1'"),
    "layers": (edit(layers={}), "layers must be a list"),
    "layer": (edit(layers=[3]), r"layers\[0\] must be an object; got 3"),
    "no layers": (edit(layers=[]), "layer '0': expected tensor '0.bias'|'0.weight'"),
    "unknown": (edit(more=1), "quantize must have format, version, checksum and layers"),
    "checksum": (edit(checksum=-1), "checksum must be a 32-bit number"),
    "field missing": (layer(0, bits=...), r"layers\[0\].bits must be there"),
    "field unknown": (layer(1, other=1), r"layers\[1\] must have fields that version 1 has; got \['other'\]"),
    "name": (layer(0, name=3), r"layers\[0\].name must be a string; got 3"),
    "no such name": (layer(0, name="__class__"), "'__class__'|layer '0'"),
    "kind": (layer(0, kind="Linear"), "layer '0': expected kind Conv2d"),
    "method": (
        layer(0, method="magic"),
        r"layers\[0\].method must be one of uniform, ternary, xnor, dorefa, power_of_two, diffq; got 'magic'",
    ),
    "bits 9": (layer(0, bits=9), r"layers\[0\].bits must be 2 to 8 for uniform; got 9"),
    "bits 17": (layer(0, bits=17), r"layers\[0\].bits must be an integer from 1 to 16; got 17"),
    "bits 1": (layer(0, bits=1), r"layers\[0\].bits must be 2 to 8 for uniform; got 1"),
    "bits true": (layer(0, bits=True), r"layers\[0\].bits must be"),
    "bits 4.0": (layer(0, bits=4.0), "numbers must be whole; got '4.0'"),
    "bits 8": (layer(0, bits=8), r"layers\[0\].storage must be 8 for 8 bits; got 4"),
    "bits and storage": (layer(0, bits=8, storage=8), r"expected tensor '0.codes', uint8 \[4, 32\]; found uint8 \[4, 16\]"),
    "storage": (layer(0, storage=3), r"layers\[0\].storage must be 1, 2, 4, 8 or 16; got 3"),
    "shape": (layer(0, shape=[4, 3, 3]), r"layer '0': expected weight of shape \[4, 3, 3, 3\]"),
    "shape huge": (layer(0, shape=[HUGE, HUGE, HUGE]), "layer '0': expected weight of shape"),
    "shape of more": (layer(0, shape=[2**300, 1]), r"layers\[0\].shape must be a list of 2 to 5 positive integers"),
    "shape negative": (layer(0, shape=[-4, 3, 3, 3]), r"layers\[0\].shape must be"),
    "shape zero": (layer(0, shape=[0, 3, 3, 3]), r"layers\[0\].shape must be"),
    "shape text": (layer(0, shape="4333"), r"layers\[0\].shape must be"),
    "shape long": (layer(0, shape=[1] * 100000), r"layers\[0\].shape must be"),
    "stride": (layer(0, stride=[2, 2]), r"layer '0': expected stride 1, as in the model; found \[2, 2\]"),
    "padding": (layer(0, padding="same"), "layer '0': expected padding 0, as in the model; found 'same'"),
    "groups": (layer(0, groups=0), r"layers\[0\].groups must be a positive integer; got 0"),
    "padding mode": (layer(0, padding_mode="zeros"), r"layers\[0\].padding_mode must be a padding mode"),
    "bias": (layer(0, bias=False), "layer '0': expected bias True, as in the model; found False"),
    "bias null": (layer(0, bias=None), r"layers\[0\].bias must be false, or not there; got None"),
    "activation bits": (layer(1, activation_bits=17), r"layers\[1\].activation_bits must be an integer from 1 to 16; got 17"),
    "fewer activation bits": (layer(1, activation_bits=2), "zero_point must be a whole number from 0 to 3"),
    "no activation bits": (layer(1, activation_bits=...), "tensor '2.step': expected no such tensor"),
    "norm": (layer(0, batch_norm="2"), "layer '1': expected tensor|layer '2': expected"),
    "norm of itself": (layer(0, batch_norm="0"), "layer"),
    "norm without bytes": (layer(0, batch_norm_bytes=...), r"layers\[0\] must have batch_norm and batch_norm_bytes, or neither"),
    "norm twice": (layer(1, batch_norm="1", batch_norm_bytes=1), "a batch_norm must be folded into one layer only"),
    "another norm too": (layer(1, batch_norm="3", batch_norm_bytes=1), "layer '2'|layer '3': expected"),
    "decoded": (layer(0, decoded="weight"), "layer '0': expected a weight that is packed, as in the model; found 'decoded'"),
    "decoded bias": (layer(0, decoded="bias"), "layer '0': expected bias of shape"),
    "decoded magic": (layer(0, decoded="__dict__"), "layer '0': expected a parameter '__dict__' in the model; Conv2d has none"),
    "tied to nothing": (layer(0, tied={"codes": "nowhere"}), "layer '0': expected tensor 'nowhere'"),
    "tied to another": (layer(0, tied={"codes": "2.codes"}), "layer '0': expected tensor '2.codes'"),
    "tied in vain": (layer(0, tied={"other": "2.codes"}), "layer '0': tied must name tensors of the layer; got"),
    "tied to numbers": (layer(0, tied={"codes": 3}), r"layers\[0\].tied must be an object of strings"),
    "layer twice": (twice, r"layers\[2\].name must be another than those before; got '0' again"),
    "layer gone": (lambda h, f, d: f["layers"].pop(0), "layer '0': expected tensor '0.weight'|layer '0': expected tensor '0.bias'"),
    "tensor renamed": (rename("0.codes", "0.other"), r"layer '0': expected tensor '0.codes', uint8 \[4, 16\]; found none"),
    "tensor gone": (lambda h, f, d: h.pop("0.scales"), "data_offsets must begin where the tensor before ends|tensors must fill"),
    "tensor more": (extra, r"tensor 'zz': expected no such tensor, as in the model; found uint8 \[4\]"),
    "tensors overlap": (overlap, "data_offsets must begin where the tensor before ends"),
    "hole": (hole, "data_offsets must begin where the tensor before ends"),
    "dtype": (tensor("0.codes", dtype="I8"), r"expected tensor '0.codes', uint8 \[4, 16\]; found int8 \[4, 16\]"),
    "dtype and size": (tensor("0.scales", dtype="F64"), "data_offsets must span shape"),
    "dtype and shape": (tensor("0.scales", dtype="F16", shape=[8]), r"expected tensor '0.scales', float32 \[4\]; found float16 \[8\]"),
    "dtype unknown": (tensor("0.codes", dtype="F4"), "tensor '0.codes': dtype must be one of F64"),
    "dtype number": (tensor("0.codes", dtype=8), "dtype must be one of"),
    "tensor shape": (tensor("0.codes", shape=[16, 4]), r"expected tensor '0.codes', uint8 \[4, 16\]; found uint8 \[16, 4\]"),
    "tensor shape huge": (tensor("0.codes", shape=[HUGE, HUGE]), "tensor '0.codes': data_offsets must span shape"),
    "tensor shape null": (tensor("3.num_batches_tracked", shape=None), "shape must be a list of sizes"),
    "tensor fields": (tensor("0.codes", more=1), "tensor '0.codes' must have dtype, shape and data_offsets"),
    "offsets negative": (tensor("0.codes", data_offsets=[-64, 0]), "data_offsets must be two numbers from 0 to"),
    "offsets beyond": (tensor("0.codes", data_offsets=[0, HUGE]), "data_offsets must be two numbers from 0 to"),
    "offsets backward": (tensor("0.codes", data_offsets=[64, 0]), "data_offsets must span|must be two"),
    "offsets true": (tensor("0.codes", data_offsets=[False, True]), "data_offsets must be two numbers"),
    "tensor null": (lambda h, f, d: h.update({"0.codes": None}), "tensor '0.codes' must have dtype, shape and data_offsets; got None"),
    "code": (write("0.codes", b"\x88"), r"layer '0': codes: 8 at \[0, 0\] is no code of uniform at 4 bits"),
    "code beyond bits": (write("2.codes", b"\x07"), r"layer '2': codes: 7 at \[0, 0\] is no code of uniform at 3 bits"),
    "padding of rows": (write("0.codes", b"\x10", 15), "layer '0': codes: the padding after a row's 27 codes must be zero bits"),
    "scale": (write("0.scales", struct.pack("<f", float("nan")), 4), r"layer '0': scales must be finite; got nan at \[1\]"),
    "step": (write("2.step", struct.pack("<f", -1.0)), "layer '2': step must be positive; got -1.0"),
    "step nan": (write("2.step", struct.pack("<f", float("nan"))), "layer '2': step must be positive; got nan"),
    "zero point": (write("2.zero_point", struct.pack("<f", 1.5)), "layer '2': zero_point must be a whole number from 0 to 255; got 1.5"),
    "zero point nan": (write("2.zero_point", struct.pack("<f", float("nan"))), "layer '2': zero_point must be a whole number"),
    "metadata more": (lambda h, f, d: h.update(__metadata__=None), "__metadata__ must have the one key"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(case, good, tmp_path):
    change, message = HOSTILE[case]
    header, fields, data = split(good)
    data = bytearray(data)
    change(header, fields, data)
    if header.get("__metadata__") is None:
        text = json.dumps(header)
        refused(tmp_path, struct.pack("<Q", len(text)) + text.encode() + bytes(data), message)
    else:
        refused(tmp_path, build(header, fields, bytes(data)), message)


def raw(text, data=b""):
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text)) + text + data


FOREIGN = {
    "length huge": (struct.pack("<Q", 2**63) + b"{}" * 8, "header's length must be 2 to 16"),
    "length beyond": (struct.pack("<Q", 17) + b"{}" * 8, "header's length must be 2 to 16"),
    "length zero": (struct.pack("<Q", 0) + b"{}" * 8, "header's length"),
    "pickle": (b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01u.", "header's length"),
    "zip": (b"PK\x03\x04" + b"\0" * 60, "header's length"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "header must be UTF-8"),
    "not JSON": (raw("{nonsense}"), "header must be JSON"),
    "a list": (raw("[1, 2]"), "header must be a JSON object"),
    "empty": (raw("{}"), "__metadata__ must have the one key"),
    "deep": (raw("[" * 100000), "header must be JSON"),
    "deep objects": (raw('{"a":' * 100000), "header must be JSON"),
    "numbers": (raw('{"a": 1' + "0" * 10000 + "}"), "header must be JSON"),
    "not a number": (raw('{"a": NaN}'), "numbers must be whole; got 'NaN'"),
    "twice": (raw('{"a": 1, "a": 2}'), "'a' must appear once"),
    "metadata of others": (raw('{"__metadata__": {"format": "pt"}}'), "__metadata__ must have the one key"),
    "metadata more": (raw('{"__metadata__": {"quantize": "{}", "x": "y"}}'), "__metadata__ must have the one key"),
    "metadata number": (raw('{"__metadata__": {"quantize": 3}}'), "__metadata__ must have the one key"),
    "metadata text": (raw('{"__metadata__": {"quantize": "{"}}'), "quantize must be JSON"),
    "metadata empty": (raw('{"__metadata__": {"quantize": "{}"}}'), "format must be 'quantize'; got None"),
    "metadata twice": (raw(json.dumps({"__metadata__": {"quantize": '{"format":1,"format":1}'}})), "'format' must appear once"),
    "surrogates": (raw('{"\\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"a"), "__metadata__"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign(case, tmp_path):
    data, message = FOREIGN[case]
    refused(tmp_path, data, message)


def test_many_names(tmp_path):
    names = ",".join(f'"{i}":0' for i in range(40_000))
    start = time.perf_counter()
    (tmp_path / "f").write_bytes(raw(f'{{{names},"x":0,"x":0}}'))
    with pytest.raises(ValueError, match="'x' must appear once in its object"):
        inspect_file(tmp_path / "f")
    assert time.perf_counter() - start < 5  # a search for each name would take minutes


def test_huge_claim_of_zero_elements(good, tmp_path):
    header, fields, data = split(good)
    header["zz"] = {"dtype": "F32", "shape": [2**47, 2**47, 0], "data_offsets": [0, 0]}
    refused(tmp_path, build(header, fields, data), "tensor 'zz': expected no such tensor")


def test_values_of_booleans(tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(4, 2))
        model.register_buffer("mask", torch.tensor([True, False]))
        return model

    _, packed = packed_of(make(), Uniform(4))
    save(packed, tmp_path / "f")
    header, fields, data = split((tmp_path / "f").read_bytes())
    data = bytearray(data)
    data[header["mask"]["data_offsets"][0]] = 7
    refused(tmp_path, build(header, fields, bytes(data)), "tensor 'mask': BOOL must be 0 or 1", make())


def test_the_writer_and_the_reader_agree_on_the_checksum(good):
    header, fields, data = split(good)
    assert fields["checksum"] == layers_checksum(fields["layers"], tensor_checksum(header, data))
    assert metadata_text(fields["layers"], fields["checksum"]) == header["__metadata__"]["quantize"]
