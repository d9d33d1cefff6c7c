"""measure_sensitivity(): forward passes with one layer, or two, at few bits."""

from __future__ import annotations

import fnmatch
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from ..weight.config import Uniform
from ..weight.prepare import tensor_names
from .arguments import check_float_model, check_weights, checked_batches
from .choices import check_choices, config_of
from .costs import bit_operations, stored_bytes
from .metrics import KL, Loss, cross_entropy
from .sensitivity import Sensitivity
from .survey import METHODS, WHO, Survey

METRICS = ("kl", "loss")


@torch.inference_mode(False)  # whose tensors count no versions, by which what is written into is seen
def measure_sensitivity(
    model: nn.Module,
    batches: Iterable,
    choices: Sequence[tuple[int | None, int | None]],
    method: str = "gauss_newton",
    metric: str = "kl",
    quantizer=Uniform,
    *,
    skip: Sequence[str] = (),
    groups: Mapping[str, str | Sequence[str]] | None = None,
    loss_fn: Callable | None = None,
    checkpoint=None,
    progress: bool = True,
) -> Sensitivity:
    """Measures what few bits in each layer, and in pairs of layers, do to a trained float model. Nothing of the model changes.

    Every convolution, linear, recurrent and attention layer is quantized in turn to every choice, as :func:`quantize.prepare` would do
    it, its input's step set from `batches` as :func:`quantize.calibrate` would; what comes before it is not computed again. The four ways
    of CLADO's code are ``"diagonal"`` with ``"loss"`` (its `naive`), ``"clado"`` with ``"loss"`` (CLADO) or ``"kl"`` (its `KL`), and
    ``"diagonal"`` with ``"kl"`` (ZeroQ).

    `bytes` are those that :func:`quantize.save` will write, to the byte, but where inputs have 1 bit: batch norms that become thresholds
    belong to two layers at once, and their few bytes a channel may be missing or counted twice.

    Under torchrun, with a process group, each process measures a part; all must be given the same batches and get the same result.

    Args:
        model: a float model; its outputs are logits [N, classes, ...], but for metric ``"loss"`` with a `loss_fn` of its own.
        batches: (inputs, targets) pairs, kept in memory; inputs a Tensor, a tuple of positional or a dict of keyword arguments; targets
            are used by metric ``"loss"`` only. A few hundred samples do.
        choices: (weight_bits, activation_bits) pairs; activation_bits None: inputs not quantized; (None, None): not quantized at all.
        method: ``"gauss_newton"``: ``E[dz' H dz] / 2``, dz the logits' change by one layer, H = diag(p) - pp'; 1 + L*K forward passes,
            always positive semidefinite. ``"composed"``: from the same passes; KL of pairs by putting two layers' changes of the logits
            together, so that they saturate; the matrix is of log(1 + KL) and made positive (:meth:`Sensitivity.projected`). ``"clado"``:
            every pair of layers is measured, up to (L*K)^2 / 2 partial forward passes: the slowest by far. Where 2 bits break layers,
            :func:`allocate` needs its ``saturated().projected()``. ``"diagonal"``: no cross terms.
        metric: ``"kl"``: KL(float || quantized), in nats; ``"loss"``: the growth of `loss_fn`.
        quantizer: Uniform, PowerOfTwo, DoReFa, DiffQ, Ternary, XNOR, or a function (weight_bits, activation_bits) -> configuration.
        skip: glob patterns over names of layers that stay in full precision.
        groups: ``{group name: glob patterns}`` of layers that must have the same bits, such as a residual stage; measured as one. Layers
            that share a weight are one in any case.
        loss_fn: ``loss_fn(output, targets)``, mean over samples; cross-entropy if not given.
        checkpoint: path of a file where an interrupted measurement goes on to the same result; it is removed in the end.
        progress: show a bar with the time that is left.

    Returns:
        Sensitivity: the matrix, bytes and bit operations of every layer at every choice, for :func:`quantize.allocate`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        FileNotFoundError: `checkpoint` is in no folder that exists.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> batches = [(torch.randn(64, 16), torch.randint(4, (64,)))]
        >>> sensitivity = quantize.measure_sensitivity(model, batches, [(2, 8), (4, 8), (8, 8)], progress=False)
        >>> sensitivity.layers, sensitivity.bytes.tolist()
        (('0', '2'), [[520, 520, 776], [72, 104, 168]])

    Sources: Deng et al., CLADO, arXiv 2307.05657, equation 8; Cai et al., ZeroQ, arXiv 2001.00281; Martens, arXiv 1412.1193, section 8.
    """
    check_float_model(model, WHO)
    batches = checked_batches(batches, metric, WHO)
    choices = check_choices(choices, WHO)
    if method not in METHODS:
        raise ValueError(f"{WHO}: method must be one of {', '.join(map(repr, METHODS))}; got {method!r}")
    if metric not in METRICS:
        raise ValueError(f"{WHO}: metric must be one of {', '.join(map(repr, METRICS))}; got {metric!r}")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"{WHO}: loss_fn must be callable; got {loss_fn!r}")
    if method == "composed" and metric != "kl":
        raise ValueError(f'{WHO}: metric must be "kl" with method "composed"; got {metric!r}')
    if loss_fn is not None and (metric != "loss" or method == "gauss_newton"):
        raise ValueError(f'{WHO}: loss_fn belongs to metric "loss" with method "clado" or "diagonal"; got {method!r} with {metric!r}')
    if not callable(quantizer):
        raise TypeError(f"{WHO}: quantizer must be a class such as quantize.Uniform or a function; got {quantizer!r}")
    if checkpoint is not None:
        if not isinstance(checkpoint, (str, os.PathLike)):
            raise TypeError(f"{WHO}: checkpoint must be a path; got {checkpoint!r}")
        if not os.path.basename(checkpoint) or os.path.isdir(checkpoint):
            raise ValueError(f"{WHO}: checkpoint must be the path of a file; got {os.fspath(checkpoint)!r}")
        if not os.path.isdir(os.path.dirname(os.path.abspath(checkpoint))):
            raise FileNotFoundError(f"{WHO}: checkpoint must be in a folder that exists; got {os.fspath(checkpoint)}")
    if not isinstance(progress, bool):
        raise TypeError(f"{WHO}: progress must be True or False; got {progress!r}")
    configs = tuple(config_of(quantizer, choice, WHO) for choice in choices)
    members = _layers(model, skip, groups)
    layers = list(members.values())
    check_weights(model, [name for names in layers for name in names], WHO)
    measure = KL if metric == "kl" else functools.partial(Loss, loss_fn=loss_fn or cross_entropy)
    nbytes, other_bytes = stored_bytes(model, layers, configs)  # first: what cannot be converted is found before the long part
    bit_ops = bit_operations(model, batches[0][0], layers, configs)
    survey = Survey(model, batches, members, configs, method, metric, measure, checkpoint, progress)
    matrix = survey.matrix()
    try:
        shapes = {
            name: {tensor: tuple(getattr(model.get_submodule(name), tensor).shape) for tensor in tensor_names(model.get_submodule(name))}
            for names in layers
            for name in names
        }
        sensitivity = Sensitivity(
            list(members),
            choices,
            matrix,
            nbytes,
            bit_ops,
            configs=configs,
            members=members,
            shapes=shapes,
            method=method,
            metric=metric,
            samples=sum(survey.samples),
            other_bytes=other_bytes,
        )
        if method == "composed":
            sensitivity = sensitivity.saturated().projected()
    except BaseException:
        survey.save()
        raise
    survey.checkpoint.remove()  # not before all that could still fail
    return sensitivity


def _layers(model: nn.Module, skip, groups) -> dict[str, tuple[str, ...]]:
    """The modules of each layer that gets bits of its own, in module order."""
    names = [name for name, module in model.named_modules() if tensor_names(module)]
    if not names:
        raise ValueError(f"{WHO}: model must have a convolution, linear, recurrent or attention layer; it has none")
    skipped = {name for pattern in _patterns(skip, "skip") for name in _matching(pattern, names, "skip")}
    left = [name for name in names if name not in skipped]
    if not left:
        raise ValueError(f"{WHO}: skip must leave a layer; it skips all of {', '.join(names[:5])}")
    if groups is not None and not isinstance(groups, Mapping):
        raise TypeError(f"{WHO}: groups must be a mapping from names to glob patterns; got {type(groups).__name__}")
    group_of: dict[str, str] = {}
    for group, patterns in (groups or {}).items():
        if not isinstance(group, str):
            raise TypeError(f"{WHO}: groups must be a mapping from names to glob patterns; got {group!r} as a name")
        own = _patterns(patterns, f"groups[{group!r}]")
        if not own:
            raise ValueError(f"{WHO}: groups[{group!r}] must have at least one glob pattern; got none")
        for pattern in own:
            for name in _matching(pattern, left, f"groups[{group!r}]"):
                if group_of.setdefault(name, group) != group:
                    raise ValueError(f"{WHO}: groups must not overlap; {name!r} is in {group_of[name]!r} and in {group!r}")
    first: dict[int, str] = {}  # the layer that has a weight, which others may share
    placed: dict[str, str] = {}
    members: dict[str, list[str]] = {}
    for name in left:
        module = model.get_submodule(name)
        own = [id(module._parameters[tensor]) for tensor in tensor_names(module) if tensor in module._parameters]
        other = next((first[key] for key in own if key in first), None)
        group = group_of.get(name, name) if other is None else placed[other]
        if group_of.get(name, group) != group:
            raise ValueError(f"{WHO}: groups must hold all layers that share a weight; {name!r} and {other!r} are in different ones")
        first |= {key: first.get(key, name) for key in own}
        placed[name] = group
        members.setdefault(group, []).append(name)
    clash = next((g for g in groups or {} if g in left and group_of.get(g) != g), None)
    if clash is not None:
        raise ValueError(f"{WHO}: groups must not have a layer's name unless it is in the group; got {clash!r}")
    return {group: tuple(own) for group, own in members.items()}


def _patterns(patterns, argument: str) -> list[str]:
    found = [patterns] if isinstance(patterns, str) else list(patterns) if isinstance(patterns, Iterable) else [None]
    if not all(isinstance(pattern, str) for pattern in found):
        raise TypeError(f"{WHO}: {argument} must be glob patterns over layer names; got {patterns!r}")
    return found


def _matching(pattern: str, names: list[str], argument: str) -> list[str]:
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise ValueError(f"{WHO}: {argument} must match layers, such as {', '.join(map(repr, names[:3]))}; {pattern!r} matches none")
    return found
