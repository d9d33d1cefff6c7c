"""The Sensitivity class: its tables, predictions, files, and the nearest positive semidefinite matrix."""

import json
import os
import random
import struct

import pytest
import torch
from sensitivity_models import Residual, images, trained
from torch import nn

import quantize
from quantize import XNOR, DiffQ, DoReFa, PowerOfTwo, Sensitivity, Ternary, Uniform
from quantize.mixed_precision import file
from quantize.mixed_precision.projection import nearest_positive

LAYERS, CHOICES = ("conv", "fc"), [(2, None), (4, 8), (None, None)]


def sensitivity(matrix=None, layers=LAYERS, choices=CHOICES, **more):
    size = len(layers) * len(choices)
    matrix = torch.arange(size * size).view(size, size).double() if matrix is None else matrix
    table = torch.arange(size).view(len(layers), len(choices))
    return Sensitivity(layers, choices, matrix, 10 * table, 100 * table, **more)


def test_tables():
    s = sensitivity()
    assert s.layers == LAYERS and s.choices == tuple(CHOICES) and s.configs == (Uniform(2), Uniform(4, 8), None)
    assert s.members == {"conv": ("conv",), "fc": ("fc",)} and s.shapes == {} and s.parameters is None
    assert s.matrix.dtype == torch.float64 and torch.equal(s.matrix, s.matrix.T) and s.matrix[0, 1] == 3.5  # of 1 and 6
    assert s.values.tolist() == [[0, 7, 14], [21, 28, 35]]
    assert s.bytes.tolist() == [[0, 10, 20], [30, 40, 50]] and s.bit_ops.dtype == torch.long
    assert (s.method, s.metric, s.samples, s.other_bytes) == ("", "", 0, 0)
    given = torch.ones(6, 6, requires_grad=True, dtype=torch.float32)
    assert not sensitivity(given).matrix.requires_grad
    assert sensitivity(given.tolist()).matrix.dtype == torch.float64


def test_predict_is_the_quadratic_form():
    s = sensitivity(torch.randn(6, 6))
    for first, a in enumerate(CHOICES):
        for second, b in enumerate(CHOICES):
            chosen = {"fc": b, "conv": a}
            x = torch.zeros(6, dtype=torch.float64)
            x[first] = x[3 + second] = 1
            assert torch.equal(s.one_hot(chosen), x)
            i, j, m = first, 3 + second, s.matrix
            assert s.predict(chosen) == pytest.approx(float(m[i, i] + m[j, j] + 2 * m[i, j]), rel=1e-14)
    assert s.predict({"conv": [4, 8], "fc": [2, None]}) == s.predict({"conv": (4, 8), "fc": (2, None)})


def test_without_cross_terms():
    full = sensitivity(
        torch.randn(6, 6),
        method="clado",
        metric="kl",
        samples=3,
        other_bytes=7,
        link="log1p",
        shapes={"conv": {}, "fc": {"weight": (2, 3)}},
    )
    s = full.without_cross_terms()
    assert torch.equal(s.matrix, torch.diag(full.matrix.diagonal()))
    for name in ("layers", "choices", "configs", "members", "shapes", "method", "metric", "samples", "other_bytes", "link"):
        assert getattr(s, name) == getattr(full, name)
    assert torch.equal(s.bytes, full.bytes) and torch.equal(s.bit_ops, full.bit_ops)


def test_shapes_and_text():
    s = sensitivity(
        shapes={"a": {"weight": (2, 3)}, "b": {"in": (4,), "out": [2, 2]}, "fc": {"weight": [7]}}, members={"conv": ["a", "b"]},
        method="clado", metric="kl", samples=12,
    )  # fmt: skip
    assert s.parameters.tolist() == [14, 7] and s.parameters.dtype == torch.long and s.members["conv"] == ("a", "b")
    text = str(s)
    assert all(word in text for word in ("conv", "fc", "w2", "w4a8", "float", "28", "2 layers, 3 choices; clado; kl; 12 samples"))
    assert repr(s) == "Sensitivity(2 layers, 3 choices; clado; kl; 12 samples)"


NAN = torch.zeros(6, 6)
NAN[4, 1] = torch.nan
WRONG = {  # arguments, the type of the error, a part of its message
    "layers is a string": ({"layers": "conv"}, TypeError, "layers must be names"),
    "layers hold numbers": ({"layers": ["conv", 1]}, TypeError, "layers must be names"),
    "layers is a number": ({"layers": 3}, TypeError, "layers must be names"),
    "no layers": ({"layers": []}, ValueError, "layers must be at least one"),
    "layers twice": ({"layers": ["a", "b", "a"]}, ValueError, "layers must be different names; got 'a' twice"),
    "no choices": ({"choices": []}, ValueError, "choices must be pairs .* at least one"),
    "choices is a string": ({"choices": "48"}, TypeError, "choices must be pairs"),
    "choices are numbers": ({"choices": [2, 4]}, TypeError, "choices must be pairs"),
    "choices are triples": ({"choices": [(2, 4, 8)]}, TypeError, "choices must be pairs"),
    "choices are floats": ({"choices": [(2.0, 4)]}, TypeError, r"choices must be pairs .* got \(2.0, 4\)"),
    "choices are booleans": ({"choices": [(True, 4)]}, TypeError, "choices must be pairs"),
    "choices below 1": ({"choices": [(0, 4)]}, ValueError, "choices must be pairs .* of at least 1"),
    "choices twice": ({"choices": [(2, 4), (3, 4), (2, 4)]}, ValueError, r"choices must differ; got \(2, 4\) twice"),
    "activation bits alone": ({"choices": [(2, 8), (4, 8), (None, 4)]}, ValueError, r"choices without weight_bits must be \(None, None\)"),
    "nine bits": ({"choices": [(2, 8), (4, 8), (9, None)]}, ValueError, "weight_bits must be an integer from 2 to 8"),
    "matrix too small": ({"matrix": torch.zeros(5, 6)}, ValueError, r"matrix must be \[6, 6\] for 2 layers and 3 choices; got \[5, 6\]"),
    "matrix complex": ({"matrix": torch.zeros(6, 6).cfloat()}, TypeError, "matrix must be of real numbers"),
    "matrix of booleans": ({"matrix": torch.zeros(6, 6).bool()}, TypeError, "matrix must be of real numbers"),
    "matrix is text": ({"matrix": "zero"}, TypeError, "matrix must be of real numbers"),
    "NaN in the matrix": ({"matrix": NAN}, ValueError, "matrix must be finite; got nan for 'fc' at w4a8 with 'conv' at w4a8"),
    "infinite matrix": ({"matrix": torch.diag(torch.tensor([0, 0, torch.inf, 0, 0, 0]))}, ValueError, "matrix .* inf for 'conv' at float$"),
    "bytes of one layer": ({"bytes": torch.zeros(3)}, ValueError, r"bytes must be \[2, 3\]"),
    "bytes negative": ({"bytes": torch.tensor([[1, 1, 1], [1, 1, -1]])}, ValueError, "bytes must be .* at least 0; got -1 for 'fc' at f"),
    "bit_ops NaN": ({"bit_ops": torch.full((2, 3), torch.nan)}, ValueError, "bit_ops must be .* at least 0; got nan for 'conv' at w2"),
    "too few configs": ({"configs": [None]}, ValueError, "configs must be 3, one for each choice; got 1"),
    "configs are names": ({"configs": ["Uniform"] * 3}, TypeError, "configs must be configurations .* or None; got 'Uniform'"),
    "configs is a number": ({"configs": 3}, TypeError, "configs must be"),
    "members of others": ({"members": {"conv": ["a"], "bn": ["b"]}}, ValueError, "members must be of the layers; got 'bn'"),
    "members is a list": ({"members": ["conv"]}, TypeError, "members must be a mapping"),
    "members are a string": ({"members": {"conv": "abc"}}, TypeError, "members must be a mapping .* to names; got 'abc' for 'conv'"),
    "members are numbers": ({"members": {"conv": [1]}}, TypeError, "members must be a mapping"),
    "members of two": ({"members": {"conv": ["a"], "fc": ["b", "a"]}}, ValueError, "members must be in one layer each; got 'a' twice"),
    "no members": ({"members": {"conv": []}}, ValueError, "members must be at least one for each layer; got none for 'conv'"),
    "shapes is a list": ({"shapes": [3]}, TypeError, "shapes must be a mapping"),
    "shapes are lists": ({"shapes": {"conv": [3]}}, TypeError, "shapes must be a mapping"),
    "shapes are numbers": ({"shapes": {"conv": {"weight": 3}}}, TypeError, "shapes must be a mapping"),
    "shapes hold text": ({"shapes": {"conv": {"weight": ["3"]}}}, TypeError, "shapes must be a mapping"),
    "shapes lack a member": ({"shapes": {"conv": {"weight": [3]}}}, ValueError, "shapes must have all members; 'fc' is missing"),
    "samples is text": ({"samples": "3"}, TypeError, "samples must be an integer"),
    "other_bytes negative": ({"other_bytes": -1}, ValueError, r"other_bytes must be from 0 to 2\^63 - 1; got -1"),
    "method is a number": ({"method": 3}, TypeError, "method must be a string; got 3"),
    "metric is None": ({"metric": None}, TypeError, "metric must be a string; got None"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    wrong, error, message = WRONG[name]
    zero = torch.zeros(2, 3)
    arguments = {"layers": LAYERS, "choices": CHOICES, "matrix": torch.zeros(6, 6), "bytes": zero, "bit_ops": zero, **wrong}
    with pytest.raises(error, match=f"^(Sensitivity|Uniform): {message}"):
        Sensitivity(**arguments)


@pytest.mark.parametrize(
    "choice, error, message",
    [
        ({"conv": (2, None)}, ValueError, "choice must have all layers; 'fc' is missing"),
        ({"conv": (2, None), "fc": (2, None), "bn": (2, None)}, ValueError, "choice must be of its layers; got 'bn'"),
        ({"conv": (2, None), "fc": (3, None)}, ValueError, r"choice must be one of .* got \(3, None\) for 'fc'"),
        ({"conv": (2, None), "fc": None}, ValueError, "choice must be one of .* got None for 'fc'"),
        ({"conv": 2, "fc": (2, None)}, ValueError, "choice must be one of .* got 2 for 'conv'"),
        ({"conv": "48", "fc": (2, None)}, ValueError, "choice must be one of .* got '48' for 'conv'"),
        ({3: (2, None)}, ValueError, "choice must be of its layers; got '3'"),
        ([(2, None), (2, None)], TypeError, "choice must be a mapping"),
        (None, TypeError, "choice must be a mapping"),
    ],
)
def test_wrong_choices(choice, error, message):
    with pytest.raises(error, match=f"^Sensitivity: {message}"):
        sensitivity().predict(choice)


def test_check_model():
    model = trained(Residual())
    s = quantize.measure_sensitivity(model, images(2), [(2, None)], groups={"both": "conv?"}, progress=False)
    s.check_model(model)
    s.check_model(quantize.QModule(Residual().train()))
    with pytest.raises(ValueError, match="model must have layer 'conv1'; it has not, so this is of another model"):
        s.check_model(nn.Sequential(nn.Linear(6, 4)))
    with pytest.raises(
        ValueError, match=r"weights weight \[6, 3, 3, 3\] in layer 'conv1'; got weight \[7, 3, 3, 3\], so this is of another"
    ):
        s.check_model(Residual(7))
    model.fc = nn.Identity()
    with pytest.raises(ValueError, match=r"weights weight \[4, 6\] in layer 'fc'; got none, so this is of another model"):
        s.check_model(model)
    with pytest.raises(TypeError, match="model must be an nn.Module; got int"):
        s.check_model(3)
    named = sensitivity(layers=("conv1", "fc"))  # without shapes: names alone
    named.check_model(Residual(9))
    with pytest.raises(ValueError, match="got none, so this is of another model"):
        sensitivity(layers=("conv1", "relu")).check_model(Residual())


# ------------------------------------------------------------------------------------------------ files

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


# ------------------------------------------------------------------------------------------------ projection


def indefinite(size, seed=0):
    """A positive semidefinite matrix of strong diagonal, and noise that makes it indefinite; its scales span six decades."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size // 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-4, 2, size, dtype=torch.float64)[torch.randperm(size, generator=generator)].sqrt()
    matrix = (factor @ factor.T / size + 0.3 * (noise + noise.T) / size**0.5) * scale.outer(scale)
    matrix.diagonal().copy_(matrix.diagonal().abs() + 1e-3 * scale.square())
    return matrix


def correlation(matrix):
    root = matrix.diagonal().sqrt()
    return matrix / root.outer(root)


@pytest.mark.parametrize("size", [2, 7, 30])
def test_projected(size):
    s = Sensitivity([f"l{i}" for i in range(size)], [(4, None)], indefinite(size), *[torch.ones(size, 1)] * 2, method="clado")
    before = torch.linalg.eigvalsh(correlation(s.matrix))[0]
    assert before < -1e-3 or size == 2
    p = s.projected()
    assert torch.equal(p.matrix.diagonal(), s.matrix.diagonal()) and torch.equal(p.matrix, p.matrix.T) and p.method == "clado"
    for matrix in (p.matrix, correlation(p.matrix)):
        eigenvalues = torch.linalg.eigvalsh(matrix)
        assert eigenvalues[0] >= -1e-10 * eigenvalues[-1]
    again = p.projected().matrix
    torch.testing.assert_close(correlation(again), correlation(p.matrix), rtol=0, atol=1e-9)


def test_it_is_the_nearest():
    """Optimality: A - X = -Z + a diagonal with Z positive semidefinite and ZX = 0, in units of the diagonal."""
    matrix = indefinite(30)
    start, found = correlation(matrix), correlation(nearest_positive(matrix))
    values, vectors = torch.linalg.eigh(found)
    null = vectors[:, values < 1e-6]
    assert 3 <= null.shape[1] < 30
    # Z lies in the null space of X and agrees with X - A off the diagonal: solve for it, and see that it is positive.
    count = null.shape[1]
    basis = [(i, j) for i in range(count) for j in range(i, count)]
    columns = []
    for i, j in basis:
        z = null[:, i].outer(null[:, j])
        columns.append((z + z.T)[~torch.eye(30).bool()])
    system, target = torch.stack(columns, 1), (found - start)[~torch.eye(30).bool()]
    solution = torch.linalg.lstsq(system, target[:, None]).solution[:, 0]
    assert (system @ solution - target).abs().max() < 1e-6 * target.abs().max()
    z = torch.zeros(count, count, dtype=torch.float64)
    for (i, j), value in zip(basis, solution, strict=True):
        z[i, j] += value
        z[j, i] += value
    assert torch.linalg.eigvalsh(z)[0] > -1e-6 * z.abs().max()
    # And none of many others that are allowed is nearer.
    distance = (found - start).norm()
    for seed in range(5):
        other = correlation(nearest_positive(indefinite(30, seed + 1)))
        for part in (1e-3, 1e-2, 0.1):
            assert (found + part * (other - found) - start).norm() > distance


def test_positive_matrices_stay():
    factor = torch.randn(12, 5, dtype=torch.float64)
    matrix = factor @ factor.T
    torch.testing.assert_close(nearest_positive(matrix), matrix, rtol=1e-12, atol=1e-12)
    assert torch.equal(nearest_positive(torch.zeros(3, 3, dtype=torch.float64)), torch.zeros(3, 3, dtype=torch.float64))


def test_zeros_and_extremes():
    matrix = indefinite(6)
    matrix[2, 2] = 0
    found = nearest_positive(matrix)
    assert not found[2].any() and not found[:, 2].any()
    rest = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(found[rest][:, rest], nearest_positive(matrix[rest][:, rest]), rtol=1e-8, atol=0)
    for scale in (1e-300, 1e300):
        torch.testing.assert_close(nearest_positive(indefinite(6) * scale) / scale, nearest_positive(indefinite(6)), rtol=1e-8, atol=0)
    with pytest.raises(ValueError, match="projected: matrix must have no negative diagonal entries, .* got -1"):
        sensitivity(torch.diag(torch.tensor([1.0, 1, -1, 1, 1, 1]))).projected()
