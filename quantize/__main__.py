"""`python -m quantize`: what was built, what runs here, and what is missing and why. `python -m quantize inspect FILE`: a saved model."""

import argparse
import os
import sys

import torch

import quantize
from quantize import _C
from quantize.packed.inspect_file import inspect_file

BUILD = "pip install --no-build-isolation ."


def kernel_ops():
    """{op: {"CPU": bool, "CUDA": bool, "Meta": bool}} for every op that has kernels of its own, composite ops left out.

    What a build without CUDA registers for it is made of PyTorch's ops and ours, and ours are not there.
    """
    has, cuda = torch._C._dispatch_has_kernel_for_dispatch_key, _C.build_info()["cuda"] is not None
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("quantize::"))
    composite = ("CompositeImplicitAutograd", "CompositeExplicitAutograd")
    return {
        name: {key: has(name, key) and (cuda or key != "CUDA") for key in ("CPU", "CUDA", "Meta")}
        for name in names
        if not any(has(name, key) for key in composite)
    }


def _isa_rows(info):
    forced = os.environ.get("QUANTIZE_ISA")
    rows = [("ISA", f"{_C.cpu_isa()}, {f'forced by QUANTIZE_ISA={forced}' if forced else 'the best this machine runs'}")]
    rows.append(("", f"runs here: {', '.join(_C.supported_isas())}; built: {', '.join(info['isas'])}"))
    return rows


def _cuda_rows(info):
    if info["cuda"] is None:
        yield "CUDA", f"not built: {info['cuda_reason']}"
        yield "", f"to build it: CUDA_HOME=<the toolkit> QUANTIZE_CUDA=1 {BUILD}"
    else:
        yield "CUDA", f"built with {info['cuda']} for {info['cuda_archs']}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            yield "", f"device {index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    else:
        yield "", "device: none that PyTorch can use here"


def _op_rows(info):
    ops = kernel_ops()
    yield "kernels", f"{len(ops)} ops{'':<26} CPU  CUDA  Meta"
    for name, backends in ops.items():
        marks = "  ".join(("yes" if there else "-").rjust(width) for there, width in zip(backends.values(), (3, 4, 4), strict=True))
        yield "", f"{name.removeprefix('quantize::'):<33} {marks}"
    without = [name for name, backends in ops.items() if not backends["CUDA"]]
    if info["cuda"] is None:
        yield "missing", "every CUDA kernel, because CUDA was not built (above)"
    elif without:
        yield "missing", f"CUDA kernels of {', '.join(without)}, although CUDA was built: please report it"
    else:
        yield "missing", "nothing"


def report():
    """The table as text."""
    info = _C.build_info()
    same = info["torch"] == torch.__version__
    rows = [
        ("quantize", f"{info['version']}, {os.path.dirname(quantize.__file__)}"),
        ("PyTorch", f"{torch.__version__}, {'as built' if same else 'BUILT AGAINST ' + info['torch'] + ': rebuild with ' + BUILD}"),
        ("compiler", info["compiler"]),
        ("threads", f"{torch.get_num_threads()}, PyTorch's" if info["threads"] == "OpenMP" else "one: built without OpenMP"),
        *_isa_rows(info),
        *_cuda_rows(info),
        *_op_rows(info),
    ]
    return "\n".join(f"{key:<10}{value}".rstrip() for key, value in rows)


def main(arguments=None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m quantize", description="Without a command: what was built, and what is missing and why."
    )
    commands = parser.add_subparsers(dest="command")
    inspect = commands.add_parser("inspect", help="layers, bits, shapes and bytes of a file by quantize.save")
    inspect.add_argument("file")
    options = parser.parse_args(arguments)
    if options.command is None:
        print(report())
        return 0
    try:
        print(inspect_file(options.file))
    except OSError as error:
        print(f"inspect: {error.filename}: {error.strerror}" if error.strerror else error, file=sys.stderr)
        return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
