"""What a measurement was taken on. Every file in results/ carries this."""

import datetime
import os
import platform
from pathlib import Path

import torch

# Instruction sets that decide which kernels run.
ISA_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "bmi2",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_vpopcntdq",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
)


def describe() -> dict:
    """CPU, its instruction sets, cores and memory, GPU, versions and the date, in types that JSON holds."""
    info = _cpuinfo()
    flags = set(info.get("flags", "").split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in ISA_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "quantize": _quantize_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def _cpuinfo():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    info = {}
    for name, value in pairs:
        info.setdefault(name.strip(), value.strip())
    return info


def _memory_gib():
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _quantize_version():
    try:
        from importlib.metadata import version

        return version("quantize")
    except ImportError:
        return None


if __name__ == "__main__":
    for name, value in describe().items():
        print(f"{name:10} {value}")
