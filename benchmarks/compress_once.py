"""What compress_once is worth: bytes kept for the backward, and the variance that compression adds to the gradient.

    python benchmarks/compress_once.py [--batches 3] [--draws 10]

Bytes: networks of the zoo (on 32x32 images, or 224x224), counted on live storages. Variance: preact ResNet-56 trained on
mnist5k as gradient_variance.py trains it, in train mode, batches of 128. Groups of 256, fixed bits.
"""

import argparse
import copy

import paths  # noqa: F401
import torch
import torch.nn.functional as F
from data import Loader, load
from gradient_variance import trained
from models import create_model
from results import write

import quantize

SIDES = {
    "2 bits": quantize.ActivationConfig(2, 2),
    "2 bits, once": quantize.ActivationConfig(2, 2, compress_once=True),
    "4 bits": quantize.ActivationConfig(4, 4),
    "4 bits, once": quantize.ActivationConfig(4, 4, compress_once=True),
}
NETWORKS = {  # pixels, classes
    "preact_resnet56": (32, 10), "resnet56": (32, 10), "vgg16": (32, 10), "densenet121": (32, 10), "mobilenet": (32, 10),
    "wide_resnet": (32, 10), "dla": (32, 10), "resnet18": (224, 1000), "resnet50": (224, 1000), "efficientnet_b0_imagenet": (224, 1000),
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--draws", type=int, default=10)
    args = parser.parse_args()
    memory, batch = {}, 4
    for arch, (pixels, classes) in NETWORKS.items():
        x = torch.randn(batch, 3, pixels, pixels)
        reports = {name: quantize.memory_report(quantize.QModule(create_model(arch, classes), config), x) for name, config in SIDES.items()}
        per_image = {name: report.saved_bytes / batch / 2**20 for name, report in reports.items()}
        plain = next(iter(reports.values())).baseline_bytes / batch / 2**20
        memory[arch] = {"pixels": pixels, "plain_mib": plain, "saved_mib": per_image}
        figures = ", ".join(f"{name} {mib:.3f} ({plain / mib:.1f} times less)" for name, mib in per_image.items())
        print(f"{arch}, {pixels}x{pixels}, MiB an image: plain {plain:.2f}, {figures}", flush=True)

    model = trained("preact_resnet56", 6).to(memory_format=torch.contiguous_format).train()
    batches = []
    for images, target, _ in Loader(load("mnist5k")[0], 128, train=True, seed=1).epoch(0):
        batches.append((images, target))
        if len(batches) == args.batches:
            break
    variance = {}
    for name, config in SIDES.items():
        report = quantize.variance_report(quantize.QModule(copy.deepcopy(model), config), batches, F.cross_entropy, args.draws)
        variance[name] = report.quantization
        print(f"{name}: added variance {report.quantization:.5f}, of the batches {report.sample:.3f}", flush=True)
    settings = {"batch": batch, "batches": args.batches, "draws": args.draws, "arch": "preact_resnet56"}
    write("compress_once", {**settings, "memory": memory, "variance": variance, "sample_variance": report.sample})


if __name__ == "__main__":
    main()
