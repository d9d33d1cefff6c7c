"""Checkpoints: everything a run needs to continue to the very same numbers, in one file that is never half written."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import files
import options
import weights

FORMAT = "quantize example, version 1"
# What every checkpoint holds; `options` and `ranks` more closely.
ENTRIES = {
    "identity": dict, "options": dict, "epoch": int, "step": int, "best": (int, float), "model": dict, "optimizer": dict, "scaler": dict,
    "ranks": list,
}  # fmt: skip


def save(run, file: Path) -> None:
    """Write `run` to `file`. Every process of the run calls this; the first one writes."""
    ranks = run.processes.gather({"random": random_state(), "activation": activation_state(run.model), "totals": run.totals.tolist()})
    if not run.processes.first:
        return
    content = {
        "format": FORMAT,
        "identity": identity(run.args),
        "options": options.decisive(run.args),  # a resumed run that differs in one is told so
        "epoch": run.epoch,
        "step": run.step,
        "best": run.best,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "bits": run.bits and run.bits.state(),
        "skipped": [run.skipped, run.skipped_in_a_row],
        "clock": [run.seconds, run.times],
        "ranks": ranks,
    }
    write(content, file)


def write(content: dict, file: Path) -> None:
    """torch.save that a crash cannot leave half done."""
    with files.replacing(file, to_disk=True) as temporary:
        torch.save(content, temporary)


def read(file: Path, args, flag: str = "--resume", full_precision: bool = False) -> dict:
    """Content of a checkpoint of the model that `args` describe, or of its `full_precision` form.

    FileNotFoundError or ValueError otherwise, beginning with the `flag` that names the file. The entry `where` is added: both, for what
    may come up later.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{flag}: expected a checkpoint file; there is none at {file}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged pickle or zip raises
        raise ValueError(f"{flag}: {file} is damaged or no checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{flag}: expected {file} to be a checkpoint of this script ({FORMAT!r}); got {found}")
    _check_entries(content, f"{flag}: expected {file} to hold")
    expected = identity(args) | ({"weights": weights.FLOAT} if full_precision else {})
    found = {**content["identity"], "weights": content["identity"].get("weights", weights.FLOAT)}
    if found != expected:
        asked, held = (", ".join(f"{k} {v}" for k, v in model.items()) for model in (expected, found))
        raise ValueError(f"{flag}: {file} is of another model: expected {asked}; the file holds {held}")
    return content | {"where": f"{flag}: {file}"}


def _check_entries(content: dict, expected: str) -> None:
    """ValueError that begins with `expected` where an entry is missing or of another type than save() writes."""
    for name, kind in ENTRIES.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{expected} {name!r}; got {f'{content[name]!r:.60}' if name in content else 'none'}")
    for name in ("batch_size", "epochs"):
        if not isinstance(content["options"].get(name), int):
            raise ValueError(f"{expected} {name!r} among its 'options'; got {content['options'].get(name)!r:.60}")
    if not content["ranks"] or not all(isinstance(own, dict) and "activation" in own for own in content["ranks"]):
        raise ValueError(f"{expected} the state of each process as 'ranks'; got {content['ranks']!r:.60}")


def load_weights(model, content: dict) -> None:
    """The checkpoint's weights into `model`; ValueError if they are not this model's."""
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise ValueError(f"{content['where']} holds weights that are not the model's: {error}") from error


@contextmanager
def _reading(content: dict) -> Iterator[None]:
    """What entries of the right type but of other content come to in the block, as a ValueError that names the file."""
    try:
        yield
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{content['where']} is damaged or of another run: {type(error).__name__}: {error}") from error


def restore(run, content: dict) -> None:
    """Put `run` where the checkpoint `content` was taken; for an evaluation only the model matters."""
    load_weights(run.model, content)
    ranks, world = content["ranks"], run.processes.world
    own = ranks[run.processes.rank % len(ranks)]
    with _reading(content):
        load_activation_state(run.model, own["activation"])
    if run.args.evaluate:
        return
    asked = vars(run.args)
    differing = [f"{k} {v} -> {asked.get(k)}" for k, v in content["options"].items() if v != asked.get(k)]
    if len(ranks) != world:
        differing.append(f"processes {len(ranks)} -> {world}")
    if differing:
        if content["step"] and (len(ranks) != world or content["options"]["batch_size"] != run.args.batch_size):
            raise ValueError(
                f"--resume: the checkpoint was taken inside an epoch, at step {content['step']} of {len(ranks)} processes with batches of "
                f"{content['options']['batch_size']}; got {world} processes with batches of {run.args.batch_size}"
            )
        warnings.warn(f"resuming with other options than the checkpoint's, so to other numbers: {'; '.join(differing)}", stacklevel=2)
    run.epoch, run.step, run.best = content["epoch"], content["step"], content["best"]
    with _reading(content):
        run.optimizer.load_state_dict(content["optimizer"])
        if content["scaler"]:  # empty of a run without one
            run.scaler.load_state_dict(content["scaler"])
        if run.bits is not None:
            run.bits.load_state(content["bits"])
        run.skipped, run.skipped_in_a_row = content.get("skipped", (0, 0))
        run.seconds, run.times = content.get("clock", (0.0, []))
        run.totals.copy_(torch.tensor(own["totals"], dtype=torch.float64))
        set_random_state(own["random"])
    for group in run.optimizer.param_groups:
        if run.bits is None or group is not run.bits.group:  # as the options have it now
            group["momentum"], group["weight_decay"] = run.args.momentum, run.args.weight_decay


def identity(args) -> dict:
    """What a checkpoint and a run must have in common."""
    model = {"arch": args.arch, "width": args.width, "num_classes": args.num_classes, "dataset": args.dataset}
    return model | {"weights": weights.label(args)}


def activation_state(model):
    """The adaptive state (bits, sensitivities, gradient magnitudes) of a compressed model; None of a plain one."""
    return model.activation_state() if hasattr(model, "activation_state") else None


def load_activation_state(model, state) -> None:
    """Give a compressed model the adaptive state of another run of it; a plain model or a plain run's state changes nothing."""
    if state is not None and hasattr(model, "load_activation_state"):
        model.load_activation_state(state)


def random_state() -> dict:
    """State of every generator, in types that a checkpoint may hold."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict) -> None:
    """Undo what happened to the generators since `random_state()`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
