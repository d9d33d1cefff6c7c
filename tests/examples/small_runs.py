"""Where the example scripts lie (put on the path by importing this), and flags for runs of a second."""

import os
import subprocess
import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

# 3 epochs of 3 steps, the last one short, and a test of 37 images.
SMALL = ["--dataset", "digits", "--width", "4", "--limit-train", "80", "--limit-test", "37", "--batch-size", "32", "--epochs", "3"]
SMALL += ["--lr", "0.05", "--device", "cpu"]
# Flags that the tests of resuming go through: plain, fixed bits, everything that adapts, low-bit weights, and these with compression.
COMPRESSIONS = {
    "plain": ["-c", "fanin"],
    "fixed": ["-c", "quantize", "--ibits", "2"],
    "adaptive": ["-c", "quantize", "--usegradient"],
    "qlinear": ["-c", "qlinear", "--no-perlayer"],
    "po2plus": ["--weights", "po2plus"],
    "diffq": ["--arch", "lenet", "--weights", "diffq", "--bits-lr", "0.3", "--amp", "fp16", "--clip-grad-norm", "1"],
    "diffq-same": ["--arch", "lenet", "--weights", "diffq", "--bits-lr", "1e4", "--bits-optimizer", "same"],
    "xnor": ["--arch", "resnet20_q", "--weights", "xnor", "--reestimate-bn", "1"],
    "dorefa": ["--arch", "resnet20_q", "--weights", "dorefa", "--gradient-bits", "6", "-c", "quantize"],
    "both": ["--weights", "po2", "--weight-bits", "3", "--weight-activation-bits", "4", "-c", "quantize"],
}


def environment():
    """Of a script in a process of its own: one thread, and the package under test, installed or not."""
    import quantize

    path = os.pathsep.join([str(EXAMPLES), str(Path(quantize.__file__).parents[1])])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def torchrun(*flags):
    """What two_processes.py prints when it trains in two processes with the SMALL and these flags."""
    script = Path(__file__).with_name("two_processes.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    done = subprocess.run([*launch, *SMALL, *flags], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


TIMES = {"seconds", "step_ms", "peak_mib"}


def numbers(log):
    """Entries of a log without what a clock or the machine decides."""
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in log]


def assert_same(left, right, where="checkpoint"):
    """Bitwise equality of two checkpoints, naming the first place that differs."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert list(left) == list(right), where
        for key in left:
            assert_same(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(left, torch.Tensor):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}")
    else:
        assert left == right, where
