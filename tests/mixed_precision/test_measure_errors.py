"""What measure_sensitivity() refuses, by the argument's name, and before any long part."""

import copy

import pytest
import torch
from sensitivity_models import Keywords, Residual, images, rows, trained
from torch import nn

import quantize
from quantize import XNOR, DiffQ, DoReFa, PowerOfTwo, Ternary, Uniform
from quantize.mixed_precision import survey


def line():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


def refused(error, message, model=None, batches=None, choices=((2, None),), **more):
    with pytest.raises(error, match=f"^measure_sensitivity: {message}") as caught:
        quantize.measure_sensitivity(
            line() if model is None else model, rows(4) if batches is None else batches, choices, progress=False, **more
        )
    return str(caught.value)


def test_models(tmp_path):
    refused(TypeError, "model must be an nn.Module; got str", "resnet20")
    refused(TypeError, "model must be the module itself, not its DataParallel; pass model.module", nn.DataParallel(line()))
    refused(TypeError, "model must not be a ScriptModule", torch.jit.script(line()))
    compiled = line()
    compiled._orig_mod = compiled[0]
    refused(TypeError, "model must be the module itself, not what torch.compile made of it", compiled)
    refused(ValueError, "model must be a float model; '2.weight' is prepared", quantize.prepare(line(), {"2": Uniform(4)}))
    refused(ValueError, "model must be a float model; got a converted one", quantize.convert(quantize.prepare(line(), Uniform(4))))
    refused(ValueError, "model must have a convolution, linear, recurrent or attention layer; it has none", nn.ReLU())
    refused(TypeError, "weight of layer '0' must be float32, float16 or bfloat16; got torch.float64", line().double())
    refused(ValueError, "weight of layer '0' must be initialized", nn.Sequential(nn.LazyLinear(3)))
    for value in (torch.nan, torch.inf):
        model = line()
        model[2].weight.data[1, 2] = value
        refused(ValueError, "weight of layer '2' must be finite; got 1 values that are NaN or infinite", model)


def test_a_process_groups_wrapper(process_group):
    wrapped = nn.parallel.DistributedDataParallel(line())
    refused(TypeError, "model must be the module itself, not its DistributedDataParallel; pass model.module", wrapped)
    quantize.measure_sensitivity(wrapped.module, rows(4), [(2, None)], progress=False)


class Gives(nn.Module):
    """Returns what `function` makes of its logits."""

    def __init__(self, function):
        super().__init__()
        self.fc, self.function = nn.Linear(5, 3), function

    def forward(self, x):
        return self.function(self.fc(x))


@pytest.mark.parametrize("activation_bits", [None, 4])
@pytest.mark.parametrize("method, metric", [("gauss_newton", "kl"), ("clado", "kl"), ("diagonal", "loss")])
@pytest.mark.parametrize(
    "function, error, message",
    [
        (lambda z: None, TypeError, "model must return logits, a floating-point .*; got NoneType"),
        (lambda z: (z, z), TypeError, "model must return logits, a floating-point .*; got tuple"),
        (lambda z: z.argmax(1), TypeError, "model must return logits, a floating-point .*; got torch.int64"),
        (lambda z: Keywords.Output([z]), TypeError, "model must return logits, a floating-point .*; got list"),
        (lambda z: z[:, 0], ValueError, r"model must return logits \[N, classes, ...\] of at least 2 classes; got \[4\]"),
        (lambda z: z[:, :1], ValueError, r"model must return logits \[N, classes, ...\] of at least 2 classes; got \[4, 1\]"),
        (lambda z: z / 0 * 0, ValueError, "model's outputs must be finite; got 12 values that are NaN or infinite"),
    ],
    ids=["none", "tuple", "integers", "list", "1-D", "one class", "NaN"],
)
def test_outputs(function, error, message, method, metric, activation_bits):
    refused(error, message, Gives(function), choices=[(2, activation_bits)], method=method, metric=metric)


def test_activations_that_are_not_finite():
    model = line()
    model[0].bias.data[0] = torch.nan
    refused(ValueError, "model's outputs must be finite", model)
    refused(ValueError, "model's activations must be finite; of layer '2': .* values from nan to nan", model, choices=[(2, 8)])


def test_a_quantized_model_that_overflows():
    class Edge(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x):
            z = self.fc(x)
            return z if self.fc.weight.unique().numel() > 10 else z / 0

    refused(ValueError, "model's outputs must be finite", Edge())


X, Y = torch.randn(4, 5), torch.randint(3, (4,))


@pytest.mark.parametrize(
    "batches, error, message",
    [
        ([], ValueError, r"batches must hold at least one \(inputs, targets\) pair; got none"),
        (iter([]), ValueError, "batches must hold at least one"),
        (3, TypeError, r"batches must be an iterable of \(inputs, targets\) pairs; got int"),
        (X, TypeError, "batches must be an iterable .* got Tensor"),
        ([X], TypeError, r"batches must hold \(inputs, targets\) pairs; got Tensor"),
        ([(X, Y), (X, Y, Y)], TypeError, r"batches must hold \(inputs, targets\) pairs; got tuple"),
        ([(X, Y), (X[:0], Y[:0])], ValueError, "batches must hold samples; got an empty one, number 1"),
        ([((), Y)], ValueError, "batches must hold samples; got an empty one, number 0"),
        ([({}, Y)], ValueError, "batches must hold samples; got an empty one, number 0"),
        ([("text", Y)], TypeError, "batches must hold inputs that are Tensors; got str, number 0"),
        ([(X, Y), (X.numpy(), Y.numpy())], TypeError, "batches must hold inputs that are Tensors; got ndarray, number 1"),
        ([(X.to_sparse(), Y)], TypeError, "batches must hold inputs that are dense Tensors with values; got torch.sparse_coo, number 0"),
        ([(X.to("meta"), Y)], TypeError, "batches must hold inputs that are dense Tensors with values; got one on meta, number 0"),
        ([(X[0, 0], Y)], ValueError, "batches must hold inputs that are Tensors of samples; got one without dimensions, number 0"),
        ([({"input": X.numpy()}, Y)], TypeError, "batches must hold inputs that are Tensors; got ndarray, number 0"),
        ([(X, Y), (X / 0, Y)], ValueError, "batches must be finite; number 1 holds NaN or infinite inputs"),
        ([({"input": X * torch.nan}, Y)], ValueError, "batches must be finite; number 0"),
    ],
)
def test_batches(batches, error, message):
    refused(error, message, batches=batches)


@pytest.mark.parametrize("method", ["gauss_newton", "clado", "diagonal"])
@pytest.mark.parametrize(
    "targets, error, message",
    [
        (None, TypeError, 'batches must hold targets for metric "loss"; number 0 has None'),
        (3, TypeError, "targets must be a Tensor of classes or probabilities; got int"),
        ([0, 1, 2, 0], TypeError, "targets must be a Tensor of classes or probabilities; got list"),
        (Y.numpy(), TypeError, "targets must be a Tensor of classes or probabilities; got ndarray"),
        (Y > 0, TypeError, "targets must be a Tensor of classes or probabilities; got torch.bool"),
        (Y + 3, ValueError, "targets must be classes from 0 to 2; got [345]"),
        (Y - 100, ValueError, "targets must be classes from 0 to 2; got -100"),
        (Y[:3], ValueError, r"targets must be classes or probabilities of the model's outputs; got \[3\]"),
        (torch.rand(4, 4), ValueError, r"targets must be classes or probabilities of the model's outputs; got \[4, 4\]"),
        (Y.float(), ValueError, r"targets must be classes or probabilities of the model's outputs; got \[4\]"),
    ],
    ids=["none", "number", "list", "NumPy's", "booleans", "too high", "negative", "too few", "too many classes", "floats"],
)
def test_targets(targets, error, message, method):
    if targets is not None and isinstance(targets, torch.Tensor) and not targets.is_floating_point() and message.endswith("got -100"):
        targets = targets * 0 - 100
    refused(error, message, batches=[(X, targets)], metric="loss", method=method)
    quantize.measure_sensitivity(line(), [(X, targets)], [(2, None)], method, progress=False)  # KL needs none


@pytest.mark.parametrize(
    "choices, error, message",
    [
        ([], ValueError, "choices must be pairs .*, at least one; got none"),
        ("48", TypeError, "choices must be pairs"),
        (4, TypeError, "choices must be pairs"),
        ([4, 8], TypeError, r"choices must be pairs .* got 4"),
        ([(4,)], TypeError, r"choices must be pairs .* got \(4,\)"),
        ([(4, "8")], TypeError, "choices must be pairs"),
        ([(4, 8), (4, 8)], ValueError, r"choices must differ; got \(4, 8\) twice"),
        ([(None, 8)], ValueError, r"choices without weight_bits must be \(None, None\), a layer in full precision; got \(None, 8\)"),
        ([(-1, 8)], ValueError, "choices must be pairs"),
    ],
)
def test_choices(choices, error, message):
    refused(error, message, choices=choices)


def test_quantizers():
    refused(TypeError, "quantizer must be a class such as quantize.Uniform or a function; got 'Uniform'", quantizer="Uniform")
    refused(TypeError, r"quantizer must be a class such as quantize.Uniform or a function; got Uniform\(", quantizer=Uniform(4))
    refused(
        TypeError,
        r"quantizer must return a configuration such as quantize.Uniform; got 'w2' for \(2, None\)",
        quantizer=lambda w, a: f"w{w}",
    )
    learned = refused(
        ValueError, "quantizer must return a configuration of fixed bits", quantizer=lambda w, a: DiffQ(activation_bits="learned")
    )
    assert "'learned'" in learned
    refused(ValueError, r"choices with XNOR must have weight_bits 1; got \(2, None\)", quantizer=XNOR)
    refused(ValueError, r"choices with Ternary must have weight_bits 2; got \(3, 8\)", quantizer=Ternary, choices=[(2, 8), (3, 8)])
    for quantizer, choice, message in (
        (Uniform, (9, None), "Uniform: weight_bits must be an integer from 2 to 8; got 9"),
        (Uniform, (4, 1), "Uniform: activation_bits must be an integer from 2 to 8; got 1"),
        (PowerOfTwo, (1, None), "PowerOfTwo: bits must be an integer from 2 to 8; got 1"),
        (DoReFa, (9, None), "DoReFa: weight_bits must be an integer from 1 to 8, or 16; got 9"),
        (DiffQ, (17, None), "DiffQ: min_bits must be a number from 1 to 16; got 17"),
        (XNOR, (1, 2), "XNOR: activation_bits must be 1 or None; got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize.measure_sensitivity(line(), rows(4), [choice], quantizer=quantizer, progress=False)


def test_names():
    refused(ValueError, "method must be one of 'gauss_newton', 'composed', 'clado', 'diagonal'; got 'zeroq'", method="zeroq")
    refused(ValueError, "metric must be one of 'kl', 'loss'; got 'accuracy'", metric="accuracy")
    refused(ValueError, 'metric must be "kl" with method "composed"; got \'loss\'', method="composed", metric="loss")
    refused(TypeError, "loss_fn must be callable; got 'mse'", metric="loss", method="clado", loss_fn="mse")
    for method, metric in (("gauss_newton", "loss"), ("clado", "kl"), ("diagonal", "kl")):
        message = f"""loss_fn belongs to metric "loss" with method "clado" or "diagonal"; got '{method}' with '{metric}'"""
        refused(ValueError, message, method=method, metric=metric, loss_fn=nn.functional.mse_loss)
    nan = [(X, Y)]
    refused(
        ValueError,
        "loss_fn must return a finite loss; got nan of the float model",
        batches=nan,
        method="clado",
        metric="loss",
        loss_fn=lambda z, y: z.mean() / 0 * 0,
    )


def test_skip_and_groups():
    model = trained(Residual())

    def wrong(error, message, **more):
        refused(error, message, model, images(2), **more)

    wrong(TypeError, "skip must be glob patterns over layer names; got 3", skip=3)
    wrong(TypeError, r"skip must be glob patterns over layer names; got \['fc', 2\]", skip=["fc", 2])
    wrong(ValueError, "skip must match layers, such as 'conv1', 'conv2', 'fc'; 'bn1' matches none", skip=["conv1", "bn1"])
    wrong(ValueError, "skip must leave a layer; it skips all of conv1, conv2, fc", skip="*")
    wrong(TypeError, "groups must be a mapping from names to glob patterns; got list", groups=["conv*"])
    wrong(TypeError, r"groups\['g'\] must be glob patterns over layer names; got 3", groups={"g": 3})
    wrong(TypeError, "groups must be a mapping from names to glob patterns; got 1 as a name", groups={1: "*"})
    wrong(ValueError, r"groups\['g'\] must have at least one glob pattern; got none", groups={"g": []})
    wrong(ValueError, r"groups\['g'\] must match layers, .* 'stage\*' matches none", groups={"g": "stage*"})
    wrong(ValueError, r"groups\['g'\] must match layers, .* 'fc' matches none", groups={"g": "fc"}, skip="fc")
    wrong(ValueError, "groups must not overlap; 'conv2' is in 'a' and in 'b'", groups={"a": "conv*", "b": ["fc", "*2"]})
    wrong(ValueError, "groups must not have a layer's name unless it is in the group; got 'fc'", groups={"fc": "conv*"})
    quantize.measure_sensitivity(model, images(2), [(2, None)], groups={"conv1": "conv*"}, progress=False)
    tied = line()
    tied.insert(1, nn.Linear(6, 6))
    tied.insert(2, nn.Linear(6, 6))
    tied[2].weight = tied[1].weight
    message = "groups must hold all layers that share a weight; '2' and '1' are in different ones"
    refused(ValueError, message, tied, groups={"a": ["0", "1"], "b": ["2", "4"]})


def test_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="measure_sensitivity: checkpoint must be in a folder that exists; got .*missing/here"):
        quantize.measure_sensitivity(line(), rows(4), [(2, None)], checkpoint=tmp_path / "missing" / "here", progress=False)
    for path in (tmp_path, "", f"{tmp_path}/"):
        with pytest.raises(ValueError, match="measure_sensitivity: checkpoint must be the path of a file; got '"):
            quantize.measure_sensitivity(line(), rows(4), [(2, None)], checkpoint=path, progress=False)
    with pytest.raises(TypeError, match="measure_sensitivity: checkpoint must be a path; got 3"):
        quantize.measure_sensitivity(line(), rows(4), [(2, None)], checkpoint=3, progress=False)


def test_progress():
    for value in ("x", None, 2):
        with pytest.raises(TypeError, match=f"measure_sensitivity: progress must be True or False; got {value!r}"):
            quantize.measure_sensitivity(line(), rows(4), [(2, None)], progress=value)


def test_what_cannot_be_converted_is_found_first(monkeypatch):
    """The input of the second layer is never below zero."""
    monkeypatch.setattr(survey.Survey, "__init__", lambda *args: pytest.fail("the measurement began"))
    with pytest.raises(ValueError, match="the input of layer '2' must have both signs"):
        quantize.measure_sensitivity(line(), rows(4), [(1, 1)], quantizer=XNOR, progress=False)


def test_a_model_after_an_error_is_as_before():
    model, batches = trained(Residual()).train(), images(3)
    state = copy.deepcopy(model.state_dict())
    fail = []
    model.fc.register_forward_hook(lambda *args: fail.append(1) if len(fail) < 8 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize.measure_sensitivity(model, batches, [(2, 4)], progress=False)
    assert model.training and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not hasattr(model.fc, "parametrizations") and "forward" not in vars(model.fc)


@pytest.mark.parametrize("method", ["gauss_newton", "diagonal", "clado"])
def test_classes_last_are_named(method):
    model, tokens = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 7)), torch.randint(7, (4, 5))
    with pytest.raises(ValueError, match=r"logits \[N, classes, ...\]; got \[4, 5, 7\] for targets \[4, 5\], with classes last"):
        quantize.measure_sensitivity(model, [(tokens, tokens)], [(4, None)], method, progress=False)
    square = torch.randint(7, (4, 7))  # which may be meant either way
    assert quantize.measure_sensitivity(model, [(square, square)], [(4, None)], method, progress=False).layers
