"""What a finished training comes to: the report that train.py ends with, and `report.json` in its workspace.

Multiply-accumulates are of every layer, by the bits of their weight and their activation; the file, of low-bit weights, is the packed one
that is shipped. Both are of the model after the last epoch; nothing of the run changes.
"""

import contextlib
import json
import shutil
import time
from collections import Counter
from pathlib import Path

import quantize
import torch
from torch import Tensor, nn

import files
import learned_bits
import logs
from engine import Run
from models import create_model

REPORT, PACKED = "report.json", "model.safetensors"


def clear(workspace: Path, checkpoints: bool) -> None:
    """Remove what an earlier training has left there: nothing of it is of the one that goes on, or begins where there are `checkpoints`."""
    old = [workspace / "last.pt", workspace / "best.pt", *workspace.glob("epoch-*.pt")]
    for file in (workspace / REPORT, workspace / PACKED, *(old if checkpoints else ())):
        file.unlink(missing_ok=True)


def take_over(run: Run, resumed: Path) -> None:
    """Bring the files of the run that goes on from `resumed`, a checkpoint in another folder, into its own."""
    source, workspace = resumed.parent, run.args.workspace
    if source.resolve() == workspace.resolve():
        return
    taken = {logs.FILE: source / logs.FILE}
    with contextlib.suppress(Exception):  # there is none, or it is damaged
        if torch.load(source / "best.pt", map_location="cpu", weights_only=True, mmap=True)["best"] == run.best:
            taken["best.pt"] = source / "best.pt"
    taken["last.pt"] = resumed  # last: a run killed before it has not begun here
    for name, file in taken.items():
        if file.is_file():
            with files.replacing(workspace / name, to_disk=True) as temporary:
                shutil.copyfile(file, temporary)


def finish(run: Run, image: Tensor) -> dict:
    """Measure, print and write down. `image`: one image of the data set, on the run's device."""
    args = run.args
    entries = logs.read(args.workspace / logs.FILE)
    float_model = create_model(args.arch, args.num_classes, image.shape[1], args.width)
    numbers = {
        **complexity(run.model, image),
        "parameters": sum(parameter.numel() for parameter in float_model.parameters()),
        "best_top1": run.best if run.best >= 0 else None,
        "last_top1": entries[-1]["test_top1"] if entries else None,
        **pack(run.model, float_model, args.workspace / PACKED),
        "duration_seconds": sum(entry["seconds"] for entry in entries),
    }
    if run.bits is not None and args.target_size is not None:
        numbers["target_size"] = {"asked_mib": args.target_size, "reached_mib": learned_bits.numbers(run.model)["size_mib"]}
    files.write(args.workspace / REPORT, json.dumps(numbers, indent=1) + "\n")
    print(text(numbers))
    return numbers


def complexity(model: nn.Module, image: Tensor) -> dict:
    """Multiply-accumulates for `image`, in all and by bits, and bit operations: a multiply-accumulate's are the product of its bits."""
    try:
        summary, macs = quantize.summary(model, image), Counter()
    except ValueError as error:  # a training that diverged has a report, too
        return {"macs": None, "macs_by_bits": {}, "bit_ops": None, "not_counted": str(error)}
    # By their parameter: an average of learned bits may be whole.
    learned = {name.partition(".parametrizations.")[0] for name, _ in model.named_parameters() if name.endswith(".logits")}
    for row in summary.layers:
        weight = "learned" if row.name in learned else f"{row.weight_bits:g}"
        macs[f"{weight}x{row.activation_bits}"] += row.macs
    by_bits = {bits: count for bits, count in macs.most_common() if count}
    return {"macs": summary.macs, "macs_by_bits": by_bits, "bit_ops": summary.bit_ops}


def pack(model: nn.Module, float_model: nn.Module, file: Path) -> dict:
    """Save `model` packed and load it back into `float_model`: bytes and seconds, or why it is not packed."""
    numbers = {"file": str(file), "file_bytes": None, "float_bytes": None, "load_seconds": None, "not_packed": None}
    if not quantize.weight_bits(model):
        return numbers | {"file": None, "not_packed": "the weights are in full precision"}
    try:
        packed = quantize.convert(model)
        quantize.save(packed, file)
    except ValueError as error:
        return numbers | {"file": None, "not_packed": str(error)}
    began = time.perf_counter()
    quantize.load(float_model, file)
    seconds = time.perf_counter() - began
    size, float_size = file.stat().st_size, quantize.size_report(packed).float_bytes
    return numbers | {"file_bytes": size, "float_bytes": float_size, "load_seconds": seconds}


def text(numbers: dict) -> str:
    """The report, a line a number."""
    if numbers["macs"] is None:
        complexity = f"none: {numbers['not_counted']}"
    else:
        by_bits = ", ".join(f"{count / 1e6:,.2f} M at {bits}" for bits, count in numbers["macs_by_bits"].items())
        complexity = f"{numbers['macs'] / 1e6:,.2f} M multiply-accumulates: {by_bits} bits (weight x activation)"
        complexity += f"; {numbers['bit_ops'] / 1e9:,.3f} G bit operations"
    lines = {"complexity": complexity, "parameters": f"{numbers['parameters'] / 1e6:,.2f} M"}
    if numbers["best_top1"] is not None:
        last = "" if numbers["last_top1"] is None else f", after the last epoch {numbers['last_top1']:.2f} %"
        lines["best top-1"] = f"{numbers['best_top1']:.2f} %{last}"
    if numbers["not_packed"]:
        lines["file"] = f"none: {numbers['not_packed']}"
    else:
        lines["file"] = f"{numbers['file_bytes']:,} bytes, {numbers['file']} (the float model: {numbers['float_bytes']:,})"
        lines["load time"] = f"{1000 * numbers['load_seconds']:.1f} ms"
    if "target_size" in numbers:
        asked, reached = numbers["target_size"].values()
        far = "" if abs(reached - asked) <= 0.02 * asked else "; not reached: more epochs or a higher --bits-lr bring it nearer"
        lines["target size"] = f"{asked:.3f} MiB asked for, {reached:.3f} MiB reached, the file's header not counted{far}"
    lines["duration"] = f"{numbers['duration_seconds']:.1f} s"
    return "\n".join(f"{name:11} {value}" for name, value in lines.items())
