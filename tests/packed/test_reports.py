"""size_report, summary and `python -m quantize inspect`: counted by hand, and nothing of the model changes."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from packed_models import Attention, PaddedConv, Residual, Tied, packed_of, warm
from torch import nn

from quantize import _C, ActivationConfig, QModule
from quantize.__main__ import main
from quantize.packed.convert import convert
from quantize.packed.file import load, save
from quantize.packed.size_report import size_report
from quantize.packed.summary import summary
from quantize.weight.config import XNOR, PowerOfTwo, Uniform
from quantize.weight.prepare import prepare

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))


def rows_of(report):
    return {row.name: row for row in report.layers}


def test_sizes_of_prepared_and_packed_are_the_same():
    prepared, packed = packed_of(Residual(), {"*": PowerOfTwo(4), "fc": None})
    before, after = size_report(prepared), size_report(packed)
    assert before.layers == after.layers and (before.bytes, before.float_bytes) == (after.bytes, after.float_bytes)
    rows = rows_of(after)
    assert rows["conv1"] == ("conv1", "power_of_two", 4, 6 * 16 + 6 * 4 + 6 * 4, 6 * 27 * 4 + 4 * 6 * 4 + 8, "")  # 27 codes: 14 bytes of 16
    assert rows["conv2"].bytes == 6 * 32 + 24 + 24 and rows["conv2"].float_bytes == 6 * 54 * 4 + 24
    assert rows["bn2"].reason == "a batch norm that could not be folded" and rows["bn2"].bytes == 4 * 24 + 8 and "bn1" not in rows
    of_float = {row.name: row.reason for row in size_report(Residual()).layers}  # where nothing was to be folded
    assert of_float["bn1"] == of_float["bn2"] == "no weight that prepare takes" and of_float["conv1"] == "not prepared"
    assert rows["fc"] == ("fc", "float32", 32, 4 * 6 * 4 + 16, 4 * 6 * 4 + 16, "not prepared")
    assert after.float_bytes == size_report(Residual()).float_bytes == size_report(Residual()).bytes
    assert after.ratio == after.float_bytes / after.bytes


def test_sizes_before_calibration():
    model = prepare(Residual(), Uniform(8, activation_bits=8))
    size = size_report(model).bytes
    model.train()(IMAGE)
    assert size_report(convert(model)).bytes == size


def test_ties_count_once():
    prepared = prepare(Tied(), Uniform(4))
    report = size_report(prepared)
    assert report.layers == size_report(convert(prepared)).layers
    assert rows_of(report)["inner"].bytes == 12 * 8 + 12 * 4 and rows_of(report)["head"].bytes == 12 * 4
    assert size_report(Tied()).bytes == 12 * 8 * 4 + 12 * 4


class HalfTied(nn.Module):
    """An embedding that stays in float with the weight of a linear layer, and of attention's projection."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head, self.attn = nn.Embedding(24, 8), nn.Linear(8, 24, bias=False), nn.MultiheadAttention(8, 2)
        self.head.weight = self.attn.in_proj_weight = self.embedding.weight

    def forward(self, x):
        x = self.embedding(x)
        return self.head(self.attn(x, x, x)[0])


def test_weights_that_stay_in_float_elsewhere_count_once(tmp_path, capsys):
    report = size_report(prepared := prepare(HalfTied(), Uniform(4)))
    assert report.float_bytes == size_report(HalfTied()).float_bytes
    packed, path = convert(prepared), tmp_path / "f"
    assert report.layers == size_report(packed).layers and report.bytes > 24 * 8 * 4
    save(packed, path)
    loaded = load(HalfTied(), path)
    assert size_report(loaded).layers == report.layers
    save(loaded, tmp_path / "again")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("in float too, tied") == 2 and f"the packed weights in float32: {8 * 8 * 4 / 1024:.1f} KiB" in shown
    save(convert(prepare(Tied(), Uniform(4))), path)  # an embedding that stays, and two layers tied with it
    main(["inspect", str(path)])
    assert "the packed weights in float32: 0.0 KiB" in capsys.readouterr().out


def test_errors_name_their_caller():
    model = prepare(nn.Sequential(nn.ReLU(), nn.Linear(8, 4)), XNOR())
    for who, call in (("size_report", size_report), ("summary", lambda m: summary(m, torch.randn(2, 8)))):
        with pytest.raises(ValueError, match=f"^{who}: the input of layer '1' must have both signs"):
            call(model)


def test_decoded_weights_are_named():
    report = size_report(packed_of(Attention(), Uniform(4))[1])
    reasons = {row.name: row.reason for row in report.layers if row.reason}
    assert reasons["attn"] == "decoded: MultiheadAttention reads a float weight in its own forward"
    assert "NonDynamicallyQuantizableLinear" in reasons["attn.out_proj"]
    assert report.bytes < report.float_bytes / 2  # of tiny layers; codes, scales and biases


def test_half_models_count_half():
    assert size_report(prepare(nn.Sequential(nn.Linear(64, 8, bias=False)).half(), Uniform(4))).float_bytes == 64 * 8 * 2


LAYERS = [
    (lambda: nn.Conv2d(3, 8, 3, 2, 1), (2, 3, 9, 9), 2 * 8 * 25 * 27),
    (lambda: nn.Conv2d(4, 8, (1, 3), groups=4), (1, 4, 5, 5), 8 * 15 * 3),
    (lambda: nn.Conv1d(3, 4, 3, dilation=2), (3, 9), 4 * 5 * 9),
    (lambda: nn.Conv3d(2, 4, 2, bias=False), (1, 2, 3, 3, 3), 4 * 8 * 16),
    (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (2, 4, 5, 5), 2 * 4 * 25 * 9 * 3),
    (lambda: nn.Linear(5, 7), (2, 3, 5), 6 * 35),
]


@pytest.mark.parametrize("make, shape, macs", LAYERS, ids=[str(make()) for make, _, _ in LAYERS])
def test_macs(make, shape, macs):
    x = torch.randn(shape)
    plain = nn.Sequential(make())
    report = summary(plain, x)
    assert [(r.macs, r.bit_ops, r.weight_bits, r.activation_bits) for r in report.layers] == [(macs, macs * 1024, 32, 32)]
    prepared, packed = packed_of(plain, PowerOfTwo(3, activation_bits=6), x)
    for model in (prepared, packed):
        row = summary(model, x).layers[0]
        assert (row.macs, row.bit_ops, row.weight_bits, row.activation_bits) == (macs, macs * 18, 3, 6)
        assert row.kind == type(make()).__name__ and row.bytes == size_report(packed).layers[0].bytes
    assert row.note != "prepared: runs in full precision"


def test_totals_and_others():
    prepared, packed = packed_of(Residual(), {"*": Uniform(4), "fc": None})
    a, b = summary(prepared, IMAGE), summary(packed, IMAGE)
    assert (a.macs, a.bit_ops, a.bytes, a.float_bytes) == (b.macs, b.bit_ops, b.bytes, b.float_bytes)
    assert a.macs == 2 * 64 * 6 * (27 + 54) + 2 * 24 and a.bit_ops == 2 * 64 * 6 * (27 + 54) * 128 + 48 * 1024
    assert b.bytes == size_report(packed).bytes and b.layers[-1][:2] == ("others", "")
    assert a.layers[0].note == "prepared: runs in full precision"


def test_attention():
    x = torch.randn(2, 5, 8)
    for model in packed_of(Attention(), Uniform(4)):
        rows = {(r.name, r.kind): r for r in summary(model, x).layers}
        assert rows["attn", "MultiheadAttention"].macs == 3 * 2 * 5 * 64 and rows["attn", "MultiheadAttention"].weight_bits == 4
        assert rows["attn", "attention"].macs == 2 * 2 * 5 * 5 * 8 and rows["attn", "attention"].bit_ops == 2 * 2 * 5 * 5 * 8 * 1024
        assert rows["attn.out_proj", "NonDynamicallyQuantizableLinear"].macs == 2 * 5 * 64
        assert rows["mlp", "Linear"].macs == 2 * 5 * 64
    assert "decoded: MultiheadAttention" in rows["attn", "MultiheadAttention"].note
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()  # whose fused path calls no layer
    assert summary(encoder, x).macs == 4 * 10 * 64 + 2 * 2 * 5 * 5 * 8 + 2 * 10 * 128


def test_notes():
    class First(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    class Repeated(nn.Sequential):
        def forward(self, x):
            return self[0](self[0](x))

    model = First(nn.Linear(6, 4), nn.Linear(4, 4), nn.LSTM(4, 4))
    with torch.no_grad():
        model[0].weight[1:3] = 0
    rows = rows_of(summary(prepare(model, Uniform(4)), torch.randn(2, 6)))
    assert rows["0"].note == "2 of 4 channels are all zero; prepared: runs in full precision"
    assert rows["1"].note.endswith("not called") and rows["1"].macs == 0
    assert rows["others"].note == "MACs not counted: 2"
    assert summary(Repeated(nn.Linear(6, 6)), torch.randn(2, 6)).macs == 2 * 2 * 36


@pytest.mark.parametrize("kind", ["plain", "prepared", "packed", "compressed"])
def test_nothing_changes(kind):
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), PaddedConv(4, 4, 2))
    if kind != "plain":
        model = prepare(model.train(), Uniform(4, activation_bits=8))
    if kind == "packed":
        model(IMAGE.clone())
        model = convert(model)
    if kind == "compressed":
        model = QModule(model, ActivationConfig(bits=2, max_bits=2))
    model.train()
    model[2].eval()
    modes, before, x = [m.training for m in model.modules()], copy.deepcopy(model.state_dict()), IMAGE.clone()
    rng = torch.get_rng_state()
    for report in (summary(model, x), size_report(model)):
        assert str(report) and repr(report)
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), rng) and torch.equal(x, IMAGE)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules()) or kind == "compressed"
    if kind == "prepared":
        assert not model[1].activation_quantizer.initialized


def test_refusals():
    for report in (size_report, summary):
        with pytest.raises(TypeError, match=f"{report.__name__}: model must be an nn.Module; got int"):
            report(3)
        model = prepare(nn.Sequential(nn.Linear(3, 3)), Uniform(4))
        with torch.no_grad():
            model[0].parametrizations.weight.original[0, 0] = float("nan")
        with pytest.raises(ValueError, match="'0.weight' must be finite"):
            report(model)


def test_tables_line_up():
    prepared, _ = packed_of(Residual(), {"*": Uniform(4), "fc": None})
    for report in (size_report(prepared), summary(prepared, IMAGE)):
        lines = str(report).splitlines()
        assert lines[0].startswith("layer ") and set(lines[1]) == {"-"} and lines[2].startswith("conv1 ")
        assert len(lines[1]) >= max(len(line) for line in lines[:-1])


def command(*arguments):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-m", "quantize", *arguments], capture_output=True, text=True, env=env)


def test_inspect(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    _, packed = packed_of(Residual(), {"*": Uniform(4, activation_bits=8), "fc": PowerOfTwo(8)}, IMAGE)
    save(packed, path)
    done = command("inspect", str(path))
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    assert lines[2].split() == ["conv1", "Conv2d", "uniform", "4", "8", "6x3x3x3", "0.1", "with", "bn1"]
    assert lines[4].split() == ["fc", "Linear", "power_of_two", "8", "32", "4x6", "0.1"]
    assert lines[5].split()[:4] == ["others", "5", "tensors", "float"] and "3 packed weights; tensors: 0.6 KiB, header: " in lines[-1]
    path.write_bytes(path.read_bytes()[:-1])
    for file, message in ((path, f"inspect: {path}: tensor"), (tmp_path / "none", f"inspect: {tmp_path / 'none'}: No such file")):
        assert main(["inspect", str(file)]) == 1
        shown = capsys.readouterr()
        assert not shown.out and message in shown.err


def test_names_cannot_write_to_the_terminal(tmp_path):
    from quantize.packed.inspect_file import inspect_file

    model = nn.Module()
    model.add_module("a\x1b[31mb", nn.Linear(3, 3))
    save(convert(prepare(warm(model), Uniform(4))), tmp_path / "f")
    assert "\x1b" not in inspect_file(tmp_path / "f") and "a\\x1b[31mb" in inspect_file(tmp_path / "f")


def test_without_a_command_the_builds_report():
    done = command()
    assert done.returncode == 0 and _C.cpu_isa() in done.stdout and "kernels" in done.stdout


def test_errors_name_the_function_that_was_called():
    model = convert(prepare(nn.Sequential(nn.Linear(8, 4)), Uniform(4)))
    model._buffers["0.codes"] = torch.ones(3)  # as the layer's codes are called in a file
    for function, more in ((size_report, ()), (summary, (torch.ones(1, 8),)), (save, ("never written",))):
        with pytest.raises(ValueError, match=f"^{function.__name__}: two tensors of the model have the name '0.codes'"):
            function(model, *more)
