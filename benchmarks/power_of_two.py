"""How much better PO2+ is than PO2: relative mean squared error on N(0, 1), alone and under a scale for each channel.

PO2+ is the nearest power of two, so without a scale its gain is what the thresholds alone are worth. A scale moves every threshold and
level together, and the best scale makes up for most of the difference.

python benchmarks/power_of_two.py [--channels 8192] [--elements 2304]
"""

import argparse
import math

import torch
from results import write

import quantize

ops = torch.ops.quantize


def measure(x: torch.Tensor, quantized: dict[bool, torch.Tensor]) -> dict[str, float]:
    """Of {plus: quantized x}: relative errors, the gain of PO2+, and the gain's standard error over channels."""
    squares = x.double().square().sum(1)
    errors = {plus: (y - x).double().square().sum(1) for plus, y in quantized.items()}
    po2, plus = (float(errors[p].sum() / squares.sum()) for p in (False, True))
    kept = plus / po2
    deviation = float((errors[True] - kept * errors[False]).std()) / math.sqrt(len(x)) / float(errors[False].mean())
    return {"po2": po2, "po2plus": plus, "gain_percent": 100 * (1 - kept), "gain_standard_error": 100 * deviation}


def quantized(x: torch.Tensor, bits: int | None, plus: bool, least_squares: bool) -> torch.Tensor:
    if bits is None:
        return quantize.power_of_two(x, plus=plus)
    return ops.channel_quantize(x, "po2plus" if plus else "po2", bits, least_squares)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=8192)
    parser.add_argument("--elements", type=int, default=2304, help="weights of a channel; 2304 is 256 x 3 x 3")
    args = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(args.channels, args.elements)
    cases = [("no scale, all exponents", None)] + [(scale, bits) for scale in ("largest weight", "least squares") for bits in (2, 3, 4, 5)]
    results = []
    print(f"relative MSE on N(0, 1), {args.channels} channels of {args.elements}")
    print(f"{'scale':26}{'bits':>5}{'PO2':>10}{'PO2+':>10}{'gain of PO2+, %':>20}")
    for name, bits in cases:
        row = measure(x, {plus: quantized(x, bits, plus, name == "least squares") for plus in (False, True)})
        gain = f"{row['gain_percent']:.2f} ± {2 * row['gain_standard_error']:.2f}"
        print(f"{name:26}{bits or '':>5}{row['po2']:10.5f}{row['po2plus']:10.5f}{gain:>20}")
        results.append({"scale": name, "bits": bits, **row})
    write("power_of_two", {"channels": args.channels, "elements": args.elements, "results": results})


if __name__ == "__main__":
    main()
