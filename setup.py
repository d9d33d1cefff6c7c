"""Builds quantize._C: every csrc/**/*.cpp, and every csrc/**/*.cu where there is a CUDA toolkit. CONTRIBUTING.md has the recipes.

QUANTIZE_CUDA=auto|0|1    build the CUDA kernels if possible (default) | never | or fail and say what is missing
CUDA_HOME                 the toolkit; else nvcc on PATH decides, else /usr/local/cuda
TORCH_CUDA_ARCH_LIST      GPU architectures, default "8.0;9.0+PTX"
MAX_JOBS                  parallel compilations, default the number of processors
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = str(ROOT / "csrc")
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
MIN_TORCH = (2, 10)
X86 = platform.machine().lower() in {"x86_64", "amd64"}

CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]
if X86:
    # Whatever CFLAGS or the compiler's default say: only the files below may hold instructions that some x86-64 lacks.
    CXX_FLAGS += ["-march=x86-64", "-DQUANTIZE_X86"]
# The kernels: one object per ISA, chosen at run time (csrc/core/cpu_isa.h). They see no torch headers.
ISA_FLAGS = {"portable": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *ISA_FLAGS["avx2"]]
    # GCC before 13 warns of its own intrinsics (PR 105593).
    ISA_FLAGS["avx512"] += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    ISA_FLAGS["amx"] = ["-mamx-tile", "-mamx-int8", "-mavx512vnni", *ISA_FLAGS["avx512"]]
# Parts of an ISA that not all its machines have: files of their own, which ask cpu_isa.h before they run.
PARTS = ("avx512vnni", "avx512vpopcntdq")
PART_FLAGS = {part: [f"-m{part}", *ISA_FLAGS["avx512"]] for part in PARTS} if X86 else {}
# --fmad=false: the CUDA kernels return the CPU's bits.
NVCC_FLAGS = ["-O3", "-std=c++20", "--fmad=false", "--expt-relaxed-constexpr", "-DQUANTIZE_WITH_CUDA"]
NVCC_FLAGS += ["-Xcompiler=-fvisibility=hidden,-ffp-contract=off"]

NEEDS_TORCH = """quantize is compiled against the PyTorch that is installed, {problem}. Type:

    pip install torch
    pip install --no-build-isolation .
"""


def find_cuda_home():
    """The toolkit's folder or None. Not torch's own search: nvcc on PATH may be a wrapper script far from its toolkit."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return Path(named)
    nvcc = shutil.which("nvcc")
    for home in ([Path(nvcc).resolve().parent.parent] if nvcc else []) + [Path("/usr/local/cuda")]:
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def cuda_obstacle(torch, home):
    """Why the CUDA kernels cannot be built, or None."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is a CPU build (torch.version.cuda is None); install a CUDA build of PyTorch"
    if home is None or not (home / "bin/nvcc").exists():
        return f"no nvcc in {home / 'bin'}" if home else "no CUDA toolkit found; set CUDA_HOME to the folder that has bin/nvcc"
    answer = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", answer)
    if release is None:
        return f"{home / 'bin/nvcc'} --version names no release"
    if release[1] != torch.version.cuda.split(".")[0]:
        return f"the toolkit in {home} is CUDA {release[1]}.{release[2]} but PyTorch was built with CUDA {torch.version.cuda}"
    return None


def is_gcc():
    """Whether the C++ compiler is GCC."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    says = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout if shutil.which(compiler[0]) else ""
    return "Free Software Foundation" in says


def openmp_flags(torch):
    """at::parallel_for is a header that shares work out by OpenMP: compiled without it, kernels run on one thread. Nothing is linked: the
    runtime is the one PyTorch has loaded, since a second one would bring threads of its own. Clang's code would need another runtime."""
    return ["-fopenmp"] if is_gcc() and torch.backends.openmp.is_available() else []


def build_class(cxx_flags, module_flags, summary):
    from torch.utils.cpp_extension import BuildExtension, is_ninja_available

    class Build(BuildExtension):
        """Files with flags of their own are compiled first, a folder per kind; the rest of the extension links their objects."""

        def finalize_options(self):
            super().finalize_options()
            if self.inplace:  # pip install -e would compile in a temporary folder, and everything anew each time
                self.build_temp = str(ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")

        def run(self):
            print(summary, flush=True)
            super().run()

        def build_extension(self, ext):
            kinds = [(isa, f"_{isa}.cpp", cxx_flags + flags, [CSRC]) for isa, flags in {**ISA_FLAGS, **PART_FLAGS}.items()]
            # Only module.cpp knows versions and architectures, so that changing them does not recompile everything.
            kinds.append(("module", "module.cpp", cxx_flags + module_flags, ext.include_dirs))
            kinds.append(("cuda", ".cu", NVCC_FLAGS, ext.include_dirs))
            before = dict(vars(ext))
            try:
                for kind, suffix, flags, include_dirs in kinds:
                    own = [source for source in ext.sources if source.endswith(suffix)]
                    ext.sources = [source for source in ext.sources if source not in own]
                    if kind == "cuda":
                        own = self.joined(own)
                    if own:
                        ext.extra_objects = ext.extra_objects + self.compiler.compile(
                            own, output_dir=str(Path(self.build_temp, kind)), include_dirs=include_dirs, extra_postargs=flags
                        )
                if is_gcc() and is_ninja_available() and os.environ["MAX_JOBS"] in map(str, range(1, 9)):  # more jobs would wait for it
                    self.precompile_headers(ext)
                super().build_extension(ext)
            finally:
                vars(ext).update(before)

        def joined(self, sources):
            """One file for each job that includes its share of `sources`: nvcc takes 40 s for PyTorch's headers and 3 for kernels."""
            files = []
            for job in range(min(int(os.environ["MAX_JOBS"]), len(sources))):
                file = Path(self.build_temp, "cuda", f"kernels_{job}.cu")
                text = "".join(f'#include "{ROOT / source}"\n' for source in sources[job :: int(os.environ["MAX_JOBS"])])
                if not file.exists() or file.read_text() != text:  # its time decides whether it is compiled again
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(text)
                files.append(str(file))
            return files

        def precompile_headers(self, ext):
            """GCC reads PyTorch's headers once for all files: a quarter to 40 % of each one's time. Should it not like what it left, the
            header itself comes later on the path."""
            folder, header = Path(self.build_temp, "precompiled").resolve(), "core/torch_headers.h"  # ninja runs in another folder
            self.compiler.src_extensions.append(".h")
            [made] = self.compiler.compile(
                [str(Path("csrc", header))],
                output_dir=str(folder),
                include_dirs=ext.include_dirs,
                extra_preargs=["-x", "c++-header"],
                extra_postargs=ext.extra_compile_args,
            )
            found = folder / f"{header}.gch"
            if not (found.exists() and found.samefile(made)):  # a link: with the time that ninja compares
                found.parent.mkdir(exist_ok=True)
                found.unlink(missing_ok=True)
                try:
                    os.link(made, found)
                except OSError:  # not every file system has links
                    shutil.copy2(made, found)
            ext.include_dirs = [str(folder), *ext.include_dirs]
            # GCC forgets the pragma with which PyTorch's header silences that warning of its own.
            ext.extra_compile_args = [*ext.extra_compile_args, "-include", header, "-Winvalid-pch", "-Wno-sign-compare"]

    return Build


def defines(texts):
    """Macros that are strings. JSON spells these as C++ does: a folder's name may hold quotes and backslashes."""
    return [f"-DQUANTIZE_{name}={json.dumps(text, ensure_ascii=False)}" for name, text in texts.items()]


def configure():
    """The extension and the command that builds it."""
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    sources = [s for s in sources if X86 or not s.endswith(tuple(f"_{isa}.cpp" for isa in ("avx2", "avx512", "amx", *PARTS)))]
    headers = sorted(str(path.relative_to(ROOT)) for pattern in ("*.h", "*.cuh") for path in (ROOT / "csrc").rglob(pattern))
    try:
        import torch
    except ImportError:
        return Extension("quantize._C", sources), refuse("and none is")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        return Extension("quantize._C", sources), refuse(f"{MIN_TORCH[0]}.{MIN_TORCH[1]} or newer, and this one is {torch.__version__}")

    mode = os.environ.get("QUANTIZE_CUDA", "auto")
    if mode not in {"auto", "0", "1"}:
        sys.exit(f"QUANTIZE_CUDA must be auto, 0 or 1; got {mode!r}")
    home = find_cuda_home()
    obstacle = "QUANTIZE_CUDA=0" if mode == "0" else cuda_obstacle(torch, home)
    if mode == "1" and obstacle:
        sys.exit(f"QUANTIZE_CUDA=1, but {obstacle}.")
    with_cuda = obstacle is None
    if with_cuda:
        os.environ["CUDA_HOME"] = str(home)  # read by torch.utils.cpp_extension when it is imported
        # Without a GPU torch has no default.
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"
    os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))

    from torch.utils import cpp_extension

    archs = os.environ["TORCH_CUDA_ARCH_LIST"] if with_cuda else ""
    openmp = openmp_flags(torch)
    cxx_flags = CXX_FLAGS + openmp
    make = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    if with_cuda:
        sources += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cu"))
    extension = make(
        "quantize._C",
        sources,
        include_dirs=[CSRC],
        extra_compile_args=cxx_flags + ["-DQUANTIZE_WITH_CUDA"] if with_cuda else list(cxx_flags),
        extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
        depends=headers,
    )
    if with_cuda:
        # A bare toolkit lacks the cuSPARSE and cuBLAS headers that ATen's name; PyTorch's own wheels bring them. Last, so as not to
        # shadow the toolkit's.
        nvidia = Path(torch.__file__).parent.parent / "nvidia"
        extension.include_dirs += [str(folder) for folder in sorted(nvidia.glob("*/include"))]

    texts = {"VERSION": VERSION, "TORCH_VERSION": torch.__version__, "ISAS": " ".join(ISA_FLAGS)}
    texts |= {"CUDA_VERSION": torch.version.cuda, "CUDA_ARCHS": archs} if with_cuda else {"CUDA_REASON": obstacle}
    module_flags = defines(texts) + (["-DQUANTIZE_WITH_CUDA"] if with_cuda else [])
    summary = "\n".join(
        [
            f"quantize {VERSION}",
            f"  PyTorch  {torch.__version__}, C++11 ABI {'on' if torch.compiled_with_cxx11_abi() else 'off'}",
            f"  ISAs     {' '.join(ISA_FLAGS)}",
            f"  threads  {'OpenMP, as PyTorch' if openmp else 'one: only GCC and an OpenMP build of PyTorch share one pool'}",
            f"  CUDA     {f'{torch.version.cuda} with {home}, architectures {archs}' if with_cuda else f'no: {obstacle}'}",
            f"  jobs     {os.environ['MAX_JOBS']}, {'ninja' if cpp_extension.is_ninja_available() else 'without ninja: slow'}",
        ]
    )
    return extension, build_class(cxx_flags, module_flags, summary)


def refuse(problem):
    """A build_ext that explains itself, so that an sdist can still be made without PyTorch."""

    class Refuse(build_ext):
        def run(self):
            sys.exit(NEEDS_TORCH.format(problem=problem))

    return Refuse


def require_wheel_command():
    """A venv of Python 3.10 or 3.11 starts with a setuptools that cannot make wheels and does not say so."""
    try:
        Distribution().get_command_class("bdist_wheel")
    except Exception as error:
        sys.exit(f'setuptools {setuptools.__version__} cannot make wheels ({error}). Type:\n\n    pip install "setuptools>=77,<82"\n')


if {"bdist_wheel", "dist_info", "editable_wheel"} & set(sys.argv):
    require_wheel_command()
extension, command = configure()
# The license stands here because pyproject.toml's spelling of it changed with setuptools 77; older ones can build in place.
setup(license="Apache-2.0", ext_modules=[extension], cmdclass={"build_ext": command})
