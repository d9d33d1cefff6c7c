"""Where the example scripts lie (put on the path by importing this), and flags for runs of a second."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

# 3 epochs of 3 steps, the last one short, and a test of 37 images.
SMALL = ["--dataset", "digits", "--width", "4", "--limit-train", "80", "--limit-test", "37", "--batch-size", "32", "--epochs", "3"]
SMALL += ["--lr", "0.05", "--device", "cpu"]
# Compression flags that the tests of resuming go through: plain, fixed bits, and everything that adapts.
COMPRESSIONS = {
    "plain": ["-c", "fanin"],
    "fixed": ["-c", "quantize", "--ibits", "2"],
    "adaptive": ["-c", "quantize", "--usegradient"],
    "qlinear": ["-c", "qlinear", "--no-perlayer"],
}
