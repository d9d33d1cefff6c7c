"""launch.sh: what it starts, skips and goes on with. Only the last test trains; the others have a stand-in for Python."""

import os
import re
import shlex
import signal
import subprocess
import sys

import options
import pytest
import torch
from small_runs import EXAMPLES, SMALL, environment


@pytest.fixture
def launch(stand_in):
    """Function running launch.sh with the stand-in: exit status, output, and the command lines that were started."""
    return lambda arguments="resnet20 digits 10 32 0.1 0", **variables: stand_in("launch.sh", arguments, **variables)


def workspaces(calls):
    return [re.search(r"--workspace \S*/(\S+)", call)[1] for call in calls]


def test_every_configuration_once(launch):
    status, output, calls = launch()
    assert (status, len(calls)) == (0, 3 * 5)
    names = ["fp32", "po2-3", "po2-4", "po2plus-3", "po2plus-4"]
    assert workspaces(calls) == [f"digits-resnet20-{name}-seed{seed}" for seed in (0, 1, 2) for name in names]
    shared = "train.py --arch resnet20 --dataset digits --batch-size 32 --seed 0 --epochs"
    assert f"{shared} 10 --lr 0.1 --device cpu" in calls[0]
    assert f"{shared} 2 --lr 0.01 --lr-warmup-epochs 0 --weights po2 --weight-bits 3 --init-from" in calls[1]
    assert "digits-resnet20-fp32-seed0/last.pt --device cpu" in calls[1]
    assert "evaluate.py --arch resnet20 --dataset digits" in output
    assert launch()[::2] == (0, [])


def test_environment(launch):
    _, _, calls = launch(SEEDS="7", BITS="2", QUANTIZERS="uniform", QAT_EPOCHS="4", QAT_LR="0.02", TRAIN_FLAGS="--weight-decay 5e-4")
    assert workspaces(calls) == ["digits-resnet20-fp32-seed7", "digits-resnet20-uniform-2-seed7"]
    assert "--epochs 4 --lr 0.02 " in calls[1] and all("--weight-decay 5e-4 --device" in call for call in calls)


def test_binary_networks(launch):
    _, output, calls = launch("resnet20_q digits 10 32 0.1 0", SEEDS="0", BITS="2 4", QUANTIZERS="xnor dorefa ternary")
    names = ["xnor-1-a1", "dorefa-2-a2", "dorefa-4-a4", "ternary-2"]
    assert workspaces(calls)[1:] == [f"digits-resnet20_q-{name}-seed0" for name in names]
    assert "--weights xnor --weight-bits 1 " in calls[1] and "--weights ternary --weight-bits 2 " in calls[4]
    for call in calls:  # the folder is the one that evaluate.py looks for
        flags = re.sub(r"--(workspace|init-from) \S+", "", call.split("train.py ")[1])
        assert options.parse(flags.split()).workspace.name == workspaces([call])[0]
    assert "--seeds 0 --quantizers xnor dorefa ternary --bits 2 4" in output


def test_flags_of_fine_tuning(launch):
    evaluate = pytest.importorskip("evaluate", reason="needs pandas")
    settings = {"SEEDS": "1", "BITS": "4", "QUANTIZERS": "po2 dorefa", "TRAIN_FLAGS": "--width=8 --weight-decay 5e-4 --limit-test 37"}
    _, output, calls = launch(**settings, QAT_FLAGS="--activation-bits 5 --float-layers conv1 stages.*")
    names = ["fp32", "po2-4-a5-float_conv1_stages.*", "dorefa-4-a5-float_conv1_stages.*"]
    assert workspaces(calls) == [f"digits-resnet20-{name}-seed1" for name in names]
    assert "--activation-bits" not in calls[0]
    for call in calls:  # the folders that evaluate.py looks for
        flags = re.sub(r"--(workspace|init-from) \S+", "", call.split("train.py ")[1])
        assert options.parse(flags.split()).workspace.name == workspaces([call])[0]
    args = evaluate.parse(shlex.split(output.split("evaluate.py ")[1]))
    assert (args.seeds, args.quantizers, args.bits, args.activation_bits) == ([1], ["po2", "dorefa"], [4], 5)
    assert (args.float_layers, args.width, args.limit_test) == (["conv1", "stages.*"], 8, 37)
    runs = [evaluate.run_of(args, quantizer, 4, 1, 10) for quantizer in ("none", "po2", "dorefa")]
    assert [run.workspace.name for run in runs] == workspaces(calls)


def test_torchrun(launch):
    _, _, calls = launch("resnet20 digits 10 32 0.1 2", SEEDS="0", BITS="4", QUANTIZERS="po2")
    assert all(call.startswith("-m torch.distributed.run --standalone --nproc-per-node=2 ") and "--device auto" in call for call in calls)


def test_failed_trainings_are_named_and_the_others_go_on(launch):
    status, output, calls = launch(SEEDS="0 1", FAIL="po2plus-3-seed0", STATUS="1")
    assert (status, len(calls)) == (1, 10) and "failed: digits-resnet20-po2plus-3-seed0" in output
    assert workspaces(launch(SEEDS="0 1")[2]) == ["digits-resnet20-po2plus-3-seed0"]


def test_nothing_is_fine_tuned_without_full_precision(launch):
    status, output, calls = launch(SEEDS="0 1", FAIL="fp32-seed0", STATUS="1")
    assert (status, len(calls)) == (1, 6) and "failed: digits-resnet20-fp32-seed0" in output


@pytest.mark.parametrize("code", ["2", "130", "143"])
def test_bad_flags_and_signals_end_it(launch, code):
    status, _, calls = launch(FAIL="po2-4", STATUS=code)
    assert (status, len(calls)) == (int(code), 3)


def test_unfinished_ones_are_resumed(launch, tmp_path):
    launch(SEEDS="0")
    folder = tmp_path / "runs" / "digits-resnet20-po2-4-seed0"
    (folder / "done").unlink()
    _, output, calls = launch(SEEDS="0")
    assert len(calls) == 1 and f"--resume {folder / 'last.pt'}" in calls[0]
    assert "== digits-resnet20-po2-4-seed0: goes on" in output and output.count(": done") == 4


def test_other_settings_are_not_mixed_in(launch):
    launch(SEEDS="0")
    status, output, calls = launch("resnet20 digits 10 32 0.2 0", SEEDS="0")
    assert (status, calls) == (2, [])
    assert "digits-resnet20-fp32-seed0 was begun with other settings" in output
    assert "there: --arch resnet20" in output and "--lr 0.2" in output.splitlines()[2]


def test_other_numbers_of_processes_are_not_mixed_in(launch):
    settings = {"SEEDS": "0", "QUANTIZERS": "po2", "BITS": "3"}
    launch(**settings)
    status, output, calls = launch("resnet20 digits 10 32 0.1 2", **(settings | {"BITS": "3 4"}))
    assert (status, calls) == (2, []) and "was begun with other settings" in output and "# 2 processes" in output.splitlines()[-1]
    assert launch("resnet20 digits 10 32 0.1 1", **settings)[::2] == (0, [])  # one process, too


def test_folders_of_others_are_left_alone(launch, tmp_path):
    folder = tmp_path / "runs" / "digits-resnet20-fp32-seed0"
    folder.mkdir(parents=True)
    (folder / "last.pt").touch()
    status, output, calls = launch(SEEDS="0")
    assert (status, calls) == (2, [])
    assert output == f"launch.sh: {folder} holds a training that was not begun by this script; move it or choose another WORKSPACE\n"


def test_workspaces_with_spaces(launch, tmp_path):
    zoo = pytest.importorskip("zoo", reason="needs pandas")
    runs = tmp_path / "sp ace"
    settings = {"WORKSPACE": str(runs), "SEEDS": "0", "QUANTIZERS": "po2", "BITS": "4"}
    assert len(launch(**settings)[2]) == 2
    options = zoo.run_of(runs / "digits-resnet20-po2-4-seed0" / "last.pt", None)
    assert options.init_from == runs / "digits-resnet20-fp32-seed0" / "last.pt" and options.data is None
    assert launch(**settings)[::2] == (0, [])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"QUANTIZERS": "po2 po3"}, "QUANTIZERS must be of po2, po2plus, uniform, lsq, ternary, xnor and dorefa; got 'po3'"),
        ({"QUANTIZERS": "diffq"}, "QUANTIZERS must be of"),
        ({"BITS": "3 4.5"}, "BITS must be a whole number; got '4.5'"),
        ({"BITS": "3 9"}, "BITS must be from 2 to 8 with po2; got '9'"),
        ({"QUANTIZERS": "dorefa", "BITS": "1 9"}, "BITS must be from 1 to 8 or 16 with dorefa; got '9'"),
        ({"SEEDS": "0 one"}, "SEEDS must be a whole number; got 'one'"),
    ],
)
def test_bad_variables_are_named_before_any_training(launch, variables, message):
    status, output, calls = launch(**variables)
    assert (status, calls) == (2, []) and message in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("resnet20 digits 10 32 0.1", "usage: launch.sh MODEL DATASET EPOCHS BATCH LR GPUS; got 5 arguments"),
        ("resnet20 digits ten 32 0.1 0", "EPOCHS must be a whole number; got 'ten'"),
        ("resnet20 digits 10 -1 0.1 0", "BATCH must be a whole number; got '-1'"),
        ("resnet20 digits 10 32 0.1 cpu", "GPUS must be a whole number; got 'cpu'"),
    ],
)
def test_bad_arguments_are_named(launch, arguments, message):
    status, output, calls = launch(arguments)
    assert (status, calls) == (2, []) and message in output


def test_interrupted_and_called_again(train, tmp_path):
    """Ctrl-C stops the script and not only the training under way; the second call ends where an uninterrupted run does."""
    flags = [*SMALL, "--epochs", "8"]
    variables = {"SEEDS": "0", "BITS": "4", "QUANTIZERS": "po2plus", "QAT_EPOCHS": "1", "PYTHON": sys.executable}
    variables |= {"WORKSPACE": str(tmp_path / "runs"), "TRAIN_FLAGS": "--width 4 --limit-train 80 --limit-test 37"}
    command, settings = [EXAMPLES / "launch.sh", *["resnet20", "digits", "8", "32", "0.05", "0"]], environment() | variables
    options = {"env": settings, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    # A shell's background jobs, and so perhaps these tests, ignore Ctrl-C; what a terminal starts does not.
    process = subprocess.Popen(command, **options, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to every process
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and "launch.sh: stopped" in errors and "continue with --resume" in output
    folders = [tmp_path / "runs" / f"digits-resnet20-{name}-seed0" for name in ("fp32", "po2plus-4")]
    assert not folders[1].exists() and not (folders[0] / "done").exists()
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "digits-resnet20-fp32-seed0: goes on" in done.stdout and all((folder / "done").exists() for folder in folders)
    _, whole, _ = train("whole", *flags)
    resumed = torch.load(folders[0] / "last.pt", weights_only=True)
    assert resumed["epoch"] == 8
    assert all(torch.equal(resumed["model"][name], value) for name, value in whole["model"].items())


def test_short_flags_are_no_values(stand_in):
    flags = {"SEEDS": "0", "BITS": "4", "QUANTIZERS": "po2", "TRAIN_FLAGS": "--data-path datasets -j 0"}
    status, output, calls = stand_in("launch.sh", "lenet digits 1 64 0.1 0", QAT_FLAGS="--activation-bits 4 -c quantize", **flags)
    assert status == 0, output
    assert "digits-lenet-po2-4-a4-seed0" in calls[-1]
    assert "-j" not in output.split("next:")[1]


def test_flags_that_evaluate_does_not_know(stand_in):
    status, output, calls = stand_in("launch.sh", "nin_q digits 1 64 0.1 0", QUANTIZERS="xnor", BITS="1", QAT_FLAGS="--rectify 0.99")
    assert (status, calls) == (2, [])
    assert "launch.sh: --rectify is for train.py, whose runs zoo.py compares" in output


def test_other_weights_to_begin_with_are_noticed(stand_in, tmp_path):
    flags = {"SEEDS": "0", "BITS": "4", "QUANTIZERS": "po2"}
    assert stand_in("launch.sh", "lenet digits 1 64 0.1 0", **flags)[0] == 0
    full = tmp_path / "runs" / "digits-lenet-fp32-seed0" / "last.pt"
    assert stand_in("launch.sh", "lenet digits 1 64 0.1 0", **flags)[0] == 0
    full.write_text("another model")
    status, output, calls = stand_in("launch.sh", "lenet digits 1 64 0.1 0", **flags)
    assert (status, calls) == (2, [])
    assert "digits-lenet-po2-4-seed0 began with other weights than --init-from now holds; delete it" in output
