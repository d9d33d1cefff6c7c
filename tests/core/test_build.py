"""The build: what it refuses, what it says, and which instructions its objects hold."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantize import _C

ROOT = Path(__file__).resolve().parents[2]
in_checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def python(*arguments, cwd=ROOT, **env):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)


def test_build_info_is_of_this_pytorch():
    info = _C.build_info()
    assert info["torch"] == torch.__version__
    assert (info["cuda"] is None) == (info["cuda_reason"] is not None)


@pytest.mark.skipif(not _C.build_info()["compiler"].startswith("gcc"), reason="only GCC's OpenMP is PyTorch's")
def test_kernels_share_pytorchs_threads():
    # Two OpenMP runtimes in one process would each have threads of their own.
    assert _C.build_info()["threads"] == "OpenMP"
    script = "import torch, quantize; print(*{line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split()[-1]})"
    loaded = python("-c", script, PYTHONPATH=os.pathsep.join(sys.path)).stdout.split()
    assert len(loaded) == 1, loaded


@in_checkout
def test_version_is_pyprojects():
    assert f'version = "{_C.build_info()["version"]}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "amx"])
def test_isa_override(isa, tmp_path):
    result = python("-c", "import quantize; print(quantize._C.cpu_isa())", QUANTIZE_ISA=isa, PYTHONPATH=os.pathsep.join(sys.path))
    if isa in _C.supported_isas():
        assert result.stdout.strip() == isa
    else:
        assert f"ValueError: QUANTIZE_ISA must be an ISA this machine runs ({', '.join(_C.supported_isas())}); got {isa}" in result.stderr


def test_unknown_isa_is_refused_at_import():
    result = python("-c", "import quantize", QUANTIZE_ISA="sse9", PYTHONPATH=os.pathsep.join(sys.path))
    assert result.returncode == 1
    assert "ValueError: QUANTIZE_ISA must be one of portable, avx2, avx512, amx; got 'sse9'" in result.stderr


def test_set_cpu_isa(each_isa):
    assert _C.cpu_isa() == each_isa
    with pytest.raises(ValueError, match="set_cpu_isa: name must be one of portable, avx2, avx512, amx; got 'mmx'"):
        _C.set_cpu_isa("mmx")
    assert _C.cpu_isa() == each_isa


def test_diagnosis():
    result = python("-m", "quantize", PYTHONPATH=os.pathsep.join(sys.path))
    assert result.returncode == 0, result.stderr
    for said in (_C.build_info()["version"], torch.__version__, _C.cpu_isa(), "CUDA", "group_quantize"):
        assert said in result.stdout
    on_gpus = [line for line in result.stdout.splitlines() if re.search(r"  (yes|-) +yes +(yes|-)$", line)]
    assert bool(on_gpus) == (_C.build_info()["cuda"] is not None)  # what says that every CUDA kernel is missing lists none


@in_checkout
def test_without_pytorch_the_two_commands_are_named(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('hidden')")
    result = python("setup.py", "build_ext", "--build-temp", str(tmp_path), PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "    pip install torch\n    pip install --no-build-isolation .\n" in result.stderr


@in_checkout
def test_an_old_pytorch_is_refused(tmp_path):
    (tmp_path / "torch.py").write_text("__version__ = '2.9.1'")
    result = python("setup.py", "build_ext", "--build-temp", str(tmp_path), PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "2.10 or newer, and this one is 2.9.1" in result.stderr


@in_checkout
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("1", r"QUANTIZE_CUDA=1, but (no nvcc in .*nowhere/bin|PyTorch .* is a CPU build)"),
        ("yes", "QUANTIZE_CUDA must be auto, 0 or 1; got 'yes'"),
    ],
)
def test_cuda_that_cannot_be_built_fails_loudly(mode, message, tmp_path):
    result = python("setup.py", "build_ext", "--build-temp", str(tmp_path), QUANTIZE_CUDA=mode, CUDA_HOME=str(tmp_path / "nowhere"))
    assert result.returncode == 1
    assert re.search(message, result.stderr)


@in_checkout
def test_sdist_has_the_sources(tmp_path):
    result = python("setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path / "dist"))
    assert result.returncode == 0, result.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    shutil.unpack_archive(archive, tmp_path / "out")
    (tree,) = (tmp_path / "out").iterdir()
    sources = ("csrc/**/*.cpp", "csrc/**/*.h", "csrc/**/*.cu", "csrc/**/*.cuh", "quantize/**/*.py", "quantize/py.typed", "tests/**/*.py")
    for pattern in (*sources, "Makefile", ".clang-format", ".ci/*"):  # and what `make lint` and CI need
        want = {path.relative_to(ROOT) for path in ROOT.glob(pattern)}
        assert want == {path.relative_to(tree) for path in tree.glob(pattern)}, pattern


def objects(isa):
    """The objects of the build in place, by the folder that setup.py gives to each ISA."""
    found = sorted(ROOT.glob(f"build/temp.*/{isa}/**/*.o"))
    if not found or not shutil.which("objdump") or "portable" not in _C.build_info()["isas"][0]:
        pytest.skip("needs binutils and the objects of a build in place")
    return found


def run_on(tool, *flags, paths):
    return subprocess.run([tool, *flags, *map(str, paths)], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(("isa", "forbidden"), [("portable", r"%[yz]mm"), ("avx2", r"%zmm|%ymm(1[6-9]|2\d|3[01])|%k[0-7]\b")])
def test_objects_hold_only_their_isa(isa, forbidden):
    listing = run_on("objdump", "-d", "--no-show-raw-insn", paths=objects(isa))
    offenders = [line for line in listing.splitlines() if re.search(forbidden, line)]
    assert not offenders, offenders[:3]


@pytest.mark.parametrize("isa", ["avx2", "avx512", "amx"])
def test_isa_objects_share_no_inline_functions(isa):
    # The linker keeps one copy of an inline function or template for the whole library: if it keeps the AVX one, a machine without
    # AVX crashes in code that never asked for it. So such objects may define no weak symbols.
    weak = [line for line in run_on("nm", "-C", paths=objects(isa)).splitlines() if re.search(r" [WVu] ", line)]
    assert not weak, weak[:3]


@in_checkout
def test_gpu_check_goes_on_after_failures(tmp_path):
    """The machine may be there this one time: tests that fail take no benchmark with them, nor does a benchmark the next one."""
    log, failing = tmp_path / "log", tmp_path / "python"
    failing.write_text(f'#!/bin/sh\necho "$*" >> {log}\ncase "$*" in *setup.py*) ;; *) exit 1 ;; esac\n')
    failing.chmod(0o755)
    done = subprocess.run(["make", "-s", "gpu-check", f"PYTHON={failing}", f"OUT={tmp_path}"], cwd=ROOT, capture_output=True)
    ran = log.read_text()
    assert done.returncode != 0 and "pytest" in ran
    assert all(f"{script.name} --output {tmp_path}" in ran for script in ROOT.glob("benchmarks/gpu_*.py"))


@pytest.mark.skipif(_C.build_info()["cuda"] is not None, reason="this build has CUDA")
def test_a_build_without_cuda_that_is_asked_for_it_names_the_command():
    asked = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)  # what a CUDA tensor would bring
    x = torch.randn(2, 8)
    for op, arguments in (("group_variance", (x, 4)), ("pack_mask", (x > 0,)), ("round_power_of_two", (x, False))):
        message = f"quantize::{op}: tensors must be on the CPU, .* no CUDA kernels; .* QUANTIZE_CUDA=1 pip install"
        with pytest.raises(NotImplementedError, match=message):
            getattr(torch.ops.quantize, op).default.redispatch(asked, *arguments)
