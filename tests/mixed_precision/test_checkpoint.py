"""Interrupted measurements go on to the same bits; the bar."""

import functools
import os
import subprocess
import sys

import pytest
import torch
from sensitivity_models import Residual, images, trained

import quantize
from quantize.mixed_precision import checkpoint, file, survey

CHOICES = [(2, None), (4, 4)]
WAYS = [*((method, metric) for method in ("gauss_newton", "clado", "diagonal") for metric in ("kl", "loss")), ("composed", "kl")]


class Stops:
    """A forward hook that interrupts at the next of some calls."""

    def __init__(self):
        self.count, self.at = 0, []

    def on(self, module):
        return module.register_forward_hook(lambda *args: self.called())  # a function, which copies of the model share

    def called(self):
        self.count += 1
        if self.at and self.count == self.at[0]:
            self.at.pop(0)
            raise KeyboardInterrupt


def interrupted(at, model, hook, *arguments, **more):
    """Measures until it is through, interrupted at these calls of the last layer; how often it was."""
    hook.count, hook.at, times = 0, list(at), 0
    while True:
        try:
            return quantize.measure_sensitivity(model, *arguments, **more), times
        except KeyboardInterrupt:
            times += 1
            assert os.listdir(more["checkpoint"].parent) in ([], [more["checkpoint"].name])  # nothing temporary


@pytest.mark.parametrize("method, metric", WAYS)
def test_resumed(method, metric, tmp_path):
    model, batches, hook = trained(Residual()), images(4, 3, 5), Stops()
    hook.on(model.fc)
    measured = functools.partial(interrupted, model=model, hook=hook)
    want, _ = measured([], batches=batches, choices=CHOICES, method=method, metric=metric, checkpoint=tmp_path / "c", progress=False)
    total = hook.count
    assert os.listdir(tmp_path) == []
    for seed in range(1 if method == "clado" else 2):
        generator = torch.Generator().manual_seed(seed)
        at = sorted({1, *(int(i) for i in torch.randint(1, 2 * total, (3,), generator=generator))})
        got, times = measured(at, batches=batches, choices=CHOICES, method=method, metric=metric, checkpoint=tmp_path / "c", progress=False)
        assert times >= 2 and torch.equal(got.matrix, want.matrix) and got.samples == want.samples
        assert os.listdir(tmp_path) == []


def test_what_is_done_is_not_done_again(tmp_path):
    model, batches, hook, path = trained(Residual()), images(4, 3), Stops(), tmp_path / "c"
    hook.on(model.fc)
    interrupted([], model, hook, batches, CHOICES, "clado", checkpoint=path, progress=False)
    total = hook.count
    _, times = interrupted([total - 2], model, hook, batches, CHOICES, "clado", checkpoint=path, progress=False)
    assert times == 1 and hook.count < 1.5 * total


def test_saved_on_the_way(tmp_path, monkeypatch):
    """Not only when an exception comes: a process can be killed."""
    model, path, found = trained(Residual()), tmp_path / "c", []
    monkeypatch.setattr(survey, "SAVE_EVERY", -1)
    model.fc.register_forward_hook(
        lambda *args: found.append(path.exists() and file.read(path, "", checkpoint.FORMAT, checkpoint.TABLES)[1]["done"])
    )
    quantize.measure_sensitivity(model, images(3), CHOICES, "diagonal", checkpoint=path, progress=False)
    assert {1, 2, 3, 4, 5} <= {int(done) for done in found} and not path.exists()


@pytest.fixture
def half(tmp_path):
    """A model, its batches, and the file of an interrupted measurement."""
    model, batches, hook = trained(Residual()), images(4, 3), Stops()
    handle = hook.on(model.fc)
    hook.at = [20]
    with pytest.raises(KeyboardInterrupt):
        quantize.measure_sensitivity(model, batches, CHOICES, "diagonal", checkpoint=tmp_path / "c", progress=False)
    handle.remove()
    return model, batches, tmp_path / "c"


def test_files_of_others(half):
    model, batches, path = half
    before = path.read_bytes()

    def refused(message, model=model, batches=batches, choices=CHOICES, method="diagonal", **more):
        with pytest.raises(ValueError, match=f"^measure_sensitivity: checkpoint.*{message}"):
            quantize.measure_sensitivity(model, batches, choices, method, checkpoint=path, progress=False, **more)
        assert path.read_bytes() == before

    others = "must be of this model, these batches and arguments; it is of others"
    refused(others, model=trained(Residual()))
    refused(others, batches=batches[::-1])
    refused(others, batches=batches[:1])
    refused(others, batches=[(x + 1, y) for x, y in batches])
    refused(others, batches=[(x, 3 - y) for x, y in batches])
    refused(others, choices=CHOICES[::-1])
    refused(others, method="clado")
    refused(others, metric="loss")
    refused(others, quantizer=quantize.PowerOfTwo, choices=[(3, None), (4, 4)])
    refused(others, groups={"g": "conv*"})
    refused(others, skip="fc")
    quantize.measure_sensitivity(model, batches, CHOICES, "diagonal", checkpoint=path, progress=False)
    assert not path.exists()


def test_damaged_files(half):
    model, batches, path = half
    good = path.read_bytes()
    for data, message in (
        (good[:100], "is damaged or no safetensors file"),
        (b"", "is damaged or no safetensors file"),
        (good + b"x", "is damaged or no safetensors file"),
        (good[:-3] + bytes([good[-3] ^ 1]) + good[-2:], "is damaged: its checksum is another"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"^measure_sensitivity: checkpoint: .*{message}"):
            quantize.measure_sensitivity(model, batches, CHOICES, "diagonal", checkpoint=path, progress=False)
        assert path.read_bytes() == data
    quantize.measure_sensitivity(model, batches, CHOICES, "diagonal", progress=False).save(path)
    with pytest.raises(ValueError, match="must be of format 'quantize.sensitivity_checkpoint/1'; found 'quantize.sensitivity/1'"):
        quantize.measure_sensitivity(model, batches, CHOICES, "diagonal", checkpoint=path, progress=False)


SCRIPT = """
import sys, torch, quantize
from sensitivity_models import Residual, images, trained
torch.manual_seed(0)
torch.set_num_threads(1)
model, batches, choices = trained(Residual()), images(4, 3), [(2, None), (4, 4)]
quantize.measure_sensitivity(model, batches, choices, "clado", "loss", checkpoint=sys.argv[1], progress=False).save(sys.argv[2])
"""


def test_another_process_goes_on(tmp_path):
    """It finds the same fingerprint: no addresses, no hashes of strings."""
    torch.manual_seed(0)
    model, batches, hook = trained(Residual()), images(4, 3), Stops()
    want = quantize.measure_sensitivity(model, batches, CHOICES, "clado", "loss", progress=False)
    hook.on(model.fc)
    hook.at = [25]
    with pytest.raises(KeyboardInterrupt):
        quantize.measure_sensitivity(model, batches, CHOICES, "clado", "loss", checkpoint=tmp_path / "c", progress=False)
    assert (tmp_path / "c").exists()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *(p for p in sys.path if p), os.getcwd()])}
    arguments = [sys.executable, "-c", SCRIPT, str(tmp_path / "c"), str(tmp_path / "s")]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(quantize.Sensitivity.load(tmp_path / "s").matrix, want.matrix) and not (tmp_path / "c").exists()


@pytest.mark.parametrize("method", survey.METHODS)
def test_progress(method, capsys, monkeypatch):
    bar, seen = survey.tqdm, []

    def at_once(*args, **more):
        seen.append(bar(*args, **{**more, "delay": 0, "mininterval": 0}))
        return seen[-1]

    monkeypatch.setattr(survey, "tqdm", at_once)
    model, batches = trained(Residual()), images(4, 3)
    quantize.measure_sensitivity(model, batches, CHOICES, method)
    out, err = capsys.readouterr()
    assert not out and "sensitivity" in err and "more" in err and "100 %" in err
    assert seen[0].n == pytest.approx(seen[0].total, rel=0.15)  # what was planned is what was done
    quantize.measure_sensitivity(model, batches, CHOICES, method, progress=False)
    assert capsys.readouterr() == ("", "")


def test_progress_in_a_log_is_whole_lines(capsys):
    model, batches = trained(Residual()), images(4, 3)
    quantize.measure_sensitivity(model, batches, CHOICES)  # over before a bar is due
    assert capsys.readouterr() == ("", "")
