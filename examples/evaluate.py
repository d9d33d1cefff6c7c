#!/usr/bin/env python3
"""Accuracy, size and speed of what launch.sh trained: full precision, post-training quantization (PTQ) and fine-tuned (QAT), all seeds.

    python examples/evaluate.py --arch resnet20 --dataset mnist5k
    python examples/evaluate.py --arch resnet20 --dataset mnist5k --skip-qat --bits 2 3 4 --seeds 0
    python examples/evaluate.py --arch resnet20_q --dataset mnist5k --quantizers xnor dorefa --bits 1 2

Quantized models are packed, saved and loaded back: accuracy and latency are the loaded model's, bytes the file's. Every row goes into the
CSV at once; a second call computes only what is missing or whose checkpoint has changed. Exit status 1: a checkpoint is missing or bad.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import torch

import checkpoint
import data
import options
import weights
from measure import Bench
from models import ARCHITECTURES, default_width
from rows import KEY, Rows
from said import blaming, line, said


def main(argv: list[str] | None = None) -> int:
    """Evaluate as `argv` says; 0, or 1 if checkpoints are missing or bad."""
    args = parse(argv)
    rows = Rows(args.output)
    parts = data.load(args.dataset, args.data_path, args.image_size)
    bench = Bench(*parts, args.batch_size, args.limit_test, args.batches, args.device)
    keys, problems = [], {}
    for seed in args.seeds:
        for method, quantizer, bits in plan(args):
            run = run_of(args, quantizer, bits, seed, parts[0].classes)
            key = key_of(run, method, quantizer, bits)
            file = checkpoint_of(args, run, method)
            keys.append(key)
            try:
                fingerprint = fingerprint_of(file, args)
                if rows.has(key, fingerprint):
                    continue
                try:
                    content = read(file, run, method)
                except ValueError:
                    rows.drop(key, str(file))  # of a mistaken call another file's row stays
                    raise
                source = {"checkpoint": str(file), "fingerprint": fingerprint}
                with blaming(f"--workspace: {file}", ValueError):
                    measured = bench.measure(method, run, content)
                rows.add(dict(zip(KEY, key, strict=True)) | measured | source)
            except (OSError, ValueError) as error:
                problems[str(error)] = None
                continue
            print(f"{file.parent.name}, {method} {quantizer} {bits}: top-1 {rows.rows[key]['top1']:.2f} %", flush=True)
    print(rows.summary(list(dict.fromkeys(keys))))
    for problem in problems:
        print(f"evaluate.py: {line(problem)}", file=sys.stderr)
    return 1 if problems else 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of `argv`, checked."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("evaluate.py", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--arch", choices=ARCHITECTURES, required=True, help="model")
    add("--dataset", choices=data.DATASETS, required=True, help="data set")
    add("--workspace", type=Path, default=Path("runs"), help="folder in which launch.sh trained (default: runs)")
    add("--output", type=Path, default=Path("results.csv"), help="CSV to fill; other models' rows in it stay (default: results.csv)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    text = "xnor and dorefa are fine-tuned only (default: po2 po2plus)"
    add("--quantizers", choices=weights.GIVEN, nargs="+", default=["po2", "po2plus"], help=text)
    add("--bits", type=int, nargs="+", default=[3, 4], help="bits of a weight (default: 3 4); xnor always has 1, ternary 2")
    text = "bits of the layers' inputs, which PTQ calibrates; 32: not quantized (default: 32; xnor, dorefa: as many as a weight's)"
    add("--activation-bits", "--weight-activation-bits", type=int, metavar="A", help=text)
    add("--float-layers", nargs="+", metavar="GLOB", help="layers left in full precision, as in training")
    add("--skip-qat", action="store_true", help="full precision and PTQ only")
    add("--reestimate-bn", action="store_true", help="before the PTQ test, take batch norm statistics anew: method ptq+bn, not ptq")
    add("--batches", type=int, default=10, help="training batches for calibration and --reestimate-bn (default: 10)")
    add("--batch-size", type=int, default=128, help="of the test and of these batches (default: 128)")
    add("--width", type=int, help="channels of the model's first stage, as in training")
    add("--num-classes", type=int, help="outputs of the model, as in training (default: the data set's number of classes)")
    add("--data-path", type=Path, default=Path("datasets"), help="folder the data set lies in (default: datasets)")
    add("--image-size", type=int, default=224, help="side of an ImageNet image after cropping (default: 224)")
    add("--limit-test", type=int, metavar="N", help="test on N images only")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of the accuracy test; latency is one CPU thread's (default: cpu)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU; use --device cpu")
    for name in ("batches", "batch_size", "image_size", "width", "num_classes", "limit_test"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {getattr(args, name)}")
    for quantizer in args.quantizers:
        inputs = [] if args.activation_bits in (None, 32) else [args.activation_bits]
        _check_bits("--bits", bits_of(args, quantizer), weights.WEIGHT_BITS[quantizer], quantizer, parser.error)
        _check_bits("--activation-bits", inputs, weights.ACTIVATION_BITS.get(quantizer, weights.BITS), quantizer, parser.error)
    return args


def _check_bits(flag: str, asked: list[int], choices: tuple[int, ...], quantizer: str, error) -> None:
    if not set(asked) <= set(choices):
        where = "" if set(choices) == set(weights.BITS) else f" with --quantizers {quantizer}"
        error(f"{flag} must be {weights.span(choices)}{where}; got {' '.join(map(str, asked))}")


def bits_of(args, quantizer: str) -> list[int]:
    """Bits of a weight: `--bits`, but where a quantizer has no choice."""
    choices = weights.WEIGHT_BITS[quantizer]
    return list(choices) if len(choices) == 1 else args.bits


def plan(args) -> list[tuple[str, str, int]]:
    """(method, quantizer, bits) of every row of a seed. Networks of few bits are trained with them: their PTQ would be chance."""
    ptq = [("ptq+bn" if args.reestimate_bn else "ptq", quantizer) for quantizer in args.quantizers if quantizer in weights.QUANTIZERS]
    qat = [("qat", quantizer) for quantizer in args.quantizers if not args.skip_qat]
    return [("fp32", "none", 32), *((method, quantizer, bits) for method, quantizer in ptq + qat for bits in bits_of(args, quantizer))]


def run_of(args, quantizer: str, bits: int, seed: int, classes: int) -> argparse.Namespace:
    """train.py's options for the configuration."""
    flags = ["--arch", args.arch, "--dataset", args.dataset, "--seed", str(seed), "--num-classes", str(args.num_classes or classes)]
    flags += ["--width", str(args.width or default_width(args.arch))]
    if quantizer != "none":
        flags += ["--weights", quantizer, "--weight-bits", str(bits)]
        flags += ["--activation-bits", str(args.activation_bits)] if args.activation_bits else []
        flags += ["--float-layers", *args.float_layers] if args.float_layers else []
    return options.parse(flags)


def key_of(run: argparse.Namespace, method: str, quantizer: str, bits: int) -> tuple:
    """The row's key; `float_layers` is `default` where they are the quantizer's own choice."""
    float_layers = "default" if run.float_layers is None else " ".join(run.float_layers) or "none"
    return (run.arch, run.width, run.dataset, method, quantizer, bits, run.activation_bits or 32, float_layers, run.seed)


def checkpoint_of(args, run: argparse.Namespace, method: str) -> Path:
    """Where launch.sh left the model that the row begins with: after its last epoch, which no test set has chosen."""
    folder = run.workspace.name if method == "qat" else f"{run.dataset}-{run.arch}-fp32-seed{run.seed}"
    return args.workspace / folder / "last.pt"


def fingerprint_of(file: Path, args) -> str:
    """A hash of the checkpoint's content and of the options that decide about its rows; FileNotFoundError if there is none."""
    if not file.is_file():
        raise FileNotFoundError(f"--workspace: expected a checkpoint file; there is none at {file}")
    decisive = (args.limit_test, args.batches, args.batch_size, args.image_size)
    return hashlib.sha256(repr(decisive).encode() + file.read_bytes()).hexdigest()[:16]


def read(file: Path, run: argparse.Namespace, method: str) -> dict:
    """The checkpoint's content; ValueError if it is damaged, another model's or of a training that has not come to its end."""
    content = checkpoint.read(file, run, "--workspace", full_precision=method != "qat")
    if content["epoch"] < content["options"]["epochs"]:
        raise ValueError(f"--workspace: {file} is unfinished, at epoch {content['epoch']} of {content['options']['epochs']}")
    return content


if __name__ == "__main__":
    sys.exit(said(main))
