"""README's tables of results and all of RESULTS.md, made from results/*.json. In README it rewrites what stands between markers.

python benchmarks/readme.py [--check]     # --check: exits 1 if one of them says something else
"""

import argparse
import sys
from pathlib import Path

import result_tables
from mixed_precision_tables import mixed_precision
from result_files import measured_on, others, read
from result_rows import (
    accuracy,
    binary,
    binary_accuracy,
    binary_models,
    compress_once,
    diffq_accuracy,
    diffq_reliability,
    diffq_step,
    fake_quantize,
    few_bits,
    gradient_variance,
    kernels,
    layers,
    memory,
    other_models,
    other_steps,
    packed,
    packed_models,
    power_of_two,
    power_of_two_mnist5k,
    step_time,
)

HERE = Path(__file__).parent
README, RESULTS = HERE.parent / "README.md", HERE / "RESULTS.md"
MARKS = {name: (f"<!-- {name}: begin (benchmarks/readme.py) -->", f"<!-- {name}: end -->") for name in ("mixed precision", "results")}


SECTIONS = {
    "Activation-compressed training": [
        memory,
        compress_once,
        step_time,
        layers,
        accuracy,
        gradient_variance,
        kernels,
        other_models,
        other_steps,
    ],
    "Packed weights": [packed, packed_models, fake_quantize, power_of_two],
    "Learned bits": [diffq_step, diffq_reliability, diffq_accuracy],
    "One bit": [binary, few_bits, binary_models, binary_accuracy],
}
# The rows that README opens with.
HEADLINES = {
    memory: [0], compress_once: [0, 1], step_time: [0, 1], accuracy: [0], other_models: [0, 1], other_steps: [0], packed: [0, 1],
    packed_models: [2, 3], diffq_reliability: [0], binary: [0], binary_models: [1, 5],
}  # fmt: skip
HEADER = ["| | compressed | plain | | command |", "|---|---|---|---|---|"]


def rows_of(benchmark, machine: str = "") -> list[str]:
    """All of a benchmark's rows, with its command."""
    name = benchmark.__name__
    result = read(name, machine)
    return [f"{row} `python benchmarks/{name}.py` |" for row in benchmark(result)] if result else []


def tables_of(benchmarks, machine: str = "") -> list[str]:
    """The tables of those benchmarks that have some."""
    lines = []
    for name in (benchmark.__name__ for benchmark in benchmarks):
        make, result = getattr(result_tables, name, None), read(name, machine)
        lines += make(result) if make and result else []
    return lines


def headlines() -> str:
    """README's table."""
    rows = [row for benchmark, chosen in HEADLINES.items() for i, row in enumerate(rows_of(benchmark)) if i in chosen]
    return "\n".join(
        [
            *HEADER,
            *rows,
            "",
            measured_on(benchmark.__name__ for benchmark in HEADLINES),
            "More figures: [benchmarks/RESULTS.md](benchmarks/RESULTS.md). All that were taken: `benchmarks/results/`.",
        ]
    )


def all_results() -> str:
    """RESULTS.md."""
    lines = ["# Results", "", "Made by `python benchmarks/readme.py` from `results/*.json`, where every figure lies with its machine.", ""]
    for title, benchmarks in SECTIONS.items():
        rows = [row for benchmark in benchmarks for row in rows_of(benchmark)]
        rows += power_of_two_mnist5k() if power_of_two in benchmarks else []
        lines += [f"## {title}", "", *HEADER, *rows, "", *tables_of(benchmarks)]
        lines += [measured_on(benchmark.__name__ for benchmark in benchmarks), ""]
    lines += ["## What bounds the kernels", "", result_tables.LIMITS, ""]
    lines += ["## Mixed precision", "", mixed_precision("results/"), ""]
    every = [benchmark for benchmarks in SECTIONS.values() for benchmark in benchmarks]
    for machine in others():
        rows = [row for benchmark in every for row in rows_of(benchmark, machine)]
        measured = measured_on((benchmark.__name__ for benchmark in every), machine)
        lines += [f"## A second machine: {machine}", "", *HEADER, *rows, "", *tables_of(every, machine), measured, ""]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = README.read_text()
    for name, block in (("mixed precision", mixed_precision()), ("results", headlines())):
        begin, end = MARKS[name]
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"
    for path, text in ((README, readme), (RESULTS, all_results())):
        if not args.check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"{path.name}'s figures are not those of benchmarks/results: run python benchmarks/readme.py")


if __name__ == "__main__":
    main()
