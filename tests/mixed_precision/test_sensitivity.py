"""The Sensitivity class: its tables and predictions, and what it refuses."""

import math

import pytest
import torch
from sensitivity_models import Residual, images, trained
from small_sensitivity import CHOICES, LAYERS, sensitivity
from torch import nn

import quantize
from quantize import Sensitivity, Uniform


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
    "matrix is text": ({"matrix": "zero"}, TypeError, "matrix must be a Tensor or rows of real numbers; got 'zero'"),
    "matrix sparse": ({"matrix": torch.eye(6).to_sparse()}, TypeError, "matrix must be a dense Tensor with values; got torch.sparse_coo"),
    "bytes on meta": ({"bytes": torch.zeros(2, 3, device="meta")}, TypeError, "bytes must be a dense Tensor with values; got one on meta"),
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
    "link in a list": ({"link": ["identity"]}, ValueError, r"link must be one of 'identity', 'log1p'; got \['identity'\]"),
    "unknown link": ({"link": "exp"}, ValueError, "link must be one of 'identity', 'log1p'; got 'exp'"),
    "samples is text": ({"samples": "3"}, TypeError, "samples must be an integer"),
    "other_bytes negative": ({"other_bytes": -1}, ValueError, r"other_bytes must be an integer from 0 to 2\^63 - 1; got -1"),
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


def test_check_model_without_shapes():
    with pytest.raises(ValueError, match="model must have weights in layer 'relu'; got none, so this is of another model"):
        sensitivity(layers=("conv1", "relu")).check_model(Residual())
    model, s = nn.Sequential(nn.Linear(4, 3)), sensitivity(layers=("0",))
    s.check_model(quantize.prepare(model, Uniform(4)))
    with pytest.raises(ValueError, match="Sensitivity: model must be a float or prepared one; layer '0' is converted"):
        s.check_model(quantize.convert(model))


@pytest.mark.parametrize("layer", [nn.LazyLinear(3), nn.LazyConv2d(3, 3)])
def test_check_model_of_a_lazy_layer(layer):
    with pytest.raises(ValueError, match="Sensitivity: model must be initialized; layer '0' is not: run a batch through the lazy layer"):
        sensitivity(layers=("0",)).check_model(nn.Sequential(layer))


def test_large_numbers_are_made_symmetric():
    large = torch.full((6, 6), 1.7e308, dtype=torch.float64)
    assert torch.equal(sensitivity(large).matrix, large)


def test_growth_beyond_floats_is_infinite():
    sensitivity = quantize.Sensitivity(["a"], [(2, None)], torch.tensor([[1000.0]]), torch.tensor([[8]]), torch.tensor([[1]]), link="log1p")
    assert sensitivity.predict({"a": (2, None)}) == math.inf


def test_budgets_beyond_floats():
    sensitivity = quantize.Sensitivity(["a"], [(2, None)], torch.tensor([[1.0]]), torch.tensor([[8]]), torch.tensor([[1]]))
    assert quantize.allocate(sensitivity, max_bytes=10**400).choice == {"a": (2, None)}
    with pytest.raises(ValueError, match="max_bytes must be at least 8"):
        quantize.allocate(sensitivity, max_bytes=-(10**400))
