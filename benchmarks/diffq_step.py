"""What DiffQ costs: the op for each weight, and a whole training step beside the plain one.

python benchmarks/diffq_step.py [--rounds 15] [--group-size 8]
"""

import argparse
import copy

import paths  # noqa: F401
import torch
import torch.nn.functional as F
from models import create_model
from results import write
from timing import interleave, keep_pages, summarise

import quantize

STEPS = {"resnet18": ("resnet18_cifar", 16), "mobilenet": ("mobilenet", 32)}  # arch, batch: facebookresearch/diffq's take 1.24 and 1.29
PENALTY = 5


def eager(weight: torch.Tensor, logits: torch.Tensor, group_size: int) -> torch.Tensor:
    """The same in PyTorch's own ops."""
    bits = (2 + 13 * torch.sigmoid(logits)).repeat_interleave(group_size)[: weight.numel()].view_as(weight)
    extent = (weight.amax(1) - weight.amin(1)).unsqueeze(1)
    return weight + (torch.rand_like(weight) - 0.5) * extent / (2**bits - 1)


def measure_op(rounds: int, group_size: int) -> dict:
    """Nanoseconds a weight, forward and backward, on one thread."""
    rows, columns = 512, 4608  # a large convolution of ResNet-18
    weight = torch.randn(rows, columns, requires_grad=True)
    logits = torch.zeros(-(-rows * columns // group_size), requires_grad=True)
    seed, grad = torch.tensor([1, 2]), torch.randn(rows, columns)

    def run(forward):
        weight.grad = logits.grad = None
        forward().backward(grad)

    sides = {
        "eager": lambda: run(lambda: eager(weight, logits, group_size)),
        "fused": lambda: run(
            lambda: torch.ops.quantize.diffq([weight], [logits], seed, [0], [group_size], [columns], [2.0], [15.0], None)[0][0]
        ),
        "copy": lambda: (grad.clone(), grad.clone()),  # 16 bytes moved a weight
    }
    found = {}
    for isa in quantize._C.supported_isas():
        before = quantize._C.cpu_isa()
        quantize._C.set_cpu_isa(isa)
        found[isa] = summarise(interleave(sides, rounds), "copy")
        quantize._C.set_cpu_isa(before)
    return {isa: {name: 1e9 * side["median_s"] / weight.numel() for name, side in times.items()} for isa, times in found.items()}


def training_step(model: torch.nn.Module, optimizers: list, x: torch.Tensor, target: torch.Tensor) -> None:
    loss = F.cross_entropy(model(x), target)
    if len(optimizers) > 1:
        loss = loss + PENALTY * quantize.size_penalty(model)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def measure_step(arch: str, batch: int, rounds: int, group_size: int, device: str = "cpu") -> dict:
    """Medians and ratios of the plain step and DiffQ's, optimizers, penalty and guard included."""
    torch.manual_seed(0)
    plain = create_model(arch, num_classes=10, in_channels=3).to(device)
    learned = quantize.prepare(copy.deepcopy(plain), quantize.DiffQ(group_size))
    x, target = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    sgd = [torch.optim.SGD(plain.parameters(), 0.01, 0.9, weight_decay=1e-4)]
    weights = [p for name, p in learned.named_parameters() if not name.endswith("logits")]
    both = [torch.optim.SGD(weights, 0.01, 0.9, weight_decay=1e-4), torch.optim.Adam([{"params": []}], fused=True)]
    quantize.add_bit_parameters(both[1], learned)
    sides = {"plain": lambda: training_step(plain, sgd, x, target), "diffq": lambda: training_step(learned, both, x, target)}
    return summarise(interleave(sides, rounds, warmup=2), "plain")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--group-size", type=int, default=8)
    args = parser.parse_args()
    keep_pages()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    op = measure_op(args.rounds, args.group_size)
    torch.set_num_threads(threads)
    print("forward and backward, ns a weight, one thread")
    for isa, row in op.items():
        print(f"  {isa:10}" + "".join(f"{name:>8} {value:6.2f}" for name, value in row.items()))
    steps = {}
    for name, (arch, batch) in STEPS.items():
        steps[name] = measure_step(arch, batch, args.rounds, args.group_size)
        plain, learned = steps[name]["plain"], steps[name]["diffq"]
        times = f"plain {1e3 * plain['median_s']:.1f} ms, DiffQ {1e3 * learned['median_s']:.1f} ms"
        print(f"{name}, batch {batch}: {times}, {learned['ratio']:.3f}x")
    write("diffq_step", {"group_size": args.group_size, "op_ns_a_weight": op, "steps": steps})


if __name__ == "__main__":
    main()
