#!/usr/bin/env python3
"""Mixed precision, from a float model to packed files: measure what few bits cost in each layer, choose within budgets, fine-tune, compare.

    python examples/allocate.py --arch resnet20 --dataset mnist5k                                       # trains the float model first
    python examples/allocate.py --arch resnet56 --dataset cifar100 --init-from runs/.../last.pt --average-bits 2.5 3 4 --channels-last
    python examples/allocate.py --init-from runs/.../last.pt --methods uniform zeroq gauss_newton clado_kl --samples 128
    python examples/allocate.py --init-from runs/.../last.pt --activation-choices 2 4 8 --average-bits 4 --average-activation-bits 4

Every method gets the same budgets and the same fine-tuning. Ends with a table and two kinds of plots. Ctrl-C stops it at any place, and the
same command goes on: what the workspace holds already is not done again.
"""

import copy
import json
import signal
import sys
import time
from argparse import Namespace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import quantize

import allocation_plots
import allocations
import files
import train
from allocations import METHODS, Budget, Choice, choice_text
from assignments import Interrupts, Stopped, digest, fine_tune, kept, key_of, shared
from data import Loader, Subset
from engine import Run, show, test
from interrupt import StopRequest
from options import decisive
from processes import Processes
from said import blaming, said

# Of the table: names in report.json and how they are printed.
COLUMNS = {
    "method": "{}",
    "budget": "{}",
    "average_bits": "{:.2f}",
    "predicted_bytes": "{:,}",
    "stored_bytes": "{:,}",
    "file_bytes": "{:,}",
    "objective": "{:.4g}",
    "lower_bound": "{:.4g}",
    "proven": "{}",
    "true_kl": "{:.4g}",
    "top1_before": "{:.2f}",
    "top1_after": "{:.2f}",
    "top1_packed": "{:.2f}",
    "failed": "{}",
}


def main(argv: list[str] | None = None) -> int:
    """What `argv` asks for and the workspace does not hold yet; 0, 1 if every fine-tuning failed, 128 plus the signal that stopped it."""
    args, recipe, first = allocations.parse(argv)
    for package in ("matplotlib", "pandas"):
        if find_spec(package) is None:  # said before hours of work, not after
            raise ImportError(f"package {package}: expected for the table and the plots; it is not installed: pip install {package}")
    processes = Processes.start(recipe.device)
    try:
        with Interrupts():
            rows = compare(args, recipe, first, processes)
        return 1 if all("failed" in row for row in rows) else 0
    except KeyboardInterrupt as stopped:
        say(processes, "stopped; the same command goes on")
        return 128 + getattr(stopped, "signal", signal.SIGINT)
    finally:
        processes.close()


def compare(args: Namespace, recipe: Namespace, first: Namespace, processes: Processes) -> list[dict]:
    """All methods at all budgets, and their report, whose rows are returned."""
    bare = Namespace(**{**vars(recipe), "compress": "fanin", "sync_bn": False})
    # Of a model whose weights do not matter: what is wrong with the budgets is said before hours of training, not after.
    run, *loaders = train.prepare(Namespace(**{**vars(bare), "init_from": None}), processes)
    batches = calibration(run, loaders[0], args.samples)
    allocations.check_float_layers(args, run.model)
    choices = allocations.choices_of(args)
    sizes, layers = {}, []
    for choice in choices:
        model = quantize.prepare(copy.deepcopy(run.model).eval(), allocations.uniform_config(args, choice))
        sizes[choice], layers = quantize.size_report(model).bytes, allocations.layers_of(model)
    budgets = allocations.budgets_of(args, sizes)

    with blaming("--workspace: expected a folder that can be written to", OSError):
        args.workspace.mkdir(parents=True, exist_ok=True)

    bare.init_from = recipe.init_from = recipe.init_from or float_model(args, first, processes)
    run, *loaders = train.prepare(bare, processes)
    recipe.width, recipe.num_classes, plain = bare.width, bare.num_classes, run.model.eval()
    given = (digest(plain.state_dict().values()), digest(images for images, _ in batches), args.quantizer)
    decides = (given, decisive(recipe), processes.world)
    top1 = kept(args.workspace / f"float-{key_of(decides)}.json", processes, lambda: test(run, loaders[1], StopRequest())[1])
    start = {"top1": top1, "bytes": quantize.size_report(plain).bytes}
    say(processes, f"float model {recipe.init_from}: top-1 {top1:.2f} %, {start['bytes']:,} bytes")

    measures = {m: measured(args, m, plain, batches, choices, given, processes) for m in args.methods if METHODS[m]}
    chosen = []
    for budget in budgets:
        for method in args.methods:
            if METHODS[method]:
                choose = partial(allocated, args, budget, measures[method][0])
            else:
                choose = partial(fitting, args, budget, sizes, layers)
            row, config = shared(processes, choose)  # a search that time ends need not end alike in all processes
            say(processes, f"{method}, {budget.name}: {describe(row)}")
            chosen.append(({"method": method, "budget": budget.name, "max_bytes": budget.max_bytes} | row, config))

    report = {"arch": recipe.arch, "dataset": recipe.dataset, "seed": recipe.seed, "init_from": str(recipe.init_from), "float": start}
    report |= {"flags": flags(args), "recipe": flags(recipe), "sensitivities": {m: numbers for m, (_, numbers) in measures.items()}}
    report["rows"] = []
    for row, config in chosen:
        say(processes, f"\n{row['method']}, {row['budget']}")
        folder = args.workspace / "models" / f"{row['average_bits']:.2f}-{key_of(decides, row['choice'])}"  # shared by equal choices
        tune = partial(fine_tune, plain, config, batches, recipe, processes, loaders, folder)
        report["rows"].append(row | kept(folder / "numbers.json", processes, tune))
        say(processes, outcome(report["rows"][-1]))
    if processes.first:
        finish(args.workspace, report)
    return report["rows"]


def float_model(args: Namespace, first: Namespace, processes: Processes) -> Path:
    """The last checkpoint of a training in full precision that is finished, now or before."""
    first.workspace = args.workspace / f"float-{key_of(decisive(first), processes.world)}"
    last = first.workspace / "last.pt"
    if processes.any(processes.first and not (first.workspace / "report.json").exists()):  # what a training ends with
        say(processes, f"training the float model in {first.workspace}")
        first.resume = last if processes.any(last.exists()) else None
        run, *loaders = train.prepare(first, processes)
        with StopRequest() as stop:
            if not train.train(run, *loaders, stop):
                raise Stopped(stop.signal)
    return last


def calibration(run: Run, loader, samples: int) -> list[tuple]:
    """The same (images, targets) in every process: evenly spread training images without augmentation."""
    if samples > len(loader.data):
        raise ValueError(f"--samples must be at most {len(loader.data)}, the training images; got {samples}")
    part = Subset(loader.data, samples)
    plan = Loader(part, run.args.batch_size, train=False).plan(0)
    device = run.processes.device
    return [(show(run, images), targets.to(device)) for images, targets in (part.batch(indices) for indices in plan)]


def measured(args: Namespace, method: str, plain, batches, choices: list[Choice], given: tuple, processes: Processes) -> tuple:
    """The sensitivity, in the first process, and where it is and how long it took."""
    how, metric = METHODS[method]
    name = allocations.MADE_POSITIVE.get(method, method)
    file = args.workspace / f"sensitivity-{name}-{key_of(given, choices, args.float_layers)}.safetensors"
    checkpoint = file.with_suffix(".partial")

    def measure() -> dict:
        say(processes, f"measuring {name}: {args.samples} images, {len(choices)} choices")
        whole, began = not list(args.workspace.glob(f"{checkpoint.name}*")), time.perf_counter()
        quantizer = allocations.quantizer_of(args)
        found = quantize.measure_sensitivity(plain, batches, choices, how, metric, quantizer, skip=args.float_layers, checkpoint=checkpoint)
        if processes.first:
            found.save(file)
        return {"file": str(file), "seconds": time.perf_counter() - began if whole else None}  # none: it was interrupted

    numbers = kept(file.with_suffix(".json"), processes, measure)
    if not processes.first:
        return None, numbers
    sensitivity = quantize.Sensitivity.load(file)
    return (sensitivity.saturated().projected() if method in allocations.MADE_POSITIVE else sensitivity), numbers


def allocated(args: Namespace, budget: Budget, sensitivity) -> tuple[dict, dict]:
    """The best assignment within the budget by `sensitivity`: its row in the report, and its configuration for prepare()."""
    max_bytes, max_bit_ops = budget.max_bytes - sensitivity.other_bytes, allocations.max_bit_ops(budget, sensitivity)
    found = quantize.allocate(sensitivity, max_bytes, max_bit_ops, args.time_limit)
    if found.interrupted:
        raise Stopped(signal.SIGINT)
    row = {"average_bits": found.average_bits, "predicted_bytes": found.bytes + sensitivity.other_bytes}
    row |= {"objective": found.objective, "lower_bound": found.lower_bound}
    row |= {"proven": found.proven, "search_seconds": found.seconds, "choice": found.choice}
    return row, found.config


def fitting(args: Namespace, budget: Budget, sizes: dict[Choice, int], layers: list[str]) -> tuple[dict, dict]:
    """The same for equal bits in all layers."""
    choice = allocations.largest_uniform(budget, sizes)
    row = {"average_bits": float(choice[0]), "predicted_bytes": sizes[choice], "uniform": choice_text(choice)}
    return row | {"choice": dict.fromkeys(layers, list(choice))}, allocations.uniform_config(args, choice)


def describe(row: dict) -> str:
    """An assignment in a line."""
    size = f"{row['average_bits']:.2f} bits on average, {row['predicted_bytes']:,} bytes"
    if "uniform" in row:
        return f"{row['uniform']} in all layers is the most that fits; {size}"
    bound = "proven" if row["proven"] else f"not proven: at least {row['lower_bound']:.4g}"
    return f"predicted {row['objective']:.4g} ({bound}); {size}"


def outcome(numbers: dict) -> str:
    """What became of it in a line."""
    if "failed" in numbers:
        return f"failed: {numbers['failed']}"
    after = f"after fine-tuning {numbers['top1_after']:.2f} %, packed {numbers['top1_packed']:.2f} %"
    return f"KL {numbers['true_kl']:.4g}; top-1 before {numbers['top1_before']:.2f} %, {after}; file {numbers['file_bytes']:,} bytes"


def finish(workspace: Path, report: dict) -> None:
    """The plots, table.csv and, last, report.json; the table is printed."""
    import pandas

    rows, title = report["rows"], f"{report['arch']} on {report['dataset']}"
    table = pandas.DataFrame(rows, columns=list(COLUMNS))
    whole = [name for name in COLUMNS if name.endswith("_bytes")]
    table[whole] = table[whole].astype("Int64")  # with gaps they would become floats
    files.write(workspace / "table.csv", table.to_csv(index=False))
    pictures = [workspace / "accuracy.png"]
    allocation_plots.accuracy(rows, report["float"], title, pictures[0])
    for name in dict.fromkeys(row["budget"] for row in rows):
        pictures.append(workspace / f"layers-{name.replace(' ', '-')}.png")
        allocation_plots.bits([row for row in rows if row["budget"] == name], f"{title}: bits of each layer, {name}", pictures[-1])
    files.write(workspace / "report.json", json.dumps(report, indent=1) + "\n")
    text = {name: ["" if pandas.isna(value) else form.format(value) for value in table[name]] for name, form in COLUMNS.items()}
    print("\n" + pandas.DataFrame(text).to_string(index=False))
    print("\n" + "\n".join(str(file) for file in (workspace / "report.json", workspace / "table.csv", *pictures)))


def flags(args: Namespace) -> dict:
    """As JSON has them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def say(processes: Processes, text: str) -> None:
    """Print, in the first process."""
    if processes.first:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(said(main))
