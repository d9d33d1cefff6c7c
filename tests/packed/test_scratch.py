"""What the kernels keep between calls: enough for small layers, not the images of a large batch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_binary_kernels import signs, weights

from quantize import _C

STATUS = Path("/proc/self/status")
MIB = 2**20


def resident():
    return int(re.search(r"VmRSS:\s+(\d+) kB", STATUS.read_text())[1]) * 1024


def measure():
    """Asserts on every ISA; the images of the batch are 13 MiB of words, 26 of nibbles or 106 of bytes."""
    x = torch.randint(256, (128, 112, 112, 8), dtype=torch.uint8)  # bits of 64 channels
    after = (None, None, False, *weights(signs(1, 64, 3, 3)), torch.ones(1), None, None, None, 64, [3, 3], [1, 1], [1, 1], [1, 1], 1)
    for isa in _C.supported_isas():
        _C.set_cpu_isa(isa)
        want = torch.cat([torch.ops.quantize.packed_binary_conv2d(part, *after) for part in x.split(4)])
        before = resident()
        assert torch.equal(torch.ops.quantize.packed_binary_conv2d(x, *after), want), isa
        assert resident() - before < 8 * MIB, (isa, (resident() - before) / MIB)


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")
def test_images_of_a_large_batch_are_given_back():
    # A process of its own, whose malloc gives large blocks back at once.
    folders = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB), "PYTHONPATH": folders}
    done = subprocess.run(
        [sys.executable, "-c", "import test_scratch; test_scratch.measure()"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
