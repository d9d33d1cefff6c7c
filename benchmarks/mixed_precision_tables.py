"""Mixed precision's own section: what methods cost and predict, and what they are good for."""

from result_files import measured_on, read
from result_rows import seeds


def peer_text(r: dict | None) -> str:
    """How far a general solver came."""
    if r is None:
        return ""
    done = r["above"] < 1e-5 and r["bound_below"] < 1e-5
    return f"solved in {r['wall_s']:.0f} s" if done else f"{100 * r['above']:.0f} % above after {r['wall_s']:.0f} s"


def mixed_precision(folder: str = "benchmarks/results/") -> str:
    """Its own section's tables: what methods cost and predict, and what they are good for. `folder`: of the plots."""
    lines, r = [], read("mixed_precision")
    for what, regimes in r.get("predictions", {}).items():
        first = f"ResNet-20, {what} at 2, 4 or 8 bits, {r['samples']} images"
        lines += [f"| {first} | CPU seconds | {' | '.join(regimes)} |", "|---" * (2 + len(regimes)) + "|"]
        for name in next(iter(regimes.values()))["spearman"]:
            if name != "loss pairs":
                seconds = r["seconds"][what][name.split(",")[0]]
                ranks = " | ".join(f"{figures['spearman'][name]:.3f}" for figures in regimes.values())
                lines.append(f"| {name} | {seconds:.0f} | {ranks} |")
        lines.append("")
    if lines:
        plots = ", ".join(f"[{what}]({folder}mixed_precision_{what.replace(' ', '_')}.png)" for what in r["predictions"])
        counts = sorted({len(figures["points"]["true"]) for regimes in r["predictions"].values() for figures in regimes.values()})
        text = f"Rank correlation of predicted with true KL over {' or '.join(map(str, counts))} random assignments a column: "
        lines += [
            f"{text}`python benchmarks/mixed_precision.py`,",
            f"plots of {plots}.",
            "",
        ]
    r = read("allocate")
    if r:
        sizes = list(r["peers"])
        lines += [f"| Layers x choices, a budget at 0.25 | {' | '.join(sizes)} |", "|---" * (1 + len(sizes)) + "|"]
        ours = [r["positive"][f"{size} at 0.25"] for size in sizes]
        cells = [f"{own['proven']} of {own['of']} proven, worst {own['worst_cpu_s']:.2f} s" for own in ours]
        lines.append(f"| `quantize.allocate` | {' | '.join(cells)} |")
        for peer in ("scip", "highs"):
            cells = [peer_text(r["peers"][size].get(peer)) for size in sizes]
            lines.append(f"| {'SCIP' if peer == 'scip' else 'HiGHS'} | {' | '.join(cells)} |")
        text = "Synthetic sensitivities of CIFAR ResNets, processor seconds of one thread: `python benchmarks/allocate.py --peers`."
        lines += ["", text, ""]
    r = read("mixed_precision_accuracy")
    if r:
        methods = list(dict.fromkeys(row["method"] for row in r["table"]))
        lines += [
            f"| ResNet-56, mnist5k, {seeds(r['table'][0]['seeds'])}, before and after an epoch | {' | '.join(methods)} |",
            "|---" * (1 + len(methods)) + "|",
        ]
        for budget in dict.fromkeys(row["budget"] for row in r["table"]):
            by = {row["method"]: row for row in r["table"] if row["budget"] == budget}
            cells = [
                f"{row['top1_before']:.1f}, {row['top1_packed']:.2f} ± {row['spread'] or 0:.2f} %, {row['file_bytes'] / 1024:.0f} KiB"
                for row in (by[m] for m in methods)
            ]
            lines.append(f"| {budget} | {' | '.join(cells)} |")
        full = r["float"]
        lines += [
            "",
            f"In full precision {full['top1']:.2f} % in {full['bytes'] / 1024:,.0f} KiB: `python benchmarks/mixed_precision_accuracy.py`.",
        ]
    lines.append(measured_on(("mixed_precision", "allocate", "mixed_precision_accuracy")))
    return "\n".join(lines)
