"""Learned bits: the quantizer that prepare() registers for DiffQ, and how a model's quantizers draw their noise at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import _C
from ..hooks import add_hook, add_pre_hook, remove_hooks
from ..seed import draw_seed
from .config import DiffQ
from .quantizer import WeightQuantizer

BUCKET = 4 << 20  # weights of one call: the gradients of late layers are ready, and reduced over processes, while early ones compute
NEAR = 1 / 64  # how near to its bounds the bits may start, as a part of their distance: at the bounds the sigmoid has no slope


class GroupCodes(NamedTuple):
    """A weight as files store it, its output channels first: ``low + code * range / (2^bits - 1)``.

    `codes`: int32 [numel]. `bits`: uint8 [groups]. `scales`: float32 [rows, 2], low and range; as many weights in a row share one.
    """

    codes: Tensor
    bits: Tensor
    scales: Tensor


class Drawn(NamedTuple):
    """What a forward pass made of the weights of several quantizers. `logits`, `states`: theirs, then.

    `bits`: float32 [quantizers, 2], of each one's weight: those of the noise, and whole ones as files have them.
    """

    logits: list[Tensor]
    states: list[tuple]
    bits: Tensor

    @staticmethod
    def state(logits: Tensor) -> tuple:
        """What tells whether logits have changed, but through their ``data``: its memory, and changes in place so far."""
        return logits.data_ptr(), logits._version

    def holds(self) -> bool:
        """Whether the logits are still those, and gradients asked for as then."""
        unchanged = all(self.state(own) == state for own, state in zip(self.logits, self.states, strict=True))
        return unchanged and self.bits.requires_grad == (torch.is_grad_enabled() and any(own.requires_grad for own in self.logits))


class DiffQQuantizer(WeightQuantizer):
    """A weight with noise (training) or on its grid (evaluation). `logits`: float32 [groups], by which the bits are learned."""

    # Of the forward pass under way; no part of the state.
    ready: Tensor | None = None  # the weight with noise, made together with the others
    beginner: int | None = None  # the id of the module whose call it is
    # Of the last one.
    drawn: Drawn | None = None
    optimizer = None  # a weak reference to the one that trains the bits

    def __init__(self, config: DiffQ, weight: Tensor, axis: int = 0):
        super().__init__(config, axis)
        self.numel, self.channels = weight.numel(), weight.shape[axis]
        groups, first = math.ceil(self.numel / self.group_size), first_logit(config.min_bits, config.max_bits, config.init_bits)
        self.logits = nn.Parameter(torch.full((groups,), first, dtype=torch.float32, device=weight.device))

    @property
    def group_size(self) -> int:
        """Weights of a group."""
        return self.config.group_size or self.numel

    @property
    def span(self) -> int:
        """Weights in a row that share a range."""
        return {"channel": self.numel // self.channels, "tensor": self.numel, "group": self.group_size}[self.config.range]

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as training or evaluation sees it: shape and dtype as given."""
        if not self.training:
            return on_grid(self, weight)
        ready = self.usable(weight)
        return with_noise([(self, weight)])[0][0] if ready is None else ready

    def usable(self, weight: Tensor) -> Tensor | None:
        """What this forward pass has ready, unless the weight must be made where it is used.

        So it must inside a checkpoint: code that is run again must save the same tensors, and finds the generator as it was, hence the same
        noise.
        """
        if self.ready is None or torch.compiler.is_compiling():
            return None
        in_checkpoint = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None or self.ready.requires_grad != (
            torch.is_grad_enabled() and weight.requires_grad
        )
        return None if in_checkpoint else self.ready

    @torch.no_grad()
    def bits(self) -> Tensor:
        """The bits now in force, float32 [groups]: those of the noise in training, whole ones in evaluation."""
        config = self.config
        return torch.ops.quantize.diffq_group_bits(self.logits.detach().float(), config.min_bits, config.max_bits, not self.training)

    @torch.no_grad()
    def spread(self) -> None:
        """Spreads bits that are all where they started over half a bit up and down: groups that move together would change together."""
        config, groups = self.config, len(self.logits)
        first = torch.full((), first_logit(config.min_bits, config.max_bits, config.init_bits), dtype=torch.float32, device="cpu")
        first = first.to(self.logits)
        if groups == 1 or config.max_bits == config.min_bits or not bool((self.logits == first).all()):
            return
        order = torch.arange(groups, dtype=torch.float64, device="cpu")
        places = order * (math.sqrt(5) - 1) / 2 % 1  # the golden ratio's multiples fill an interval evenly
        bits = config.min_bits + (config.max_bits - config.min_bits) * torch.sigmoid(first.double().cpu()) + places - places.mean()
        part = ((bits - config.min_bits) / (config.max_bits - config.min_bits)).clamp(NEAR, 1 - NEAR)
        self.logits.copy_(torch.logit(part))

    @torch.no_grad()
    def encode_groups(self, weight: Tensor) -> GroupCodes:
        """What evaluation makes of `weight`, as codes."""
        config, rows = self.config, _rows(self, weight.detach().float())
        bits = torch.ops.quantize.diffq_group_bits(self.logits.detach().float(), config.min_bits, config.max_bits, True)
        scales = torch.ops.quantize.diffq_round([rows], *_lists([self]))[1][0]
        low, extent = (scales[:, part].repeat_interleave(self.span)[: self.numel] for part in range(2))
        most = ((1 << bits.int()) - 1).to(bits).repeat_interleave(min(self.group_size, self.numel))[: self.numel]
        step = extent / most
        codes = torch.where(step > 0, (rows.flatten() - low) / step, 0).round().clamp(torch.zeros(()).to(most), most)
        return GroupCodes(codes.int(), bits.to(torch.uint8), scales)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.ready = self.drawn = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key not in ("ready", "beginner", "drawn", "optimizer")}


def first_logit(low: float, high: float, first: float) -> float:
    """The logit of `first` bits between `low` and `high`, or as near as they may start to these."""
    part = (first - low) / (high - low) if high > low else 0.5
    part = min(max(part, NEAR), 1 - NEAR)
    return math.log(part / (1 - part))


def _rows(quantizer: DiffQQuantizer, weight: Tensor) -> Tensor:
    return (weight.movedim(quantizer.axis, 0) if quantizer.axis else weight).contiguous()


def _lists(quantizers: list[DiffQQuantizer]) -> tuple[list, ...]:
    """The ops' arguments after the weights, streams left out."""
    return (
        [q.logits.float() for q in quantizers],  # model.half() takes them along
        [q.group_size for q in quantizers],
        [q.span for q in quantizers],
        [float(q.config.min_bits) for q in quantizers],
        [float(q.config.max_bits) for q in quantizers],
    )


def gaussian_quantiles(device: torch.device) -> Tensor:
    """The 65,536 quantiles of a normal variable of deviation 1/2, float32."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return _make_quantiles(device)  # traced: what is made now may be no more than a shape, and must not be kept
    return _kept_quantiles(device)


@cache
def _kept_quantiles(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # tensors of inference mode are of no use in training
        return _make_quantiles(device)


def _make_quantiles(device: torch.device) -> Tensor:
    places = (torch.arange(65536, dtype=torch.float64, device="cpu") + 0.5) / 65536
    return (torch.special.ndtri(places) / 2).float().to(device)


def with_noise(pairs: list[tuple[DiffQQuantizer, Tensor]]) -> tuple[list[Tensor], Tensor]:
    """The weights of all `pairs` with noise, in one call, and Drawn's bits. They must be on one device and have one kind of noise."""
    quantizers, weights = [q for q, _ in pairs], [w for _, w in pairs]
    logits, group_sizes, spans, low, high = _lists(quantizers)
    quantiles = gaussian_quantiles(weights[0].device) if quantizers[0].config.noise == "gaussian" else None
    rows = [_rows(q, w) for q, w in pairs]
    streams = list(range(len(rows)))
    noisy, bits = torch.ops.quantize.diffq(rows, logits, draw_seed(), streams, group_sizes, spans, low, high, quantiles)
    return [y.movedim(0, q.axis) if q.axis else y for q, y in zip(quantizers, noisy, strict=True)], bits


def on_grid(quantizer: DiffQQuantizer, weight: Tensor) -> Tensor:
    """The weight on the grid of its rounded bits; the gradient passes straight through."""
    y = torch.ops.quantize.diffq_on_grid([_rows(quantizer, weight)], *_lists([quantizer]))[0]
    return y.movedim(0, quantizer.axis) if quantizer.axis else y


def diffq_quantizers(model: nn.Module) -> Iterator[DiffQQuantizer]:
    """All quantizers of `model` with learned bits, each once, in module order."""
    if torch.compiler.is_compiling():
        return (module for module in model.modules() if isinstance(module, DiffQQuantizer))
    return iter(_C.modules_of(model, DiffQQuantizer))


def begin_forward(model: nn.Module, args=None) -> None:
    """Forward pre-hook of a prepared model: all weights of this step get their noise, bucket by bucket."""
    if not model.training or torch.compiler.is_compiling():
        return
    buckets: dict[tuple, list] = {}
    for quantizer, weight in _parameters_with_noise(model):
        if not quantizer.training or quantizer.beginner not in (None, id(model)):
            continue  # frozen; or begun by a module around this one
        vars(quantizer)["beginner"] = id(model)  # Module's own way to set an attribute looks through all of its dictionaries first
        buckets.setdefault((weight.device, quantizer.config.noise), []).append((quantizer, weight))
    for bucket in buckets.values():
        for pairs in _shared_out(bucket):
            _fill(pairs)


def _parameters_with_noise(model: nn.Module) -> Iterator[tuple[DiffQQuantizer, Tensor]]:
    """Every quantizer with the parameter that it alone stands before, once."""
    found = set()
    for chain in _C.modules_of(model, parametrize.ParametrizationList):
        if len(chain._modules) == 1 and chain.is_tensor:
            (quantizer,) = chain._modules.values()
            if isinstance(quantizer, DiffQQuantizer) and quantizer not in found:
                found.add(quantizer)
                yield quantizer, chain.original


def _shared_out(pairs: list) -> Iterator[list]:
    """In their order, some more than BUCKET weights at a time."""
    begin = weights = 0
    for end, (quantizer, _) in enumerate(pairs, 1):
        weights += quantizer.numel
        if weights > BUCKET or end == len(pairs):
            yield pairs[begin:end]
            begin, weights = end, 0


def _fill(pairs: list[tuple[DiffQQuantizer, Tensor]]) -> None:
    noisy, bits = with_noise(pairs)
    logits, drawn = [quantizer.logits for quantizer, _ in pairs], None
    # It outlives the forward pass: not where it would hold a graph, and not without knowing when it is out of date.
    if all(own.is_leaf and not own.is_inference() for own in logits) and not torch._C._len_torch_dispatch_stack():
        drawn = Drawn(logits, [Drawn.state(own) for own in logits], bits)
    for (quantizer, _), ready in zip(pairs, noisy, strict=True):
        vars(quantizer).update(ready=ready, drawn=drawn)


def total_bits(quantizers: list[DiffQQuantizer], rounded: bool) -> Tensor:
    """The bits of all weights of `quantizers` together, float32 scalar: of those of the noise, or whole ones. Differentiable.

    In training, counted with the noise of the last forward pass where that has drawn it for just these, from logits that are as they were.
    """
    drawn = {id(q.drawn): q.drawn if q.training else None for q in quantizers}
    known = [own for every in drawn.values() if every is not None for own in every.logits]
    same = len(known) == len(quantizers) and {id(own) for own in known} == {id(q.logits) for q in quantizers}
    if same and all(every is not None and every.holds() for every in drawn.values()) and not torch.compiler.is_compiling():
        return sum(every.bits[:, int(rounded)].sum() for every in drawn.values())
    return torch.ops.quantize.diffq_total_bits(
        [q.logits.float() for q in quantizers],
        [q.numel for q in quantizers],
        [q.group_size for q in quantizers],
        [float(q.config.min_bits) for q in quantizers],
        [float(q.config.max_bits) for q in quantizers],
        rounded,
    ).sum()


def read_when_ready(module: nn.Module, tensor: str) -> None:
    """Lets `module` read its parametrized `tensor` at once where a forward pass has it ready: parametrize takes 40 us for it in a step."""
    kind = type(module)  # its own: parametrize gives each module a class
    usual = vars(kind)[tensor]

    def read(own: nn.Module) -> Tensor:
        chain = own._modules["parametrizations"]._modules[tensor]
        quantizer = chain._modules.get("0")
        if len(chain._modules) == 1 and isinstance(quantizer, DiffQQuantizer) and quantizer.ready is not None and quantizer.training:
            original = chain._parameters.get("original")  # DataParallel's replicas have none
            ready = None if original is None else quantizer.usable(original)
            if ready is not None:
                return ready
        return usual.fget(own)

    setattr(kind, tensor, property(read, usual.fset))


def end_forward(model: nn.Module, args=None, output=None) -> None:
    """Forward hook, called after an exception too: what this call made is let go of."""
    if torch.compiler.is_compiling():
        return
    for quantizer in diffq_quantizers(model):
        if quantizer.beginner == id(model):
            vars(quantizer).update(ready=None, beginner=None)


def draw_together(model: nn.Module) -> None:
    """Registers the two hooks, once."""
    if begin_forward not in model._forward_pre_hooks.values():
        add_pre_hook(model, begin_forward)
        add_hook(model, end_forward, always_call=True)


def stop_drawing(model: nn.Module) -> None:
    """Takes the hooks out, wherever they are."""
    for module in model.modules():
        remove_hooks(module, lambda hook: hook is begin_forward or hook is end_forward)
