"""Sensitivities as files: what is saved is loaded, and everything else is refused by name."""

import json
import os
import random
import struct

import pytest
import torch
from sensitivity_models import Residual, images, trained
from small_sensitivity import CHOICES, sensitivity
from torch import nn

import quantize
from quantize import XNOR, DiffQ, DoReFa, PowerOfTwo, Sensitivity, Ternary, Uniform
from quantize.mixed_precision import file

CONFIGS = [
    Uniform(3, 5, "max"), Uniform(2, None, "learned"), PowerOfTwo(5, False, 8, "max"), Ternary(4), XNOR(None, 0.9, "polynomial", True),
    XNOR(), DoReFa(1, 16, 6, False), DiffQ(16, 3, 9, 4.5, "group", "gaussian", 8), DiffQ(activation_bits="learned"), None,
]  # fmt: skip
FIELDS = ("layers", "choices", "configs", "members", "shapes", "method", "metric", "samples", "other_bytes", "link")


def every_config():
    choices = [(i + 1, None if i % 2 else i + 1) for i in range(len(CONFIGS) - 1)] + [(None, None)]
    return sensitivity(
        torch.randn(20, 20, dtype=torch.float64), choices=choices, configs=CONFIGS, members={"fc": ("a b", "é\n\"[*]")},
        shapes={"conv": {"weight": (2, 3)}, "a b": {"in_proj_weight": (4,)}, "é\n\"[*]": {"w": (1, 1)}},
        method="clado", metric="kl", samples=5, other_bytes=2**40, link="log1p",
    )  # fmt: skip


def same_fields(a, b):
    for name in FIELDS:
        assert getattr(a, name) == getattr(b, name), name
    for name in ("matrix", "bytes", "bit_ops"):
        assert torch.equal(getattr(a, name), getattr(b, name)) and getattr(a, name).dtype == getattr(b, name).dtype


def test_round_trip(tmp_path):
    s, path = every_config(), tmp_path / "s.safetensors"
    s.save(path)
    loaded = Sensitivity.load(path)
    same_fields(loaded, s)
    loaded.save(str(tmp_path / "again"))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again", "s.safetensors"]


def test_measured_round_trip(tmp_path):
    s = quantize.measure_sensitivity(trained(Residual()), images(3), CHOICES, groups={"g": "conv*"}, progress=False)
    s.save(tmp_path / "s")
    loaded = Sensitivity.load(tmp_path / "s")
    assert torch.equal(loaded.matrix, s.matrix) and all(getattr(loaded, name) == getattr(s, name) for name in FIELDS)
    loaded.check_model(Residual())


def test_the_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "s"
    sensitivity().save(path)
    before = path.read_bytes()
    monkeypatch.setattr(file.os, "replace", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        every_config().save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["s"]


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must be a file; there is none at .*missing"):
        Sensitivity.load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="path must be a file"):
        Sensitivity.load(tmp_path)


def split(data):
    """(header as JSON, its fields but the checksum, tensors' bytes)."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    fields = json.loads(header["__metadata__"]["quantize"])
    del fields["crc32"]
    return header, fields, data[8 + length :]


def build(header, fields, data):
    """With the right checksum, so that what is behind it is tried."""
    if not isinstance(fields, str):
        tensors = {
            name: torch.frombuffer(bytearray(data[slice(*entry["data_offsets"])]), dtype=torch.uint8)
            for name, entry in header.items()
            if name != "__metadata__"
        }
        fields = json.dumps({**fields, "crc32": file.checksum(tensors, fields)})
    text = fields
    header = json.dumps({**header, "__metadata__": {"quantize": text}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def refused(tmp_path, data, message="damaged|must"):
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        Sensitivity.load(path)
    assert str(error.value).startswith(f"Sensitivity.load: {path} ") and len(str(error.value)) < 1000


@pytest.fixture
def good(tmp_path):
    every_config().save(tmp_path / "good")
    return (tmp_path / "good").read_bytes()


def test_truncated_and_foreign(good, tmp_path):
    for length in (*range(0, 40), len(good) // 2, len(good) - 1):
        refused(tmp_path, good[:length], "damaged or no safetensors file")
    refused(tmp_path, good + b"more", "damaged or no safetensors file")
    refused(tmp_path, b"PK\3\4" + bytes(200), "damaged or no safetensors file")
    quantize.save(quantize.convert(quantize.prepare(nn.Linear(4, 4), Uniform(4))), tmp_path / "model")
    refused(tmp_path, (tmp_path / "model").read_bytes(), "must be of format 'quantize.sensitivity/1'")
    file.write({"single": torch.zeros(2)}, {"format": "quantize.sensitivity_checkpoint/1"}, tmp_path / "checkpoint")
    refused(tmp_path, (tmp_path / "checkpoint").read_bytes(), "found 'quantize.sensitivity_checkpoint/1'")
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / "plain")
    refused(tmp_path, (tmp_path / "plain").read_bytes(), "found 'no such header'")


def test_hostile_headers(good, tmp_path):
    header, fields, data = split(good)
    for text in ("", "{", "[]", "null", "3", '{"format": 3}', "[" * 100_000, '{"format": [' * 5000, "\ud800", "{}"):
        refused(tmp_path, build(header, text, data))
    for name in FIELDS:
        refused(tmp_path, build(header, {k: v for k, v in fields.items() if k != name}, data), f"must have the field '{name}'")
    hostile = (
        None, 3, -1, 1.5, True, "x", [], {}, [3], ["x"], [[]], [None], {"x": 3}, {"fc": 3}, {"fc": [3]}, {"conv": {"weight": -3}},
        {"fc": [[]]}, [[1, 2], [1, 2]], float("nan"), 10**400, "x" * 5000, [["x"] * 2] * 2,
    )  # fmt: skip
    fine = {"members": ({}, None), "shapes": ({}, None), "method": ("x",), "metric": ("x",), "samples": (3,), "other_bytes": (3,)}
    for name in FIELDS:
        for value in hostile:
            if not any(type(value) is type(ok) and (value == ok or isinstance(value, str)) for ok in fine.get(name, ())):
                refused(tmp_path, build(header, {**fields, name: value}, data))
    for entry in (
        {"class": "Uniform", "weight_bits": 99}, {"class": "Uniform", "bits": 4}, {"class": "eval"}, {"class": []},
        {"class": "DiffQ", "range": 3}, {"class": "__import__", "name": "os"}, {}, "Uniform", {"weight_bits": 4},
        {"class": "Uniform", "weight_bits": {}},
    ):  # fmt: skip
        refused(tmp_path, build(header, {**fields, "configs": [entry, *fields["configs"][1:]]}, data))


def test_hostile_tensors(good, tmp_path):
    _, fields, _ = split(good)
    matrix, table = torch.zeros(20, 20, dtype=torch.float64), torch.zeros(2, 10, dtype=torch.long)
    tensors = {"matrix": matrix, "bytes": table, "bit_ops": table.clone()}
    path = tmp_path / "built"

    def bad(message, **changed):
        held = {name: tensor for name, tensor in {**tensors, **changed}.items() if tensor is not None}
        file.write(held, fields, path)
        refused(tmp_path, path.read_bytes(), message)

    bad("must hold tensors matrix, bytes, bit_ops; found bit_ops, bytes, extra, matrix", extra=torch.zeros(1))
    bad("must hold tensors", bytes=None)
    bad(r"matrix must be \[20, 20\]", matrix=torch.zeros(20, 21))
    bad(r"matrix must be \[20, 20\]", matrix=torch.zeros(400))
    bad("matrix must be finite; got nan for 'conv' at w1a1", matrix=matrix.clone().fill_(torch.nan))
    bad("bytes must be finite and at least 0", bytes=table - 1)
    bad(r"bit_ops must be \[2, 10\]", bit_ops=torch.zeros(0, 10))
    bad("bytes must be of real numbers", bytes=table.bool())
    bad("bytes must be finite and at least 0; got nan", bytes=torch.full((2, 10), torch.nan).to(torch.float8_e4m3fn))
    bad("bytes must be finite and at least 0", bytes=torch.full((2, 10), 2**63, dtype=torch.uint64))


def test_flipped_bytes(good, tmp_path):
    """Whatever a changed byte does, what was saved is loaded or the file is refused."""
    chance, header, path, refusals = random.Random(0), 8 + struct.unpack("<Q", good[:8])[0], tmp_path / "flipped", 0
    for start, end in [(0, header)] * 300 + [(header, len(good))] * 100:
        data = bytearray(good)
        data[chance.randrange(start, end)] ^= chance.randrange(1, 256)
        path.write_bytes(data)
        try:
            same_fields(Sensitivity.load(path), Sensitivity.load(tmp_path / "good"))
        except ValueError as error:
            refusals += str(path) in str(error)
    assert refusals > 390  # of 400: a changed space or the case of an escape changes nothing
