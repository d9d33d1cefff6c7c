"""Command line of train.py, and what its compression flags mean in terms of quantize.ActivationConfig.

The flags of ActNN's training script are kept (README.md has the table); the rest is named as in torchvision's reference scripts.
"""

import argparse
import math
from pathlib import Path

from quantize import ActivationConfig
from torch import nn

import learned_bits
import trained
import weights
from data import DATASETS
from models import ARCHITECTURES
from said import blaming

TRUE, FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
# Where a run is, begins and is looked at from: the options that change no number of a training, but for a device's rounding.
PLACES = (
    "data", "data_path", "num_workers", "device", "workspace", "init_from", "resume", "resume2", "evaluate", "batches", "draws",
    "overwrite", "gather_checkpoints", "print_freq",
)  # fmt: skip
SEEDS = 2**32 - 2**16  # NumPy takes what is below 2**32: the seed and the processes' own, after it
COMPRESSION = ("ca", "cabits", "ibits", "pergroup", "perlayer", "usegradient", "once")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of `argv`, checked. A bad value ends the process with a message that names the flag."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.evaluate and args.resume:
        parser.set_defaults(**trained.model_options(args.resume, args))
        args = parser.parse_args(argv)
        if args.arch not in ARCHITECTURES:
            parser.error(f"--resume: expected a checkpoint of one of --arch's models; {args.resume} is of {args.arch!r}")
    args.data_path = args.data or args.data_path
    if args.lr_milestones and args.lr_scheduler != "step":
        parser.error("--lr-milestones belongs to --lr-scheduler step")
    if min(args.lr_milestones or [0]) < 0:
        parser.error(f"--lr-milestones must not be negative; got {' '.join(map(str, args.lr_milestones))}")
    if args.lr_scheduler == "step" and not args.lr_milestones:
        args.lr_milestones = sorted({args.epochs // 2, args.epochs * 3 // 4} - {0})
    for name in ("epochs", "batch_size", "print_freq", "batches", "draws", "image_size"):
        least = 2 if name == "batches" else 1  # one batch has no variance
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}; got {getattr(args, name)}")
    for name in ("width", "num_classes", "limit_train", "limit_test"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1 if given; got {getattr(args, name)}")
    for name in ("lr", "momentum", "weight_decay", "lr_warmup_epochs", "seed", "num_workers"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative; got {getattr(args, name)}")
        if not math.isfinite(getattr(args, name)):
            parser.error(f"--{name.replace('_', '-')} must be finite; got {getattr(args, name)}")
    if args.seed >= SEEDS:
        parser.error(f"--seed must be below {SEEDS}; got {args.seed}")
    if not 0 <= args.label_smoothing < 1:
        parser.error(f"--label-smoothing must be in [0, 1); got {args.label_smoothing}")
    if args.lr_warmup_epochs > args.epochs:
        parser.error(f"--lr-warmup-epochs must be at most --epochs ({args.epochs}); got {args.lr_warmup_epochs}")
    if args.evaluate and not args.resume:
        parser.error("--evaluate needs --resume CHECKPOINT, the model to evaluate")
    if args.resume2 and not (args.evaluate and args.training_only):
        parser.error("--resume2 belongs to --evaluate --training-only: it has the sensitivities that adaptive bits settle from")
    if args.once and args.compress == "qlinear":
        parser.error("--once belongs to -c quantize: with -c qlinear batch norms keep nothing packed")
    if args.cabits < 1:
        parser.error(f"--cabits must be at least 1; got {args.cabits}")
    if args.ibits not in (1, 2, 4, 8):
        parser.error(f"--ibits must be 1, 2, 4 or 8; got {args.ibits}")
    if args.ibits < args.cabits:
        parser.error(f"--ibits must be at least --cabits ({args.cabits}); got {args.ibits}")
    if args.clip_grad_norm is not None and not args.clip_grad_norm > 0:
        parser.error(f"--clip-grad-norm must be above 0; got {args.clip_grad_norm}")
    _check_effects(args, _given(argv), parser.error)
    weights.check(args, parser.error)
    learned_bits.check(args, parser.error)
    if args.workspace is None:
        args.workspace = Path("runs") / f"{args.dataset}-{args.arch}-{label(args)}-seed{args.seed}"
    last = args.workspace / "last.pt"
    with blaming("--workspace", OSError):
        taken = last.exists()
    if args.resume and not args.evaluate and taken and args.resume.resolve().parent != last.resolve().parent:
        parser.error(f"--resume: going on from {args.resume} would overwrite another run in {args.workspace}; name another --workspace")
    if args.overwrite and (args.resume or args.evaluate):
        parser.error("--overwrite is for beginning anew, without --resume or --evaluate")
    return args


def _given(argv) -> set[str]:
    """Names of the options that `argv` has."""
    parser = build_parser()
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args([]))))
    return {name for name, value in vars(parser.parse_args(argv)).items() if value is not None}


def _check_effects(args, given: set[str], error) -> None:
    """`error(text)` for a flag that nothing would come of; but where `-c fanin` is spelled out ActNN's may be there, as in its scripts."""
    owners = {} if "compress" in given else dict.fromkeys(COMPRESSION, "-c quantize|qlinear")
    if not (args.evaluate and args.training_only):
        owners |= dict.fromkeys(("batches", "draws"), "--evaluate --training-only")
    if args.dataset != "imagenet":
        owners["image_size"] = "--dataset imagenet"
    for name, owner in owners.items():
        if name in given:
            error(f"--{name.replace('_', '-')} belongs to {owner}")
    if args.resume2 and args.compress == "fanin":
        error("--resume2 belongs to -c quantize|qlinear: without compression there are no bits to adapt")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names a default where there is one; where it depends on other flags the text says what it is."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """Every flag with its default."""
    about = "Train a network, plain, with compressed activations, with low-bit weights, or both."
    parser = argparse.ArgumentParser("train.py", description=about, formatter_class=_Formatter)
    add = parser.add_argument_group("model and data").add_argument
    add("data", nargs="?", type=Path, metavar="DATA", help="same as --data-path")
    add("--arch", choices=ARCHITECTURES, default="resnet20", help="model")
    add("--width", type=int, help="channels of the model's first stage; as published if not given")
    add("--dataset", choices=DATASETS, default="mnist5k", help="data set")
    add("--data-path", type=Path, default=Path("datasets"), help="folder the data set lies in")
    add("--num-classes", type=int, help="outputs of the model; the data set's number of classes if not given")
    add("--image-size", type=int, default=224, help="side of an image after cropping, of --dataset imagenet")
    add("--limit-train", type=int, metavar="N", help="train on N images only, evenly spread over the data set")
    add("--limit-test", type=int, metavar="N", help="test on N images only")
    add("-j", "--num-workers", type=int, default=0, help="processes that prepare batches (0: none)")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=10, help="passes over the training set")
    add("--batch-size", type=int, default=128, help="images in a step of one process")
    add("--lr", type=float, default=0.1, help="peak learning rate")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--weight-decay", type=float, default=1e-4, help="of SGD, on every parameter")
    add("--lr-scheduler", choices=("cosine", "step"), default="cosine", help="cosine to zero, or a tenth at every milestone")
    add(
        "--lr-milestones", type=int, nargs="+", metavar="EPOCH", help="of the step schedule; if not given, a half and three quarters of all"
    )
    add("--lr-warmup-epochs", type=float, default=1, help="epochs of linear growth to the peak")
    add("--label-smoothing", type=float, default=0.0, help="share of the target spread over all classes")
    add("--clip-grad-norm", type=float, metavar="X", help="scale the gradients of all parameters down to this norm together")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="automatic mixed precision")
    add("--channels-last", action="store_true", help="keep activations in the NHWC memory format")
    text = "before each test take the batch norms' statistics anew from N training batches; 0: their running averages; if not given "
    text += "--weights xnor, dorefa: 100, else 0"
    add("--reestimate-bn", type=int, metavar="N", help=text)
    add("--sync-bn", action="store_true", help="batch norm over the batches of all processes together")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    add("--deterministic", action="store_true", help="let PyTorch use deterministic algorithms only (CPU runs are without it)")
    add("--seed", type=int, default=0, help="of weights, order, augmentation and noise")

    add = parser.add_argument_group("activation compression").add_argument
    choices = ("fanin", "quantize", "qlinear")
    add("-c", "--compress", choices=choices, default="fanin", help="nothing, every layer, or convolutions and linear layers only")
    _switch(add, "ca", True, "compress activations, or else have the compressing layers in full precision")
    add("--cabits", type=_number, default=2, help="average bits of an activation")
    add("--ibits", type=_number, default=8, help="most bits of a sample: above --cabits, bits adapt; equal to it, they are fixed")
    _switch(add, "pergroup", True, "a range for each group of 256 elements, or else for each sample")
    _switch(add, "perlayer", True, "adapt bits between layers too")
    _switch(add, "usegradient", False, "adapt bits by each sample's gradient magnitude")
    _switch(add, "once", False, "make a convolution's input of its batch norm's packed input in the backward")

    weights.add_flags(parser)
    learned_bits.add_flags(parser)

    add = parser.add_argument_group("checkpoints and reports").add_argument
    add("--workspace", type=Path, help="folder of checkpoints and logs; runs/DATASET-ARCH-CONFIG-seedN if not given")
    add("--overwrite", action="store_true", help="begin anew where a run lies already, which is lost")
    add("--init-from", type=Path, metavar="CHECKPOINT", help="begin with the weights of this full-precision checkpoint of the same model")
    add("--resume", type=Path, metavar="CHECKPOINT", help="continue from this file, or evaluate it")
    add("--resume2", type=Path, metavar="CHECKPOINT", help="variances: bits settle from the sensitivities in this one")
    add("--evaluate", action="store_true", help="test --resume's model, which need not be described, and stop")
    add(
        "--training-only",
        action="store_true",
        help="do not test after an epoch; with --evaluate: print gradient variances of a step of all processes",
    )
    add("--batches", type=int, default=10, help="training batches the variances are taken over")
    add("--draws", type=int, default=10, help="draws of the quantization noise for each batch")
    add("--gather-checkpoints", action="store_true", help="keep the checkpoint of every epoch, not only the last and the best")
    add("--print-freq", type=int, default=10, help="steps between updates of the progress bar")
    return parser


def decisive(args: argparse.Namespace) -> dict:
    """The options that change numbers: all others."""
    return {name: value for name, value in vars(args).items() if name not in PLACES}


def compression(args: argparse.Namespace, model: nn.Module):
    """The config that QModule takes for these options, or None for `-c fanin`."""
    if args.compress == "fanin":
        return None
    config = ActivationConfig(
        bits=args.cabits,
        max_bits=args.ibits,
        group_size=256 if args.pergroup else "sample",
        per_layer=args.perlayer,
        use_gradient=args.usegradient,
        compress_once=args.once,
        enabled=args.ca,
    )
    if args.compress == "quantize":
        return config
    linear = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
    return {"*": None, **{name: config for name, module in model.named_modules() if isinstance(module, linear)}}


def label(args: argparse.Namespace) -> str:
    """A run in a word, for folder names and plots: `fp32`, `quantize-2-8-group-layer-gradient`, `po2plus-4`."""
    words = [weights.label(args) if args.weights else "", _compression_label(args)]
    return "-".join(word for word in words if word and not (args.weights and word == "fp32"))


def _compression_label(args):
    amp = [args.amp] if args.amp != "off" else []
    if args.compress == "fanin":
        return "-".join(amp or ["fp32"])
    if not args.ca:
        return "-".join([args.compress, "off", *amp])
    adaptive = args.ibits > args.cabits
    learned = {"layer": adaptive and args.perlayer, "gradient": adaptive and args.usegradient}
    switches = {"group": args.pergroup, **learned, "once": args.once}
    return "-".join([args.compress, str(args.cabits), str(args.ibits), *(name for name, on in switches.items() if on), *amp])


def _switch(add, name, default, text):
    """`--name`, `--no-name`, and ActNN's `--name True`."""
    add(f"--{name}", type=_truth, nargs="?", const=True, default=default, metavar="BOOL", help=f"{text}; --no-{name}: off")
    add(f"--no-{name}", dest=name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _truth(text):
    if text.lower() in TRUE | FALSE:
        return text.lower() in TRUE
    raise argparse.ArgumentTypeError(f"expected True or False; got {text!r}")


def _number(text):
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number; got {text!r}")
    return int(value) if value == int(value) else value
