"""What evaluate.py measures on a checkpoint: accuracy, error of the weights, bytes of the file, latency."""

import argparse
import math
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import quantize
import torch
from torch import Tensor, nn

import data
import weights
from checkpoint import load_weights
from engine import Run, test
from interrupt import StopRequest
from learned_bits import average_bits
from models import create_model
from processes import Processes

SECONDS = 0.5  # of measuring a batch size
RUNS = (5, 50)  # of each model in that time: at least, at most


class Bench:
    """A data set to measure models on. `limit_test`: images of the test; `batches`: of training images, for calibration; `timed`: sizes of
    the batches that take the time."""

    def __init__(
        self, train_part, test_part, batch_size: int, limit_test: int | None, batches: int, device: str = "cpu", timed: tuple = (1, 128)
    ):
        self.channels, self.device, self.timed = train_part.channels, torch.device(device), timed
        part = data.Subset(test_part, limit_test) if limit_test else test_part
        self.test_loader = data.Loader(part, batch_size, train=False)
        self.train_loader, self.batches = data.Loader(train_part, batch_size, train=True), batches
        self.image = test_part.batch(torch.tensor([0]))[0]

    def measure(self, method: str, args: argparse.Namespace, content: dict) -> dict:
        """The measured columns of a row, and average bits, of the model that `args` (train.py's) describe with the weights in `content`.
        ValueError if they are another model's or its loss is not finite."""
        plain = self.create(args).eval()
        if method == "fp32":
            load_weights(plain, content)
            model, error, size, bits = plain, 0.0, state_bytes(plain), 32.0
        else:
            prepared = self.prepare(method, args, content)
            error, bits = weights.relative_mse(prepared), average_bits(prepared)
            model, size = self.pack(prepared, args)
        latencies = self.latencies(model, plain)
        loss, top1 = self.accuracy(model, args)
        if not math.isfinite(loss):
            raise ValueError(f"test loss must be finite; got {loss}")
        return {"top1": top1, "test_loss": loss, "relative_mse": error, "file_bytes": size, "average_bits": bits, **latencies}

    def create(self, args) -> nn.Module:
        """The float model, with weights of no meaning."""
        return create_model(args.arch, args.num_classes, self.channels, args.width)

    def prepare(self, method: str, args, content: dict) -> nn.Module:
        """The checkpoint's model behind its quantizers. Of `ptq` the batch norms keep the full-precision model's statistics."""
        model = self.create(args)
        if method == "qat":
            model = weights.prepare(model, args)
            load_weights(model, content)
            return model.eval()
        load_weights(model, content)
        model = weights.prepare(model, args).eval()
        if args.activation_bits:
            quantize.calibrate(model, self.training_images())
        if method == "ptq+bn":
            quantize.reestimate_batch_norm(model, self.training_images())
        return model

    def training_images(self) -> list[Tensor]:
        """Some augmented training batches, the same ones at each call."""
        return [images for images, _, _ in islice(self.train_loader.epoch(0), self.batches)]

    def pack(self, prepared: nn.Module, args) -> tuple[nn.Module, int]:
        """The packed model, loaded back from the file it was saved to, and the bytes of the file."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            quantize.save(quantize.convert(prepared), file)
            return quantize.load(self.create(args), file).eval(), file.stat().st_size

    def accuracy(self, model: nn.Module, args) -> tuple[float, float]:
        """Cross entropy and top-1 accuracy (percent) on the test set."""
        model = model.to(self.device)
        return test(Run(args, Processes(0, 1, self.device), model, model, None, None), self.test_loader, StopRequest())

    @torch.no_grad()
    def latencies(self, model: nn.Module, plain: nn.Module) -> dict[str, float]:
        """Median milliseconds of each of the batches on one CPU thread, of `model` and in turns with it of `plain`."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        found = {}
        try:
            for batch in self.timed:
                images = torch.randn(batch, *self.image.shape[1:])
                names = {f"latency{batch}_ms": model, f"float_latency{batch}_ms": plain}
                found |= _in_turns(names, images)
        finally:
            torch.set_num_threads(threads)
        return found


def _in_turns(models: dict[str, nn.Module], images: Tensor) -> dict[str, float]:
    times = {name: [] for name in models}
    for model in models.values():
        model(images)
    until = time.perf_counter() + SECONDS * len(models)
    for run in range(RUNS[1]):
        for name, model in models.items():
            began = time.perf_counter()
            model(images)
            times[name].append(1000 * (time.perf_counter() - began))
        if run + 1 >= RUNS[0] and time.perf_counter() > until:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def state_bytes(model: nn.Module) -> int:
    """Bytes of the model's weights as a safetensors file, which is what packed models are saved as."""
    from safetensors.torch import save

    return len(save(model.state_dict()))
