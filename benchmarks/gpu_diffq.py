"""What DiffQ costs in a training step on a GPU, optimizers, penalty and guard included.

python benchmarks/gpu_diffq.py [--rounds 30] [--output FILE]
"""

import argparse
from pathlib import Path

from diffq_step import measure_step
from results import write

STEPS = {"resnet18": ("resnet18_cifar", (16, 128)), "mobilenet": ("mobilenet", (32, 128))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--output", type=Path, help="instead of results/gpu_diffq.json")
    args = parser.parse_args()
    results = {}
    for name, (arch, batches) in STEPS.items():
        for batch in batches:
            sides = measure_step(arch, batch, args.rounds, args.group_size, "cuda")
            results[f"{name}, batch {batch}"] = sides
            print(f"{name}, batch {batch}: plain {1e3 * sides['plain']['median_s']:.2f} ms, DiffQ {sides['diffq']['ratio']:.3f} of it")
    write("gpu_diffq", {"group_size": args.group_size, "rounds": args.rounds, "results": results}, args.output)


if __name__ == "__main__":
    main()
