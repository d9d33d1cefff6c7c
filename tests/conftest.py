"""Fixtures and skips that every room shares."""

import importlib.util

import pytest
import torch

from quantize import _C


@pytest.fixture(autouse=True)
def quiet():
    """One thread, which is what small tensors run fastest on, and the same random numbers for every test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=_C.supported_isas())
def each_isa(request):
    """Runs the test once for every ISA of this machine; its value is the name."""
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


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
