"""Whole tables of RESULTS.md: what a row of result_rows.py has no room for. A function for each script, of its name; lines."""

import csv
import statistics
from collections.abc import Iterable

from results import FOLDER


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """As Markdown, with a blank line behind it."""
    lines = [f"| {' | '.join(row)} |" for row in (list(header), *rows)]
    return [lines[0], "|---" * (lines[0].count(" | ") + 1) + "|", *lines[1:], ""]


def with_deviation(mean: float, deviation: float | None) -> str:
    """A mean in percent over seeds; of one seed there is no deviation."""
    return f"{mean:.2f} %" if deviation is None else f"{mean:.2f} ± {deviation:.2f} %"


def accuracy(r: dict) -> list[str]:
    """All configurations."""
    rows = []
    for row in r["table"]:
        interval = "" if row["interval"] is None else "[{:+.2f}, {:+.2f}]".format(*row["interval"])
        difference = "" if row["difference"] is None else f"{row['difference']:+.2f}"
        found = with_deviation(row["mean"], row["deviation"])
        rows.append((row["configuration"], str(row["seeds"]), found, difference, interval, f"{row['saved_mib_per_image']:.3f}"))
    header = (
        "ResNet-20, mnist5k: average / most bits",
        "seeds",
        "accuracy",
        "points over fp32",
        "95 %",
        "saved for backward, MiB an image",
    )
    text = "`group`: a range for each 256 elements, not for each sample; `layer`, `gradient`: bits move between layers, follow gradients; "
    text += "`once`: `compress_once`."
    return [*table(header, rows), f"{text} Of one seed nothing follows: `python benchmarks/accuracy.py`.", ""]


# What each configuration is to be compared with; "range bound" with the same without it.
BEFORE = {
    "2/2 group": "2/2",
    "2/8 group": "2/2 group",
    "2/8 group gradient": "2/8 group",
    "2/8 group layer": "2/8 group",
    "2/8 group layer gradient": "2/8 group gradient",
}


def gradient_variance(r: dict) -> list[str]:
    """All configurations."""
    theirs, rows = r.get("actnn_cifar10") or r.get("original_cifar10") or {}, []
    for name, row in r["results"].items():
        before = name.removesuffix(", range bound") if "bound" in name else BEFORE.get(name)
        gain = f"{r['results'][before]['quant_var'] / row['quant_var']:.2f} ({before})" if before in r["results"] else ""
        figures = (f"{row['quant_var']:.5f}", f"{row['sample_var']:.3f}", f"{row['overall_var']:.3f}")
        rows.append((name, *figures, gain, f"{theirs.get(name, '')}"))
    stages = ", ".join(f"{stage} {gain:.1f}" for stage, gain in r["group_gain_by_stage"].items())
    header = (f"{r['arch']}, mnist5k: average / most bits", "added by compression", "of the batches", "overall", "times less than (row)")
    text = f"Groups of 256 over a range a sample, by the layers whose gradient it is: {stages}. `range bound`: bits by ActNN's bound."
    return [*table((*header, "ActNN's table, on CIFAR-10"), rows), f"{text} `python benchmarks/gradient_variance.py`.", ""]


def compress_once(r: dict) -> list[str]:
    """All networks."""
    rows = []
    for arch, own in r["memory"].items():
        plain = own["plain_mib"]
        rows.append((arch, str(own["pixels"]), f"{plain:.2f}", *(f"{mib:.3f} ({plain / mib:.1f})" for mib in own["saved_mib"].values())))
    sides = next(iter(r["memory"].values()))["saved_mib"]
    header = ("saved for backward, MiB an image (times less)", "pixels", "plain", *sides)
    text = "`once`: `compress_once`. Of random weights, on which bytes do not depend."
    return [*table(header, rows), f"{text} `python benchmarks/compress_once.py`.", ""]


def kernels(r: dict) -> list[str]:
    """All kernels, ISAs and numbers of threads."""
    columns = list(dict.fromkeys((row["threads"], row["isa"]) for row in r["results"]))
    found = {(row["threads"], row["isa"], row["kernel"]): f"{row['ns_per_element']:.2f}" for row in r["results"]}
    header = ("ns an element", *(f"{isa}, {threads} thread{'s' * (threads > 1)}" for threads, isa in columns))
    names = dict.fromkeys(row["kernel"] for row in r["results"])
    rows = [(name, *(found.get((*column, name), "") for column in columns)) for name in names]
    return [*table(header, rows), "`python benchmarks/kernels.py`.", ""]


def other_models(r: dict) -> list[str]:
    """All models, from the highest ratio to the lowest."""
    rows = []
    for name, row in sorted(r["results"].items(), key=lambda item: -item[1]["ratio"]):
        most = [f"{left['op']} {left['mib']:.2f} ({left['reason']})" for left in row["full_precision"] if left["mib"] >= 0.005]
        sizes = (str(row["size"]), f"{row['plain_mib']:.1f}", f"{row['saved_mib']:.2f}")
        rows.append((name, *sizes, f"{row['ratio']:.1f}", "; ".join(most), row["below_ten_because"] or ""))
    header = (f"batch {r['batch']}, {r['bits']} bits", "pixels", "plain, MiB", "compressed, MiB", "times less")
    text = "`python benchmarks/other_models.py`."
    return [*table((*header, "of it in full precision, MiB", "below ten because"), rows), text, ""]


def sides(r: dict, command: str) -> list[str]:
    """All layers of a latency benchmark, in ms."""
    lines = []
    for isa, results in ((r.get("isa", "the machine's best"), r["results"]), ("everything on avx2", r.get("avx2_alone", []))):
        results = [row for row in results if "sides" in row]
        columns = list(dict.fromkeys(side for row in results for side in row["sides"]))
        rows = [
            (row["layer"], *(f"{1e3 * row['sides'][side]['median_s']:.3f}" if side in row["sides"] else "" for side in columns))
            for row in results
        ]
        lines += table((f"ms, batch 1 unless said, {r['threads']} thread, {isa}", *columns), rows) if rows else []
    return [*lines, f"`python benchmarks/{command}.py`.", ""]


def packed(r: dict) -> list[str]:
    """All layers; inputs are of 8 bits but where they are said to be floats."""
    return ["Inputs are quantized to 8 bits, but where they are said to be floats.", "", *sides(r, "packed")]


def binary(r: dict) -> list[str]:
    """All layers, on every ISA."""
    return sides(r, "binary")


def power_of_two(r: dict) -> list[str]:
    """What examples/evaluate.py wrote: means over the seeds, with latencies; and the errors of power_of_two.json."""
    errors = [
        (
            row["scale"],
            "" if row["bits"] is None else str(row["bits"]),
            f"{row['po2plus']:.5f}",
            f"{row['po2']:.5f}",
            f"{row['gain_percent']:.2f} %",
        )
        for row in r["results"]
    ]
    lines = table(("relative squared error on N(0, 1)", "bits", "PO2+", "PO2", "less"), errors)
    lines += ["`python benchmarks/power_of_two.py`.", ""]
    path = FOLDER / "power_of_two_mnist5k.csv"
    if not path.exists():
        return lines
    by: dict[tuple, list[dict]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            by.setdefault((row["arch"], row["method"], row["quantizer"], row["bits"]), []).append(row)
    rows = []
    for (arch, method, quantizer, bits), found in by.items():

        def values(column, found=found):
            return [float(row[column]) for row in found]

        def latency(batch, values=values):
            own, plain = values(f"latency{batch}_ms"), values(f"float_latency{batch}_ms")
            ratio = statistics.median(a / b for a, b in zip(own, plain, strict=True))
            return f"{statistics.median(own):.1f}, {statistics.median(plain):.1f}: {ratio:.2f}"

        top1 = values("top1")
        deviation = statistics.stdev(top1) if len(top1) > 1 else None
        size = f"{statistics.mean(values('file_bytes')) / 1024:,.0f}"
        rows.append(
            (f"{arch}, {method}", quantizer, bits, with_deviation(statistics.mean(top1), deviation), size, latency(1), latency(128))
        )
    packed, plain = ("packed, float ms: ratio", "weights without activation bits")
    header = ("mnist5k, 3 seeds", "quantizer", "bits", "accuracy", "file, KiB", f"batch 1, {packed}", f"batch 128, {packed}")
    text = f"Medians of the seeds, one CPU thread; {plain}, and the float model's batch norms are not folded."
    return [*lines, *table(header, rows), f"{text} `examples/launch.sh`, `examples/evaluate.py`.", ""]


def diffq_accuracy(r: dict) -> list[str]:
    """All trainings: the file with and without its header, and latencies."""
    rows = []
    for row in r["runs"]:
        payload, file = row.get("payload_mib"), f"{1024 * row['size_mib']:.1f}"
        own, plain = row["latency1_ms"], row["float_latency1_ms"]
        speed = f"{own:.1f}, {plain:.1f}: {own / plain:.2f}"
        rows.append(
            (row["name"], str(row["seed"]), f"{row['top1']:.1f} %", f"{1024 * payload:.1f}" if payload else "", file)
            + (f"{row['average_bits']:.2f}", speed)
        )
    header = ("ResNet-20, mnist5k", "seed", "accuracy", "payload, KiB", "file, KiB", "bits", "batch 1, packed, float ms: ratio")
    text = "Targets and penalties are of the payload, the file without its header: 0.12 MiB are 122.9 KiB, 0.16 MiB are 163.8."
    return [*table(header, rows), f"{text} Inputs are floats in all of them. `python benchmarks/diffq_accuracy.py`.", ""]


def binary_accuracy(r: dict) -> list[str]:
    """All configurations, with latencies."""
    rows = []
    for row in r["table"]:
        own, plain = row["latency1_ms"], row["float_latency1_ms"]
        rows.append(
            (row["name"], str(row["seeds"]), with_deviation(row["top1"], row["spread"]), f"{row['file_bytes'] / 1024:.0f}")
            + (f"{row['bit_ops'] / 1e9:.3f}", f"{own:.2f}, {plain:.2f}: {own / plain:.2f}")
        )
    header = ("ResNet-20 of width 8, mnist5k", "seeds", "accuracy", "file, KiB", "G bit operations", "batch 1, packed, float ms: ratio")
    text = "aA: bits of inputs, wW: of weights. `python benchmarks/binary_accuracy.py`."
    return [*table(header, rows), text, ""]


LIMITS = """\
By instructions and bytes; nothing here is measured. A register of binary products takes an xor, a population count and an addition: with
AVX-512's VPOPCNTDQ three vector operations make 512 products, which a Zen 4, at two such operations a cycle, does in 1.5 cycles, so at
most 341 products a cycle. AVX2 has no population count and looks nibbles up: a `pshufb` counts 64 products in 128 bits, 128 in 256, and an
addition follows. Of a linear layer at 4 bits that comes from memory, 1 byte of codes is read where fp32 has 8: as far as memory decides, a
factor of 8; in cache that bound is gone. DiffQ's op moves 12 to 16 bytes a weight: 8 forward, and 4 or 8 backward, as the gradient may be
changed in place or is copied."""
