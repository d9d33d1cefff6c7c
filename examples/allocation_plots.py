"""allocate.py's two pictures: accuracy against bytes, and the bits of every layer."""

from pathlib import Path

import numpy as np

STYLES = {  # method: words, color, marker
    "uniform": ("the same bits everywhere", "#8a94a6", "s"),
    "naive": ("loss, layer by layer (naive)", "#f08c00", "v"),
    "zeroq": ("KL, layer by layer (ZeroQ)", "#e8590c", "^"),
    "gauss_newton": ("KL, Gauss-Newton", "#0b7285", "o"),
    "composed": ("KL, composed pairs", "#2b8a3e", "h"),
    "clado": ("loss, pairs (CLADO)", "#c2255c", "D"),
    "clado_kl": ("KL, pairs (CLADO's KL)", "#6741d9", "P"),
    "clado_positive": ("KL, pairs made positive", "#1864ab", "X"),
}
GRID = "#e6e9ee"
TICKS = (0, 20, 40, 60, 70, 80, 90, 95, 97, 98, 99, 99.5, 100)
NEVER = 100.3  # percent: the axis' infinity
TOP = 100.05  # percent: its upper end


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"})
    return pyplot


def _height(percent):
    return -np.log(NEVER - percent)


def accuracy(rows: list[dict], plain: dict, title: str, file: Path) -> None:
    """Accuracy over KiB of the file: after fine-tuning, of the packed models, and before it. `plain`: the float model's numbers."""
    plt = _pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    sides = (("After fine-tuning, packed", "top1_packed"), ("Before fine-tuning", "top1_before"))
    for axes, (name, column) in zip(panels, sides, strict=True):
        text = f"float: {plain['top1']:.1f} % in {plain['bytes'] / 1024:,.0f} KiB"
        axes.axhline(plain["top1"], color="#343a40", linestyle=":", linewidth=1.4, label=text)
        lowest, labels = plain["top1"], []
        for method, (words, color, marker) in STYLES.items():
            # A point's place is its own file's, which is not the budget where uniform bits do not fill that.
            points = {
                r["stored_bytes"] / 1024: r for r in rows if r["method"] == method and r.get("stored_bytes") and r.get(column) is not None
            }
            if not points:
                continue
            sizes = sorted(points)
            line = "--" if method == "uniform" else "-"
            values = [points[size][column] for size in sizes]
            lowest = min(lowest, *values)
            axes.plot(sizes, values, line, color=color, marker=marker, markersize=7, linewidth=2, label=words, alpha=0.9)
            if method == "uniform":
                labels = [(points[size]["uniform"], (size, value), color) for size, value in zip(sizes, values, strict=True)]
        # The error's logarithm: between 98 and 99 % there is as much as between 50 and 75.
        axes.set_yscale("function", functions=(_height, lambda z: NEVER - np.exp(-z)))
        bottom = max(0, lowest - 0.35 * (NEVER - lowest))
        for text, point, color in labels:  # below its point, or where the axis' numbers are near above it
            low = _height(point[1]) - _height(bottom) < 0.07 * (_height(TOP) - _height(bottom))
            axes.annotate(text, point, xytext=(7, 6 if low else -14), textcoords="offset points", color=color)
        ticks = [tick for tick in TICKS if tick >= bottom]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set(title=name, xlabel="KiB of the file, header not counted", ylabel="test top-1, %", ylim=(bottom, TOP))
        axes.margins(x=0.08)
        axes.grid(axis="y", color=GRID)
    panels[0].legend(frameon=False, loc="best")
    figure.suptitle(title, fontsize=13)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def bits(rows: list[dict], title: str, file: Path) -> None:
    """A panel a row: bars of the bits of each layer's weights, upwards, and of its inputs, where they have any, downwards."""
    plt = _pyplot()
    layers = list(dict.fromkeys(layer for row in rows for layer in row["choice"]))
    most = max(bits or 0 for row in rows for choice in row["choice"].values() for bits in choice)
    inputs = any(activation for row in rows for _, activation in row["choice"].values())
    size = (max(7, 0.24 * len(layers) + 2), 1.3 + (1.9 if inputs else 1.4) * len(rows))
    figure, panels = plt.subplots(len(rows), 1, figsize=size, sharex=True, squeeze=False, layout="constrained")
    for axes, row in zip(panels[:, 0], rows, strict=True):
        words, color, _ = STYLES[row["method"]]
        choices = [row["choice"].get(layer, (0, 0)) for layer in layers]
        axes.bar(range(len(layers)), [weight or 0 for weight, _ in choices], color=color, width=0.8)
        if inputs:
            axes.bar(range(len(layers)), [-(activation or 0) for _, activation in choices], color=color, width=0.8, alpha=0.45)
            axes.axhline(0, color="white", linewidth=1.5)
        ticks = sorted({bits for row in rows for choice in row["choice"].values() for bits in choice if bits})
        ticks = [-bits for bits in reversed(ticks)] * inputs + ticks
        axes.set_yticks(ticks, [str(abs(tick)) for tick in ticks])
        axes.set(ylim=(-1.08 * most if inputs else 0, 1.08 * most), xlim=(-0.7, len(layers) - 0.3))
        axes.set_ylabel("inputs   weights" if inputs else "bits", fontsize=9)
        numbers = [f"{row['average_bits']:.2f} bits on average", f"{row['predicted_bytes'] / 1024:.1f} KiB"]
        axes.set_title(f"{words}: {', '.join(numbers)}", loc="left", fontsize=10)
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
    panels[-1, 0].set_xticks(range(len(layers)), layers, rotation=90, fontsize=7 if len(layers) > 30 else 9)
    figure.suptitle(title, fontsize=13)
    figure.savefig(file, dpi=150)
    plt.close(figure)
