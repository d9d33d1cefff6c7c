"""Fixtures and skips that every room shares."""

import gc
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from quantize import _C


@pytest.fixture(autouse=True)
def quiet():
    """One thread, which is what small tensors run fastest on; the same random numbers, and nothing compiled yet, for every test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # functions that many tests compile would reach the limit of recompilations
        torch._dynamo.reset()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def exact_products(request):
    """On a GPU libraries multiply float32 as it is, not rounded to TensorFloat-32, which convolutions take unless they are told."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=_C.supported_isas())
def each_isa(request):
    """Runs the test once for every ISA of this machine; its value is the name."""
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def on_device(request):
    """Runs the test on the CPU and on a GPU; its value is a function that puts an op's arguments there. Integers of 64 bits, which are
    seeds, stay."""

    def move(value):
        return value.to(request.param) if isinstance(value, torch.Tensor) and value.dtype != torch.int64 else value

    return lambda arguments: [move(value) for value in arguments]


@pytest.fixture(scope="session")
def gloo(tmp_path_factory):
    """Function running `python SCRIPT RANK WORLD FILE FOLDER` in `world` processes, FILE being their rendezvous; returns the folder."""

    def run(script, world=2):
        folder = tmp_path_factory.mktemp("gloo")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([p for p in sys.path if p] + [str(Path.cwd())])}
        commands = [[sys.executable, script, str(rank), str(world), str(folder / "rendezvous"), str(folder)] for rank in range(world)]
        how = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running = [subprocess.Popen(command, **how) for command in commands]
        try:
            outputs = [process.communicate(timeout=240)[0] for process in running]
        finally:
            for process in running:
                process.kill()
        assert not any(process.returncode for process in running), "\n".join(outputs)
        return folder

    return run


@pytest.fixture
def process_group(tmp_path):
    """torch.distributed with gloo and this process alone. What a test wraps goes before the group: a group that ends with the last
    DistributedDataParallel holds the GIL while it waits for threads that may need it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    gc.collect()
    dist.destroy_process_group()


def _why_no_gpu():
    if not torch.cuda.is_available():
        return "needs a GPU; PyTorch sees none here"
    if _C.build_info()["cuda"] is None:
        return f"needs a CUDA build; {_C.build_info()['cuda_reason']}"
    return None


def _why_no_third_party():
    missing = [name for name in ("torchvision", "timm") if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(missing)}; the CUDA stage of .ci/run installs them" if missing else None


def pytest_collection_modifyitems(items):
    reasons = {"gpu": _why_no_gpu(), "third_party": _why_no_third_party()}
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
