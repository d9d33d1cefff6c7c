"""zoo.sh and its table. Only the first test trains; the others have a stand-in for Python, or checkpoints without a training."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import EXAMPLES, environment

pandas = pytest.importorskip("pandas")
pytest.importorskip("safetensors")
NUMBERS = {"epoch": 1, "epochs": 1, "skipped_steps": 0}


def test_table(tmp_path):
    """Two models; a second call trains and measures nothing and prints the same table."""
    variables = {"PYTHON": sys.executable, "WORKSPACE": str(tmp_path / "runs"), "GROUP_SIZES": "8", "BITS_FLAGS": "--bits-lr 0.3"}
    variables |= {"TRAIN_FLAGS": "--width 4 --limit-train 80 --limit-test 37"}
    command = [EXAMPLES / "zoo.sh", *["digits", "1", "32", "0.05", "5", "lenet", "resnet20"]]
    first, second = (subprocess.run(command, env=environment() | variables, capture_output=True, text=True, timeout=300) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout.count("epoch 1/1") == 2 and second.stdout.count(": done\n") == 2
    tables = [[line for line in done.stdout.splitlines() if not line.startswith("==")][-3:] for done in (first, second)]
    assert tables[0] == tables[1] and tables[0][0].split()[:4] == ["arch", "dataset", "config", "seed"]
    rows = pandas.read_csv(tmp_path / "runs" / "zoo.csv")
    assert list(rows.arch) == ["lenet", "resnet20"] and set(rows.config) == {"diffq-g8-p5"}
    assert all((rows[name] == value).all() for name, value in NUMBERS.items())
    assert (rows.top1 >= 0).all() and rows.average_bits.between(2, 8).all()
    assert (rows.compression > 2).all() and (rows.compression < 32 / rows.average_bits).all()
    assert (rows[[name for name in rows if name.endswith("_ms")]] > 0).all(axis=None)


@pytest.fixture
def zoo_sh(stand_in):
    return lambda arguments="digits 10 32 0.1 5", **variables: stand_in("zoo.sh", arguments, **variables)


def test_every_model_and_group_size_once(zoo_sh, tmp_path):
    status, output, calls = zoo_sh()
    assert (status, len(calls)) == (0, 11 * 3 + 1)
    name = r"digits-(\w+)-diffq-g(\d+)-p5-seed0"
    found = [re.search(rf"--workspace \S*/{name}", call).groups() for call in calls[:-1]]
    assert len(set(found)) == 33 and [size for _, size in found[:3]] == ["4", "8", "16"]
    assert {arch for arch, _ in found} <= set(__import__("models").ARCHITECTURES)
    shared = "train.py --arch wide_resnet --dataset digits --epochs 10 --batch-size 32 --lr 0.1 --seed 0"
    assert f"{shared} --weights diffq --group-size 4 --penalty 5 --device cpu" in calls[0]
    assert f"zoo.py --output {tmp_path}/runs/zoo.csv {tmp_path}/runs/digits-wide_resnet-diffq-g4-p5-seed0 " in calls[-1]
    again = zoo_sh()[2]
    assert len(again) == 1 and again[0] == calls[-1]


def test_environment(zoo_sh):
    variables = {"SEEDS": "3", "GROUP_SIZES": "16", "BASELINE": "1", "BITS_FLAGS": "--bits-lr 1e-3", "TRAIN_FLAGS": "--amp fp16"}
    _, _, calls = zoo_sh("digits 10 32 0.1 5 lenet", GPUS="2", OUTPUT="table.csv", **variables)
    assert len(calls) == 3 and all(call.startswith("-m torch.distributed.run --standalone --nproc-per-node=2 ") for call in calls[:2])
    assert "--seed 3 --amp fp16 --device auto" in calls[0] and "--penalty 5 --bits-lr 1e-3 --amp fp16 --device auto" in calls[1]
    assert "--output table.csv" in calls[2] and calls[2].endswith("digits-lenet-diffq-g16-p5-seed3")


def test_failed_trainings_are_in_the_table(zoo_sh):
    status, output, calls = zoo_sh("digits 10 32 0.1 5 lenet", FAIL="diffq-g8-p5-seed0 --workspace", STATUS="1")
    assert (status, len(calls)) == (0, 4)
    status, output, calls = zoo_sh("digits 10 32 0.1 5 senet", FAIL="--group-size 8", STATUS="1")
    assert (status, len(calls)) == (1, 4) and "zoo.sh: failed: digits-senet-diffq-g8-p5-seed0" in output
    assert "digits-senet-diffq-g8-p5-seed0" in calls[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("digits 10 32 0.1", "usage: zoo.sh DATASET EPOCHS BATCH LR PENALTY [ARCHS...]; got 4 arguments"),
        ("digits ten 32 0.1 5", "zoo.sh: EPOCHS must be a whole number; got 'ten'"),
    ],
)
def test_bad_arguments_are_named(zoo_sh, arguments, message):
    status, output, calls = zoo_sh(arguments)
    assert (status, calls) == (2, []) and message in output


def test_broken_off_and_missing(train, tmp_path, capsys):
    """A training that broke off is measured at its last checkpoint, one without a checkpoint is named; full precision has its row."""
    import zoo

    flags = "--arch lenet --dataset digits --width 4 --limit-train 80 --limit-test 37 --batch-size 32 --lr 0.05"
    for name, epochs, more in (("fp32", 1, ""), ("bits", 3, "--weights diffq --bits-lr 0.3"), ("lsq", 1, "--weights lsq")):
        train(name, *flags.split(), *more.split(), "--epochs", "1")
        (tmp_path / name / "flags").write_text(f"{flags} {more} --epochs {epochs}\n")
    (tmp_path / "none").mkdir()
    capsys.readouterr()
    folders = [str(tmp_path / name) for name in ("fp32", "bits", "lsq", "none")]
    assert zoo.main([*folders, "--output", str(tmp_path / "zoo.csv")]) == 1
    output, errors = capsys.readouterr()
    rows = pandas.read_csv(tmp_path / "zoo.csv").set_index("config")
    assert len(output.splitlines()) == 4 and rows.epoch.tolist() == [1, 1, 1] and rows.epochs["diffq-g8-p5"] == 3
    assert rows.average_bits[["fp32", "lsq-4"]].tolist() == [32, 4] and rows.compression["fp32"] == 1
    assert f"zoo.py: FOLDER: expected a training's last.pt in {tmp_path / 'none'}; there is none" in errors


def test_folders_of_train_py(train, tmp_path, capsys):
    """Without a file of flags the checkpoint says what it is; trainings of the same model in other folders have rows of their own."""
    import zoo

    flags = ["--arch", "resnet20_q", "--weights", "xnor", "--reestimate-bn", "1", "--epochs", "1"]
    logs = [train(name, *flags, "--lr", rate)[2] for name, rate in (("a", "0.05"), ("b", "0.01"))]
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "last.pt").write_text("no checkpoint")
    call = [*(str(tmp_path / name) for name in ("a", "b", "damaged")), "--output", str(tmp_path / "zoo.csv")]
    (tmp_path / "bad flags").mkdir()
    (tmp_path / "bad flags" / "last.pt").write_text("nothing is read of it")
    (tmp_path / "bad flags" / "flags").write_text("--weights po2 --weight-bits 99")
    call.insert(0, str(tmp_path / "bad flags"))
    for _ in range(2):
        assert zoo.main(call) == 1
        rows = pandas.read_csv(tmp_path / "zoo.csv")
        assert [Path(file).parent.name for file in rows.checkpoint] == ["a", "b"]
        assert set(rows.config) == {"xnor-1-a1"} and set(rows.width) == {4} and rows.average_bits.tolist() == [1, 1]
        assert rows.top1.tolist() == pytest.approx([log[0]["test_top1"] for log in logs])
        errors = capsys.readouterr().err
        assert f"{tmp_path / 'damaged' / 'last.pt'} is damaged" in errors
        assert f"zoo.py: FOLDER: expected {tmp_path / 'bad flags' / 'flags'} to hold flags of train.py" in errors
