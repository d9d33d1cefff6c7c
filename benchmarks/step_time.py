"""Time of a training step of preact ResNet-56 (batch 128, 32x32): plain, compressed, checkpointed a block, and packed by eager hooks.

python benchmarks/step_time.py [--rounds 5] [--formats contiguous channels_last bfloat16]

bfloat16: channels last under autocast. A turn is four steps, of which adaptive bits learn from one.
"""

import argparse
import copy

import paths  # noqa: F401
import torch
import torch.nn.functional as F
from kernels import eager_dequantize, eager_quantize
from models import create_model
from results import merged, write
from settling import STEPS, settle
from timing import interleave, keep_pages, summarise
from torch.utils.checkpoint import checkpoint

import quantize

BATCH = 128
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last, "bfloat16": torch.channels_last}


def checkpointed(model):
    """The same model with every residual block recomputed in the backward."""
    for module in list(model.modules()):
        if type(module).__name__.endswith("Block"):
            forward = module.forward
            module.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    return model


class EagerHooks(torch.autograd.graph.saved_tensors_hooks):
    """What a saved-tensor hook can do in eager PyTorch: 2 bits, groups of 256, for every large activation."""

    def __init__(self, parameters):
        own = {p.untyped_storage().data_ptr() for p in parameters}

        def pack(t):
            if t.dtype != torch.float32 or t.numel() % 256 or t.numel() < 4096 or t.untyped_storage().data_ptr() in own:
                return t
            dense = t if t.is_contiguous() else t.contiguous(memory_format=torch.channels_last)
            return t.shape, t.stride(), eager_quantize(torch.as_strided(dense, (t.numel(),), (1,)), 2)

        def unpack(held):
            if isinstance(held, torch.Tensor):
                return held
            shape, stride, packed = held
            return torch.as_strided(eager_dequantize(*packed, 2), shape, stride)

        super().__init__(pack, unpack)


def measure(arch: str, name: str, rounds: int) -> dict:
    """Times of every side, and how many times less the compressed model saves."""
    torch.manual_seed(0)
    layout, autocast = FORMATS[name], name == "bfloat16"
    plain = create_model(arch, num_classes=10, in_channels=3).to(memory_format=layout)
    fixed = quantize.QModule(copy.deepcopy(plain), quantize.ActivationConfig(bits=2, max_bits=2))
    adaptive = quantize.QModule(copy.deepcopy(plain), quantize.ActivationConfig(bits=2))
    recomputed, hooked = checkpointed(copy.deepcopy(plain)), copy.deepcopy(plain)
    x = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=layout)
    target = torch.randint(10, (BATCH,))

    def step(model):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", enabled=autocast):
            loss = F.cross_entropy(model(x), target)
        loss.backward()

    def hooked_step():
        with EagerHooks(hooked.parameters()):
            step(hooked)

    sides = {
        "plain": lambda: step(plain),
        "2 bits": lambda: step(fixed),
        "2 bits, adaptive": lambda: step(adaptive),
        "checkpoint per block": lambda: step(recomputed),
    }
    if not autocast:
        sides["eager hooks, 2 bits"] = hooked_step
    settle(adaptive, lambda: step(adaptive))
    taken = interleave({name: lambda run=run: [run() for _ in range(STEPS)] for name, run in sides.items()}, rounds)
    times = summarise({name: [t / STEPS for t in values] for name, values in taken.items()}, "plain")
    return {"saved_ratio": quantize.memory_report(fixed, x).ratio, "sides": times}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--arch", default="preact_resnet56")
    args = parser.parse_args()
    results = {}
    for name in args.formats:
        results[name] = measure(args.arch, name, args.rounds)
        print(f"\n{args.arch}, batch {BATCH}, {name}: saved {results[name]['saved_ratio']:.1f} times less")
        for side, t in results[name]["sides"].items():
            print(f"  {side:22} {t['median_s']:7.3f} s   {t['ratio']:5.3f} x plain", flush=True)
    settings = {"arch": args.arch, "batch": BATCH, "rounds": args.rounds, "threads": torch.get_num_threads()}
    write("step_time", {**settings, "results": merged("step_time", "results", results, **settings)})


if __name__ == "__main__":
    keep_pages()
    main()
