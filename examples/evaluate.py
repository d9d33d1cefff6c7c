"""What `train.py --evaluate` prints: a checkpoint's accuracy or, with `--training-only`, the variance of its gradient."""

from torch.nn import functional as F

import checkpoint
from engine import Run, autocast, show, test
from interrupt import StopRequest


def evaluate(run: Run, train_loader, test_loader) -> dict:
    """Print and return the report on the checkpoint that `run` was restored from."""
    if run.args.training_only:
        if run.args.resume2:
            second = checkpoint.read(run.args.resume2, run.args)
            checkpoint.load_activation_state(run.model, second["ranks"][0]["activation"])
        report = variances(run, train_loader)
        text = "  ".join(f"{name} {value:.6g}" for name, value in report.items())
    else:
        loss, top1 = test(run, test_loader, StopRequest())
        report = {"test_loss": loss, "test_top1": top1}
        text = f"test loss {loss:.4f}  top-1 {top1:.2f} %"
    if run.processes.first:
        print(f"{run.args.resume}: {text}")
    return report


def variances(run: Run, loader) -> dict:
    """Overall, Quant and Sample variance of the gradient over the first `--batches` training batches, `--draws` draws each."""
    from quantize import variance_report

    run.model.train()
    with autocast(run):
        report = variance_report(run.model, Batches(run, loader), lambda output, target: loss(run, output, target), draws=run.args.draws)
    return {"Overall": report.overall, "Quant": report.quantization, "Sample": report.sample}


def loss(run, output, target):
    """The loss that the run trains with."""
    return F.cross_entropy(output, target, label_smoothing=run.args.label_smoothing)


class Batches:
    """(images, targets) of the first training batches. Handing one out tells the model whose samples come next."""

    def __init__(self, run: Run, loader):
        self.run, self.loader = run, loader

    def __len__(self) -> int:
        return min(self.run.args.batches, len(self.loader))

    def __iter__(self):
        for _, (images, targets, indices) in zip(range(len(self)), self.loader.epoch(0), strict=False):
            yield show(self.run, images, indices), targets.to(self.run.processes.device)
