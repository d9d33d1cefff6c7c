"""Exits 1 unless every kernel op has a CPU, a CUDA and a Meta implementation registered. Needs a CUDA build, but no GPU."""

import sys

from quantize.__main__ import kernel_ops

ops = kernel_ops()
missing = [f"{name}: no {key} kernel" for name, backends in ops.items() for key, there in backends.items() if not there]
print("\n".join(missing) or f"{len(ops)} kernel ops, each with CPU, CUDA and Meta implementations")
sys.exit(1 if missing or not ops else 0)
