"""Fake quantization of a weight, forward and backward on one thread: nanoseconds a weight beside the same thing in eager PyTorch.

Two eager twins: one that searches the same ranges for the least-squares scale, and the cheap one whose scale is the largest weight's.

python benchmarks/fake_quantize.py [--bits 4] [--rounds 15]
"""

import argparse
import math

import torch
from results import write
from timing import interleave, keep_pages, summarise

import quantize

ops = torch.ops.quantize
SHAPE = (512, 512, 3, 3)
BOOKS = {"PO2": "po2", "PO2+": "po2plus", "uniform": "uniform"}


def ranges(book: str, bits: int) -> list[float]:
    """The candidates of csrc/weight/codebook.h, as parts of the largest weight."""
    if book == "uniform":
        return [2 ** (-c / 8) for c in range(3 if bits >= 7 else 6 if bits >= 5 else 9 if bits == 4 else 17)]
    return [2 ** ((1 - c) / 4) for c in range(10)]


def levels_of(t: torch.Tensor, book: str, bits: int) -> torch.Tensor:
    """t >= 0 rounded to levels as one would write it in PyTorch; the largest is 2^(bits-1) - 1, or 1 for powers of two."""
    if book == "uniform":
        return t.round().clamp_(max=2 ** (bits - 1) - 1)
    lowest = 2.0 ** -min(2 ** (bits - 1) - 2, 62)
    q = (t * (8 / 9) ** 0.5).log2_() if book == "po2plus" else t.log2()
    return torch.where(t <= lowest / 2, 0.0, q.round_().exp2_().clamp_(lowest, 1.0))


class Eager(torch.autograd.Function):
    """Straight through, but not to weights beyond the largest level."""

    @staticmethod
    def forward(ctx, w, book, bits, search):
        rows = w.view(w.shape[0], -1)
        size, anchor = rows.abs(), 2.0 ** (bits - 1) - 1 if book == "uniform" else 1.0
        high = size.amax(1, keepdim=True)
        if not search:
            ctx.limit = None
            return (levels_of(size * (anchor / high), book, bits) * (high / anchor)).copysign_(rows).view_as(w)
        best, factor, ratio = torch.zeros_like(high), torch.ones_like(high), torch.ones_like(high)
        for candidate in ranges(book, bits):
            t = size * (anchor / (high * candidate))
            q = levels_of(t, book, bits)
            product, square = (t * q).sum(1, keepdim=True), (q * q).sum(1, keepdim=True)
            part = (product * candidate) ** 2 / square
            better = part > best
            best, factor = torch.where(better, part, best), torch.where(better, product / square, factor)
            ratio = torch.where(better, candidate, ratio)
        span = high * ratio
        ctx.limit = span * {"uniform": (anchor + 0.5) / anchor, "po2": 2**0.5, "po2plus": 1.5}[book]
        ctx.save_for_backward(w)
        return (levels_of(size * (anchor / span), book, bits) * (span * (factor / anchor))).copysign_(rows).view_as(w)

    @staticmethod
    def backward(ctx, grad):
        if ctx.limit is None:
            return grad, None, None, None
        (w,) = ctx.saved_tensors
        return grad * (w.abs() <= ctx.limit.view(-1, *[1] * (w.dim() - 1))), None, None, None


def sides(w: torch.Tensor, grad: torch.Tensor, book: str, bits: int) -> dict:
    """Name to a forward and backward."""

    def step(function):
        return lambda: torch.autograd.grad(function(), w, grad)

    return {
        "ours": step(lambda: ops.fake_quantize(w, book, bits, True)),
        "eager, same search": step(lambda: Eager.apply(w, book, bits, True)),
        "ours, largest weight": step(lambda: ops.fake_quantize(w, book, bits, False)),
        "eager, largest weight": step(lambda: Eager.apply(w, book, bits, False)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    w = torch.randn(SHAPE).mul_(0.02).requires_grad_()
    grad = torch.randn(SHAPE)
    results = []
    print(f"weight {list(SHAPE)}, fp32, {args.bits} bits, one thread, {quantize._C.cpu_isa()}, median of {args.rounds} rounds")
    for title, book in BOOKS.items():
        with torch.no_grad():
            ours, eager = (float((f(w, book, args.bits, True) - w).square().sum()) for f in (ops.fake_quantize, Eager.apply))
        assert math.isclose(ours, eager, rel_tol=1e-4), f"the twin's error is {eager}, ours {ours}"
        times = interleave(sides(w, grad, book, args.bits), args.rounds)
        own = {"same search": summarise(times, "ours"), "largest weight": summarise(times, "ours, largest weight")}
        for name in times:
            figures = own["largest weight" if "largest" in name else "same search"][name]
            ns = figures["median_s"] / w.numel() * 1e9
            print(f"  {title:8} {name:22} {ns:8.2f} ns a weight   {figures['ratio']:6.2f} x ours")
            results.append({"codebook": title, "side": name, "ns_per_weight": ns, "ratio_to_ours": figures["ratio"]})
    figures = {"shape": SHAPE, "bits": args.bits, "threads": 1, "isa": quantize._C.cpu_isa(), "rounds": args.rounds, "results": results}
    write("fake_quantize", figures)


if __name__ == "__main__":
    keep_pages()
    main()
