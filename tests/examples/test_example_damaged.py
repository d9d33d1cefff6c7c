"""Checkpoints and logs of the right format that lack something or hold something else: named in a line, and nothing is lost."""

import pytest
import torch
import train as train_script
from small_runs import SMALL


@pytest.fixture
def last(train, tmp_path):
    """A checkpoint after one epoch of three."""
    train("run", "--gather-checkpoints")
    return (tmp_path / "run" / "epoch-0001.pt").rename(tmp_path / "first.pt")


def without(name):
    return lambda content: content.pop(name)


def changed(*path, to):
    def change(content):
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = to

    return change


DAMAGES = {
    **{f"no {name}": (without(name), f"to hold {name!r}; got none") for name in ("identity", "model", "ranks", "optimizer", "options")},
    "epoch": (changed("epoch", to="x"), "to hold 'epoch'; got 'x'"),
    "ranks": (changed("ranks", to=[3]), "to hold the state of each process as 'ranks'; got [3]"),
    "options": (changed("options", "epochs", to=None), "to hold 'epochs' among its 'options'; got None"),
    "weight": (lambda content: content["model"].pop("fc.bias"), 'holds weights that are not the model\'s: .*"fc.bias"'),
    "groups": (changed("optimizer", "param_groups", to=[]), "is damaged or of another run: ValueError: "),
    "random": (changed("ranks", 0, "random", to={}), "is damaged or of another run: KeyError: 'python'"),
    "totals": (changed("ranks", 0, "totals", to="x"), "is damaged or of another run: "),
}


def test_checkpoints(told, last, tmp_path):
    import re

    for number, (damage, message) in enumerate(DAMAGES.values()):
        content, file = torch.load(last, weights_only=True), tmp_path / f"{number}.pt"
        damage(content)
        torch.save(content, file)
        status, text = told(train_script, *SMALL, "--resume", file, "--workspace", tmp_path / "other")
        pattern = message if ".*" in message else re.escape(message)
        assert status == 2 and text.startswith("train.py: --resume: ") and str(file) in text and re.search(pattern, text), text
    assert not (tmp_path / "other").exists()


def test_weights_to_begin_with(told, last, tmp_path):
    content = torch.load(last, weights_only=True)
    del content["model"]["fc.bias"]
    torch.save(content, last)
    status, text = told(train_script, *SMALL, "--init-from", last, "--workspace", tmp_path / "other")
    assert status == 2 and text.startswith(f"train.py: --init-from: {last} holds weights that are not the model's: ")


def test_tables(told, last, tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    import evaluate
    import measure
    import zoo

    monkeypatch.setattr(measure, "RUNS", (1, 1))

    folder = tmp_path / "runs" / "digits-resnet20-fp32-seed0"
    folder.mkdir(parents=True)
    flags = ["--arch", "resnet20", "--dataset", "digits", "--width", "4", "--seeds", "0", "--skip-qat", "--bits", "4"]
    flags += ["--quantizers", "po2", "--workspace", str(tmp_path / "runs"), "--output", str(tmp_path / "results.csv")]
    for name in ("no identity", "no model", "epoch", "weight"):
        content = torch.load(last, weights_only=True) | {"epoch": 3}
        DAMAGES[name][0](content)
        torch.save(content, folder / "last.pt")
        status, text = told(evaluate, *flags)
        assert status == 1 and text.startswith("evaluate.py: --workspace: ") and str(folder / "last.pt") in text
    content = torch.load(last, weights_only=True) | {"epoch": 3}
    content["model"]["fc.bias"][0] = float("nan")
    torch.save(content, folder / "last.pt")
    status, text = told(evaluate, *flags, "--limit-test", "37")
    assert (status, text) == (1, f"evaluate.py: --workspace: {folder / 'last.pt'}: test loss must be finite; got nan")
    status, text = told(zoo, folder, "--output", tmp_path / "zoo.csv")
    assert (status, text) == (1, f"zoo.py: FOLDER: {folder / 'last.pt'}: test loss must be finite; got nan")
    assert not list(tmp_path.glob("*.csv"))


def test_weights_that_are_not_finite(told, last):
    content = torch.load(last, weights_only=True)
    content["model"]["fc.weight"][0, 0] = float("nan")
    torch.save(content, last)
    status, text = told(train_script, "--evaluate", "--resume", last, "--limit-test", "37", "--device", "cpu")
    torch.save(content | {"options": content["options"] | {"arch": "other"}}, last)
    assert told(train_script, "--evaluate", "--resume", last)[1].endswith(f"one of --arch's models; {last} is of 'other'")
    assert status == 1 and text.startswith(f"train.py: {last}: test loss nan ") and text.endswith("; fc.weight in it is not finite")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"noise", "expected a JSON object with epoch, seconds, test_top1 in line 1; got 'noise'"),
        (b"3", "in line 1; got '3'"),
        (b'{"epoch": "0", "seconds": 1, "test_top1": 1}', 'in line 1; got \'{"epoch": "0"'),
        (b'{"lr": 1}', "in line 1; got '{\"lr\": 1}'"),
        (b"\xff\xfe", "expected a file of JSON objects; got 'utf-8' codec"),
    ],
)
def test_logs(train, told, tmp_path, line, message):
    train("run", "--gather-checkpoints", "--weights", "po2")
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(line + b"\n" + log.read_bytes())
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}
    flags = [*SMALL, "--weights", "po2", "--workspace", tmp_path / "run"]
    status, text = told(train_script, *flags, "--resume", tmp_path / "run" / "epoch-0001.pt")
    assert status == 2 and text.startswith(f"train.py: log {log}: ") and message in text
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()} == before
    assert told(train_script, *flags, "--overwrite")[0] == 0
