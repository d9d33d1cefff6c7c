"""Nanoseconds an element of the CPU kernels, beside a copy of the same tensor and beside the same thing in eager PyTorch.

python benchmarks/kernels.py [--mib 128] [--rounds 15]
"""

import argparse

import torch
from results import write
from timing import interleave, keep_pages, summarise

import quantize

GROUP = 256
ops = torch.ops.quantize


def eager_quantize(x: torch.Tensor, bits: int):
    """Group quantization as one would write it in PyTorch: codes in bytes, then 8/bits of them or-ed together."""
    levels = 2**bits - 1
    groups = x.view(-1, GROUP)
    low, high = groups.aminmax(dim=1, keepdim=True)
    scale = (high - low) / levels
    codes = ((groups - low) / scale + torch.rand_like(groups)).floor_().clamp_(0, levels).to(torch.uint8)
    parts = codes.view(-1, 8 // bits)
    packed = parts[:, 0].clone()
    for i in range(1, 8 // bits):
        packed |= parts[:, i] << (bits * i)
    return packed, low, scale


def eager_dequantize(packed: torch.Tensor, low: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of eager_quantize."""
    mask = 2**bits - 1
    codes = torch.stack([(packed >> (bits * i)) & mask for i in range(8 // bits)], dim=1)
    return codes.view(-1, GROUP).float() * scale + low


def sides(x: torch.Tensor, eager: bool) -> dict:
    """Name to function; every one reads or writes x.numel() elements."""
    y, seed = torch.empty_like(x), torch.tensor([1, 2])
    shape, stride = list(x.shape), list(x.stride())
    runs = {"copy": lambda: y.copy_(x)}
    for bits in (1, 2, 4, 8):
        packed = ops.group_quantize(x, bits, GROUP, seed)
        runs[f"quantize {bits} bit"] = lambda bits=bits: ops.group_quantize(x, bits, GROUP, seed)
        runs[f"unpack {bits} bit"] = lambda bits=bits, packed=packed: ops.group_dequantize(
            *packed, None, bits, GROUP, shape, stride, x.dtype, seed
        )
    runs["variance of 1, 2, 4, 8 bit"] = lambda: ops.group_variance(x, GROUP)
    mask = ops.clip_mask(x, 0.0, float("nan"), 0.0)[1]
    runs["relu with mask"] = lambda: ops.clip_mask(x, 0.0, float("nan"), 0.0)
    runs["relu (PyTorch)"] = lambda: torch.relu(x)
    runs["relu backward by mask"] = lambda: ops.apply_mask(x, mask, 1.0, 0.0)
    runs["relu backward (PyTorch)"] = lambda: torch.ops.aten.threshold_backward(x, y, 0)
    if eager:
        held = eager_quantize(x, 2)
        runs["eager quantize 2 bit"] = lambda: eager_quantize(x, 2)
        runs["eager unpack 2 bit"] = lambda: eager_dequantize(*held, 2)
    return runs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=128, help="size of the fp32 tensor")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    samples = 64
    elements = args.mib * 2**20 // 4
    results = []
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for isa in quantize._C.supported_isas()[1:] or ["portable"]:
            quantize._C.set_cpu_isa(isa)
            x = torch.randn(samples, elements // samples)
            times = summarise(interleave(sides(x, eager=True), args.rounds), "copy")
            print(f"\n{threads} thread(s), {isa}, {args.mib} MiB fp32, groups of {GROUP}, median of {args.rounds} rounds")
            for name, t in times.items():
                ns = t["median_s"] / elements * 1e9
                print(f"  {name:28} {ns:7.3f} ns an element   {t['ratio']:6.2f} x copy")
                results.append({"threads": threads, "isa": isa, "kernel": name, "ns_per_element": ns, "ratio_to_copy": t["ratio"]})
    write("kernels", {"mib": args.mib, "group_size": GROUP, "rounds": args.rounds, "results": results})


if __name__ == "__main__":
    keep_pages()
    main()
