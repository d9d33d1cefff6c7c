"""What train.py ends with, and its report.json."""

import json

import outcome
import pytest
import torch
from models import create_model

import quantize


@pytest.fixture
def finished(train, tmp_path, capsys):
    """Function training for an epoch: report.json, the lines of the printed report by their names, and the log."""

    def run(*flags):
        capsys.readouterr()
        status, _, log = train("run", "--epochs", "1", *flags)
        lines = capsys.readouterr().out.splitlines()[1:]
        assert status == 0
        return json.loads((tmp_path / "run" / "report.json").read_text()), {line[:11].strip(): line[12:] for line in lines}, log

    return run


# MACs of resnet20_q at width 4 on 32x32 images of 1 channel: the first convolution's and the last layer's, and the blocks'.
ENDS, BLOCKS = 1024 * 9 * 4 + 160, 6 * 1024 * 9 * 16 + 256 * 9 * (32 + 5 * 64) + 64 * 9 * (128 + 5 * 256)


@pytest.mark.parametrize(
    ("flags", "by_bits", "bit_ops"),
    [
        ("--weights xnor", {"1x1": BLOCKS, "32x32": ENDS}, BLOCKS + 1024 * ENDS),
        ("--weights dorefa --activation-bits 4", {"2x4": BLOCKS, "32x32": ENDS}, 8 * BLOCKS + 1024 * ENDS),
        ("--weights ternary", {"2x32": BLOCKS + ENDS}, 64 * (BLOCKS + ENDS)),
        ("--weights uniform --float-layers conv1 fc", {"4x32": BLOCKS, "32x32": ENDS}, 128 * BLOCKS + 1024 * ENDS),
    ],
)
def test_report(finished, tmp_path, flags, by_bits, bit_ops):
    report, lines, log = finished("--arch", "resnet20_q", *flags.split())
    assert (report["macs"], report["macs_by_bits"], report["bit_ops"]) == (BLOCKS + ENDS, by_bits, bit_ops)
    assert report["parameters"] == sum(p.numel() for p in create_model("resnet20_q", 10, 1, 4).parameters())
    assert report["best_top1"] == max(entry["test_top1"] for entry in log) and report["last_top1"] == log[-1]["test_top1"]
    file = tmp_path / "run" / "model.safetensors"
    assert report["file"] == str(file) and report["file_bytes"] == file.stat().st_size < report["float_bytes"]
    assert report["load_seconds"] > 0 and report["duration_seconds"] == pytest.approx(sum(entry["seconds"] for entry in log))
    assert list(lines) == ["complexity", "parameters", "best top-1", "file", "load time", "duration"]
    assert lines["file"].startswith(f"{file.stat().st_size:,} bytes")
    loaded = quantize.load(create_model("resnet20_q", 10, 1, 4), file)
    with torch.no_grad():
        assert loaded(torch.randn(2, 1, 32, 32)).isfinite().all()


def test_learned_bits_are_counted_as_they_are(finished):
    report, _, log = finished("--arch", "lenet", "--weights", "diffq", "--bits-lr", "0.3")
    assert list(report["macs_by_bits"]) == ["learnedx32"]
    assert 64 * report["macs"] < report["bit_ops"] < 32 * 8 * report["macs"]
    assert report["file_bytes"] / 2**20 > log[-1]["size_mib"]


def test_learned_bits_are_learned_when_they_are_whole():
    model = quantize.prepare(create_model("lenet", 10, 1), quantize.DiffQ(init_bits=8))
    assert list(outcome.complexity(model, torch.randn(1, 1, 32, 32))["macs_by_bits"]) == ["learnedx32"]


def test_full_precision_has_no_packed_file(finished, tmp_path):
    report, lines, _ = finished("-c", "quantize")
    assert report["macs_by_bits"] == {"32x32": report["macs"]} and report["bit_ops"] == 1024 * report["macs"]
    assert report["file"] is None and not (tmp_path / "run" / "model.safetensors").exists()
    assert lines["file"] == "none: the weights are in full precision" and "load time" not in lines


def test_what_cannot_be_packed_says_why(finished, monkeypatch):
    def convert(model):
        raise ValueError("convert: layer 'conv1' is in the way")

    monkeypatch.setattr(quantize, "convert", convert)
    report, lines, _ = finished("--weights", "po2")
    assert lines["file"] == "none: convert: layer 'conv1' is in the way" == f"none: {report['not_packed']}"


def test_without_tests_there_is_no_best(finished):
    report, lines, _ = finished("--weights", "po2", "--training-only")
    assert report["best_top1"] is None and "best top-1" not in lines and report["file_bytes"] > 0


def test_nothing_of_the_model_changes():
    model = quantize.prepare(create_model("lenet", 10, 1, 2), quantize.Uniform(4))
    before, names = {name: value.clone() for name, value in model.state_dict().items()}, [type(m) for m in model.modules()]
    outcome.complexity(model, torch.randn(1, 1, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(m) for m in model.modules()] == names and model.training


def test_a_training_that_diverged_has_a_report_too():
    model = quantize.prepare(create_model("lenet", 10, 1), quantize.Uniform(4))
    with torch.no_grad():
        model.conv1.parametrizations.weight.original.fill_(torch.nan)
    numbers = outcome.complexity(model, torch.zeros(1, 1, 32, 32))
    assert numbers["macs"] is None and "must be finite" in numbers["not_counted"]
    packed = outcome.pack(model, create_model("lenet", 10, 1), None)
    rest = {"parameters": 1, "best_top1": None, "last_top1": None, "duration_seconds": 1.0}
    assert "complexity  none: " in outcome.text({**numbers, **packed, **rest})
