"""A benchmark's figures as rows of RESULTS.md: a function for each script, of its name."""

import csv
import statistics

from results import FOLDER

# What was asked of figures that may miss it.
STEP_ASKED, LAYER_GAIN_ASKED, GROUP_GAIN_ASKED = 1.06, 2, 9
PACKED_LINEAR_ASKED, PACKED_CONV_ASKED, DIFFQ_STEP_ASKED, TERNARY_ASKED, INT8_ASKED = 9, 2, 1.05, 1.4, 2
BINARY_ASKED = {  # times fp32, of both on AVX2
    "conv 3x3, 256@14x14": 8, "conv 3x3, 64@56x56": 6, "conv 3x3, 16@32x32": 4, "linear 4096x4096, batch 1": 25,
}  # fmt: skip
CHANCE = 12  # percent, of ten classes and 500 images or more
NAMES = {"lenet": "LeNet", "mobilenet": "MobileNet", "mobilenetv2": "MobileNetV2"}


def as_fast(ratio: float, digits: int = 1) -> str:
    """Of a speed; below 1 it is slower."""
    return f"{ratio:.{digits}f} times as fast"


def seeds(count: int) -> str:
    """In words."""
    return f"{count} seeds" if count > 1 else "one seed"


def short(found: str, value: float, asked: float, at_most: bool = False) -> str:
    """`found`, and where `value` misses what was `asked`, that it does."""
    missed = value > asked if at_most else value < asked
    return f"{found} (short: {'at most' if at_most else 'at least'} {asked:g} asked)" if missed else found


def memory(r: dict) -> list[str]:
    """Of ResNet-50."""
    plain, ours = r["results"]["plain"], r["results"]["2 bits"]
    saved = "{saved_mib_per_image:.2f}".format
    process = "{process_after_forward_mib_per_image:.1f}".format
    return [
        f"| Saved for backward, ResNet-50 at 224², MiB an image | {saved(**ours)} | {saved(**plain)} | {ours['ratio']:.1f} times less |",
        f"| Process memory after that forward, MiB an image | {process(**ours)} | {process(**plain)} | at batch {r['batch']} |",
    ]


def step_time(r: dict) -> list[str]:
    """Of preact ResNet-56, each format."""
    rows, names = [], {"channels_last": "channels last", "bfloat16": "channels last, autocast to bfloat16"}
    for layout, result in r["results"].items():
        sides = result["sides"]
        ratio = {name: f"{t['ratio']:.2f}" for name, t in sides.items()}
        own = sides["2 bits"]["ratio"]
        if layout != "bfloat16" and own > STEP_ASKED:
            ratio["2 bits"] = short(f"{own:.3f}", own, STEP_ASKED, at_most=True)
        note = f"adaptive {ratio['2 bits, adaptive']}, checkpointed blocks {ratio['checkpoint per block']}"
        note += f", eager hooks {ratio['eager hooks, 2 bits']}" if "eager hooks, 2 bits" in ratio else ""
        rows.append(
            f"| Step, preact ResNet-56, batch {r['batch']}, {names.get(layout, layout)}, s | {sides['2 bits']['median_s']:.3f} | "
            f"{sides['plain']['median_s']:.3f} | {ratio['2 bits']}; {note} |"
        )
    return rows


def layers(r: dict) -> list[str]:
    """Layers by themselves."""
    return [
        f"| Time of `{name}` by itself, {layout.replace('_', ' ')}, ms | {1e3 * found['sides']['2 bits']['median_s']:.2f} | "
        f"{1e3 * found['sides']['plain']['median_s']:.2f} | {found['sides']['2 bits']['ratio']:.2f} (adaptive "
        f"{found['sides']['2 bits, adaptive']['ratio']:.2f}); keeps {found['saved_bytes'] / 1024:.0f} of "
        f"{found['plain_bytes'] / 1024:.0f} KiB |"
        for layout, every in r["results"].items()
        for name, found in every.items()
    ]


def accuracy(r: dict) -> list[str]:
    """Of ResNet-20 on mnist5k."""
    by_name = {row["configuration"]: row for row in r["table"]}
    plain, rows = by_name["fp32"], []
    for name, words in (
        ("2/2 group", "2 bits"),
        ("2/8 group layer", "2 bits, adaptive"),
        ("2/2 group once", "2 bits, `compress_once`"),
        ("4/4 group once", "4 bits, `compress_once`"),
    ):
        row = by_name.get(name)
        if row and row["interval"]:
            low, high = row["interval"]
            rows.append(
                f"| Accuracy, ResNet-20, mnist5k, {seeds(row['seeds'])}, {words} | {row['mean']:.2f} ± {row['deviation']:.2f} % | "
                f"{plain['mean']:.2f} ± {plain['deviation']:.2f} % | {row['difference']:+.2f} points, 95 % in [{low:+.2f}, {high:+.2f}] |"
            )
    return rows


def gradient_variance(r: dict) -> list[str]:
    """Of preact ResNet-56: the default configuration, and with per-sample gradients."""
    found = {name: row["quant_var"] for name, row in r["results"].items()}
    values = {name: f"{value:.2g}" for name, value in found.items()}
    sample = r["results"]["2/2"]["sample_var"]
    gains = [found[name] / found[name.replace(" group", " group layer")] for name in ("2/8 group", "2/8 group gradient")]
    grouped = found["2/2"] / found["2/2 group"]
    group = short(f"{grouped:.1f} times less", grouped, GROUP_GAIN_ASKED).replace("at least", "about")
    gain = short(f"{gains[0]:.2f} and {gains[1]:.2f} times less with layers", min(gains), LAYER_GAIN_ASKED).replace("at least", "about")
    return [
        f"| Gradient variance added, preact ResNet-56, mnist5k, adaptive 2 bits | {values['2/8 group layer']} | 0 | a range a sample "
        f"{values['2/2']}, a range a group {values['2/2 group']}, {group}; gradients without layers {values['2/8 group gradient']}, with "
        f"layers {values['2/8 group layer gradient']}; {gain}; the batches' own {sample:.2g} |"
    ]


def compress_once(r: dict) -> list[str]:
    """Memory, and variance in the same memory."""
    arch, variance = r["arch"], r["variance"]
    own, name = r["memory"][arch], arch.replace("preact_resnet", "preact ResNet-")
    plain, saved = own["plain_mib"], own["saved_mib"]
    return [
        f"| Saved for backward, {name}, `compress_once`, 2 bits, MiB an image | {saved['2 bits, once']:.3f} | {plain:.2f} | "
        f"{plain / saved['2 bits, once']:.1f} times less; without {plain / saved['2 bits']:.1f} |",
        f"| Gradient variance added, {name}, mnist5k, `compress_once`, 4 bits | {variance['4 bits, once']:.2g} | 0 | in "
        f"{saved['4 bits, once']:.3f} MiB an image; 2 bits without it: {variance['2 bits']:.2g} in {saved['2 bits']:.3f}; 2 bits with it "
        f"{variance['2 bits, once']:.2g} |",
    ]


def kernels(r: dict) -> list[str]:
    """The best ISA's, on one thread and on all."""
    rows = []
    isa = r["results"][-1]["isa"]
    for threads in sorted({row["threads"] for row in r["results"]}):
        own = {row["kernel"]: row["ns_per_element"] for row in r["results"] if (row["threads"], row["isa"]) == (threads, isa)}
        rows.append(
            f"| Quantize and pack 2 bits, {isa}, {threads} thread{'s' * (threads > 1)}, ns an element | {own['quantize 2 bit']:.2f} | "
            f"{own['copy']:.2f} (copy) | unpack {own['unpack 2 bit']:.2f}; eager PyTorch {own['eager quantize 2 bit']:.1f} and "
            f"{own['eager unpack 2 bit']:.1f} |"
        )
    return rows


def other_models(r: dict) -> list[str]:
    """torchvision's and timm's: those of what is compressed, and by name those that it helps less."""

    def row_of(what: str, transformer: bool) -> str:
        rows = {name: row for name, row in r["results"].items() if row["transformer"] == transformer}
        ratios = {name: row["ratio"] for name, row in rows.items() if not row["below_ten_because"]}
        lowest, highest = min(ratios, key=ratios.get), max(ratios, key=ratios.get)
        below = sorted((row["ratio"], name.partition("/")[2]) for name, row in rows.items() if row["below_ten_because"])
        because = "; below ten, for their standardized weights: " + ", ".join(f"{name} {ratio:.1f}" for ratio, name in below)
        return (
            f"| Saved for backward, unchanged models of torchvision and timm, {r['bits']} bits: {len(ratios)} of {len(rows)} {what} | "
            f"{ratios[lowest]:.1f} to {ratios[highest]:.1f} times less | 1 | {lowest} to {highest}{because if below else ''} |"
        )

    return [row_of("CNNs", False), row_of("transformers", True)]


def other_steps(r: dict) -> list[str]:
    """Steps of torchvision's and timm's."""
    rows = []
    for kind in ("float32", "bfloat16"):
        sides = {name: row[kind] for name, row in r["results"].items()}
        order = sorted(sides, key=lambda name: sides[name]["2 bits"]["ratio"])
        adaptive = sorted(row["2 bits, adaptive"]["ratio"] for row in sides.values())
        low, middle, high = order[0], order[len(order) // 2], order[-1]
        rows.append(
            f"| Step, {len(order)} CNNs of torchvision and timm, unchanged, {kind}, batch {r['batch']}, {r['size']}² | "
            f"{sides[middle]['2 bits']['ratio']:.2f} times the plain step's time in the middle | 1 | "
            f"{sides[low]['2 bits']['ratio']:.2f} ({low}) to {sides[high]['2 bits']['ratio']:.2f} ({high}); adaptive {adaptive[0]:.2f} to "
            f"{adaptive[-1]:.2f} |"
        )
    return rows


def packed(r: dict) -> list[str]:
    """A convolution and a matrix-vector product, beside fp32 and other libraries' int8."""
    rows = []
    names = {
        "conv 3x3, 256@14x14, contiguous": "3x3 convolution, 256@14²",
        "linear 4096x4096": "linear 4096², from memory",
        "linear 4096x4096, 20 calls in a row": "linear 4096², from cache",
    }
    for isa, results in ((r["isa"], r["results"]), ("everything on avx2", r.get("avx2_alone", []))):
        for row in results:
            if row["layer"] not in names:
                continue
            times = {side: f"{t['median_s'] * 1e3:.2f}" for side, t in row["sides"].items()}
            speed = {side: t["speedup"] for side, t in row["sides"].items()}
            others = "; ".join(f"{side} {times[side]}" for side in times if side.endswith("int8"))
            asked = PACKED_LINEAR_ASKED if row["layer"].startswith("linear") else PACKED_CONV_ASKED
            four = short(f"{as_fast(speed['4 bits'])} at 4 bits", speed["4 bits"], asked)
            rows.append(
                f"| Packed {names[row['layer']]}, 4-bit weights, 8-bit inputs, batch 1, {r['threads']} thread, {isa}, ms | "
                f"{times['4 bits']} | {times['fp32']} | "
                f"{four}, {speed['PO2+ 4 bits']:.1f} as PO2+, {speed['8 bits']:.1f} at 8 "
                f"({times['8 bits']}); {others} |"
            )
    return rows


def packed_models(r: dict) -> list[str]:
    """Whole networks, each side in its best memory format."""
    rows = []
    for isa, results in ((r["isa"], r["results"]), ("everything on avx2", r.get("avx2_alone", []))):
        for row in results:
            best = {kind: 1e3 * t for kind, t in row["best_s"].items()}
            others = "".join(f"; {side} {t['median_s'] * 1e3:.2f}" for side, t in row["sides"].items() if side.endswith("int8"))
            rows.append(
                f"| Packed {row['model']}, 4-bit weights, 8-bit inputs, batch 1, {r['threads']} thread, {isa}, ms | {best['4 bits']:.2f} | "
                f"{best['fp32']:.2f} | {as_fast(best['fp32'] / best['4 bits'])} at 4 bits{as_modules(row['sides'], '4 bits')}, "
                f"{best['8 bits']:.2f} at 8{others} |"
            )
    return rows


def as_modules(sides: dict, kind: str) -> str:
    """The best time of the sides of this `kind` that are not captured; nothing where none is."""
    own = {side: 1e3 * t["median_s"] for side, t in sides.items() if side.startswith(kind)}
    called = [t for side, t in own.items() if "captured" not in side]
    return f"; as a module {min(called):.2f}" if len(called) < len(own) else ""


def fake_quantize(r: dict) -> list[str]:
    """Forward and backward beside the eager twin."""
    by = {(row["codebook"], row["side"]): row for row in r["results"]}
    notes = "; ".join(f"{book} {by[book, 'ours']['ns_per_weight']:.1f}" for book in dict.fromkeys(row["codebook"] for row in r["results"]))
    first = next(iter(dict.fromkeys(row["codebook"] for row in r["results"])))
    ours, eager = by[first, "ours"], by[first, "eager, same search"]
    return [
        f"| Fake quantization, {r['bits']} bits, forward and backward, 1 thread, ns a weight | {ours['ns_per_weight']:.1f} | "
        f"{eager['ns_per_weight']:.1f} (eager) | {as_fast(eager['ratio_to_ours'], 0)}; {notes} |"
    ]


def power_of_two_mnist5k() -> list[str]:
    """Accuracy of 4-bit weights, from what examples/evaluate.py wrote: mean and deviation over seeds."""
    path = FOLDER / "power_of_two_mnist5k.csv"
    if not path.exists():
        return []
    table: dict[tuple, list[dict]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            table.setdefault((row["arch"], row["method"], row["quantizer"], row["bits"]), []).append(row)

    def accuracy(rows: list[dict]) -> str:
        values = [float(row["top1"]) for row in rows]
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} %" if len(values) > 1 else f"{values[0]:.2f} %"

    lines = []
    for arch in dict.fromkeys(key[0] for key in table):
        full, tuned = table[arch, "fp32", "none", "32"], table.get((arch, "qat", "po2plus", "4"))
        if tuned:
            size = float(full[0]["file_bytes"]) / float(tuned[0]["file_bytes"])
            ptq = accuracy(table[arch, "ptq", "po2plus", "4"])
            own, plain = (statistics.median(float(row[f"{side}latency1_ms"]) for row in tuned) for side in ("", "float_"))
            lines.append(
                f"| Accuracy, {arch}, mnist5k, PO2+ 4-bit weights, {seeds(len(tuned))} | {accuracy(tuned)} | {accuracy(full)} | {size:.1f} "
                f"times smaller file, {own:.1f} ms an image beside {plain:.1f}; without fine-tuning {ptq} | `examples/launch.sh`, "
                "`examples/evaluate.py` |"
            )
    return lines


def power_of_two(r: dict) -> list[str]:
    """What PO2+ gains."""
    alone, scaled = (next(row for row in r["results"] if row["scale"] == s and row["bits"] == b) for s, b in (
        ("no scale, all exponents", None), ("least squares", 4)))  # fmt: skip
    gain = f"{alone['gain_percent']:.1f} % less"
    return [
        f"| Relative squared error of PO2+ on N(0, 1) | {alone['po2plus']:.4f} | {alone['po2']:.4f} (PO2) | {gain}; "
        f"with least-squares scales at 4 bits {scaled['po2plus']:.5f} and {scaled['po2']:.5f} |"
    ]


def diffq_step(r: dict) -> list[str]:
    """The op, and whole steps."""
    isa, op = list(r["op_ns_a_weight"].items())[-1]
    rows = [
        f"| DiffQ, forward and backward, groups of {r['group_size']}, {isa}, 1 thread, ns a weight | {op['fused']:.1f} | "
        f"{op['eager']:.1f} (eager) | {as_fast(op['eager'] / op['fused'], 0)}; copying two tensors {op['copy']:.1f} |"
    ]
    for name, sides in r["steps"].items():
        own, plain = sides["diffq"], sides["plain"]
        ratio = short(f"{own['ratio']:.3f}", own["ratio"], DIFFQ_STEP_ASKED, at_most=True)
        rows.append(f"| Training step with DiffQ, {name}, 32x32, s | {own['median_s']:.3f} | {plain['median_s']:.3f} | {ratio} |")
    return rows


def diffq_reliability(r: dict) -> list[str]:
    """Of runs with planted overflows: of survival, not of accuracy."""
    count, groups = len(r["runs"]) // 2, ", ".join(str(size) for size in sorted({run["group_size"] for run in r["runs"]}))
    steps = f"narrowed models, {r['steps']} steps each: of survival, not of accuracy" if "steps" in r else ""
    best: dict[str, float] = {}
    for run in r["runs"]:
        if run["guarded"] and "top1" in run:
            best[run["arch"]] = max(run["top1"], best.get(run["arch"], 0))
    at_chance = [NAMES.get(arch, arch) for arch, top1 in best.items() if top1 < CHANCE]
    still = f"; {', '.join(at_chance)} still at chance" if at_chance else ""
    return [
        f"| Trainings with planted overflows that finish, {len(r['widths'])} models, groups of {groups}, mnist5k | "
        f"{r['lived']['true']} of {count} | {r['lived']['false']} of {count} | without the guard; {steps}{still} |"
    ]


def diffq_accuracy(r: dict) -> list[str]:
    """Learned bits beside fixed ones, means over the seeds."""
    by: dict[str, list[dict]] = {}
    for row in r["runs"]:
        by.setdefault(row["name"], []).append(row)

    def figures(name: str) -> str:
        top1, size = (statistics.mean(row[column] for row in by[name]) for column in ("top1", "size_mib"))
        if "target" not in name:
            return f"{top1:.1f} % in {1024 * size:.0f} KiB"
        payload = statistics.mean(row["payload_mib"] for row in by[name])  # which a target is of
        return f"{top1:.1f} % in {payload:.3f} MiB, {1024 * size:.0f} KiB with the file's header"

    own = "DiffQ, penalty 5"
    others = "; ".join(f"{name} {figures(name)}" for name in by if name != "fp32")
    return [
        f"| Accuracy, ResNet-20, mnist5k, {seeds(len(by[own]))}, DiffQ with penalty 5 | {figures(own)} | {figures('fp32')} | {others} |"
    ]


def binary(r: dict) -> list[str]:
    """The layers of the bars, on the best ISA and on AVX2."""
    rows = []
    alone = {row["layer"]: row["speedup"] for row in r.get("avx2_alone", [])}
    names = {"conv 3x3, 256@14x14": "3x3 convolution, 256@14²", "conv 3x3, 64@56x56": "3x3 convolution, 64@56²"}
    names |= {"conv 3x3, 16@32x32": "3x3 convolution, 16@32²", "linear 4096x4096, batch 1": "linear 4096²"}
    for name, words in names.items():
        sides = next(row["sides"] for row in r["results"] if row["layer"] == name)
        isa = [side for side in sides if side.startswith("binary")][-1]
        times = {side: f"{t['median_s'] * 1e3:.3f}" for side, t in sides.items()}
        others = "; ".join(f"{side} {times[side]}" for side in sides if side.endswith("int8"))
        avx2 = f", {alone[name]:.1f} where both have AVX2 only" if name in alone else ""
        avx2 = short(avx2, alone[name], BINARY_ASKED[name]) if avx2 else avx2
        rows.append(
            f"| Binary {words}, batch 1, {r['threads']} thread, {isa.split(', ')[1]}, ms | {times[isa]} | {times['fp32']} | "
            f"{as_fast(sides[isa]['speedup'])}{avx2}; {others} |"
        )
    return rows


def few_bits(r: dict) -> list[str]:
    """Beside our own 8 bits, on every ISA."""
    first, rows = r["results"][0], []
    layer = first["layer"].replace("conv ", "convolution ")
    for isa, times in first["isas"].items():
        for name, words in (("ternary", "Ternary {}, 8-bit inputs"), ("1x2 bits", "DoReFa {}, 1-bit weights, 2-bit inputs")):
            gains, t = [row["isas"][isa][name]["speedup"] for row in r["results"]], times[name]
            found = f"{min(gains):.2f} to {max(gains):.2f}"
            found = short(found, min(gains), TERNARY_ASKED) if name == "ternary" else found
            rows.append(
                f"| {words.format(layer)}, batch 1, 1 thread, {isa}, ms | {1e3 * t['median_s']:.3f} | "
                f"{1e3 * times['8 bits']['median_s']:.3f} (our 8 bits) | {as_fast(t['speedup'], 2)}; {len(gains)} layers: {found} |"
            )
    return rows


def binary_models(r: dict) -> list[str]:
    """Whole networks, each side in its best memory format."""
    rows = []
    for results in ("results", "avx512_alone", "avx2_alone"):
        for row in r.get(results, []):
            isa = r["isa"] if results == "results" else f"everything on {results.removesuffix('_alone')}"
            best = {kind: min(t["median_s"] for side, t in row["sides"].items() if kind in side) * 1e3 for kind in ("binary", "fp32")}
            int8 = {side: t["median_s"] * 1e3 for side, t in row["sides"].items() if side.endswith("int8")}
            others = "; ".join(f"{side} {t:.2f}" for side, t in int8.items())
            gain = f"{min(int8.values()) / best['binary']:.2f} times as fast as the best int8"
            gain = short(gain, min(int8.values()) / best["binary"], INT8_ASKED) if row["model"] == "resnet18" else gain
            rows.append(
                f"| Binary {row['model']}, batch 1, {r['threads']} thread, {isa}, ms | {best['binary']:.2f} | {best['fp32']:.2f} | "
                f"{as_fast(best['fp32'] / best['binary'])}, {gain}{as_modules(row['sides'], 'binary')}; {others} |"
            )
    return rows


def binary_accuracy(r: dict) -> list[str]:
    """Few bits on mnist5k: 1 bit with what costs nothing in inference, and DoReFa's cure."""
    by = {row["name"]: row for row in r["table"]}

    def accuracy(name: str) -> str:
        return f"{by[name]['top1']:.2f} ± {by[name]['spread']:.2f} %"

    full, best = by["baseline"], "xnor a1w1, rectified, polynomial"
    shown = [name for name in by if "rate held" not in name and name not in ("baseline", best)]
    others = "; ".join(f"{name} {accuracy(name)} in {by[name]['file_bytes'] / 1024:.0f} KiB" for name in shown)
    held = {part: accuracy(f"dorefa a2w2, rate held, {part}") for part in ("published", "scale adjusted", "statistics anew", "both")}
    return [
        f"| Accuracy, ResNet-20 of width 8, mnist5k, {seeds(full['seeds'])}, 1-bit weights and inputs | {accuracy(best)} in "
        f"{by[best]['file_bytes'] / 1024:.0f} KiB | {accuracy('baseline')} in {full['file_bytes'] / 1024:.0f} KiB | {others} |",
        f"| Accuracy of the same, DoReFa at 2 bits, learning rate held at 0.1, batch norms re-estimated | {held['statistics anew']} | "
        f"{held['published']} (as published) | with adjusted scales {held['both']}; adjusted scales alone {held['scale adjusted']} |",
    ]
