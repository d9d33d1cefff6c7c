"""What a compressed layer remembers between steps, and how it packs its input."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import weakref
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import ops_for
from ..seed import draw_seed
from .config import ActivationConfig, op_group_size


class Packed(NamedTuple):
    """The tail of arguments that every layer op with a packed input takes (csrc/schema.cpp)."""

    codes: Tensor | None
    ranges: Tensor | None
    sample_bits: Tensor | None
    bits: int
    group_size: int
    seed: Tensor | None
    energy: Tensor | None


class NormOutput(NamedTuple):
    """How to make a batch norm's output, or that of a (leaky) ReLU behind it, of the norm's packed normalized input
    (csrc/layers/norm_input.h)."""

    config: ActivationConfig
    owner: LayerState
    packed: Packed
    record: Record | None
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None = None
    slope: float = 0.0  # of a leaky ReLU

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """What conv_of_norm takes after the packed tensor."""
        return self[4:]


LEARNED = ("budget", "curve", "updates", "steps", "sample_weight", "elements")  # what a checkpoint keeps of a LayerState
# Of functions that have no kernel for it (csrc/layers/smooth.h).
DERIVATIVES = {
    "sigmoid": lambda x: (s := x.sigmoid()).mul_(1 - s),
    "tanh": lambda x: x.tanh().square_().neg_().add_(1),
    "elu": lambda x: x.clamp(max=0).exp_(),
    "softplus": lambda x: x.sigmoid(),
    "cube": lambda x: x.square().mul_(3),
}
NOT_KEPT = Packed(None, None, None, 0, 0, None, None)


@dataclass
class Record:
    """One packing in the step under way: what the allocation of bits learns from it."""

    elements: int  # of a sample
    variance: Tensor  # [N, 4]: of packing at 1, 2, 4, 8 bits
    energies: list[Tensor]  # [N, 2] a consumer; filled by the backward (csrc/layers/energy.h)
    is_norm: list[bool]  # whether that consumer is a batch norm
    indices: Tensor | None  # the samples' numbers in the data set


class LayerState:
    """Per layer: its config, the bits it may spend, and the sensitivities that decide about them.

    ``budget`` is the average bits per element that the layer may use now. ``curve`` is the running mean of its weight gradient's
    variance at the averages that allocation.py follows.
    """

    def __init__(self, name: str, config: ActivationConfig):
        self.name, self.config = name, config
        self.budget = float(config.bits)
        self.used: float | Tensor = float(config.bits)
        self.curve: list[float] | None = None
        self.updates = 0
        self.steps = 0  # training forwards of the model so far
        self.elements = 0  # packed in the last step, all samples
        self.sample_weight: Tensor | None = None  # by index in the data set; NaN: not seen
        self.records: list[Record] = []
        self.order: int | None = None  # place of the last packing in its forward
        self.pending_gradients: tuple[Tensor, Tensor] | None = None  # (indices, magnitudes) of the step that ended

    def __getstate__(self):
        """Persistent parts only: records belong to a step under way and hold its tensors."""
        return {**self.__dict__, "records": [], "pending_gradients": None, "used": self.used_bits()}

    def keep_two_values(self) -> None:
        """From now on a bit an element, and nothing more: the input has two values at most, which are kept as they are."""
        self.config = replace(self.config, bits=1, max_bits=1, group_size="tensor")
        self.budget = self.used = 1.0

    def snapshot(self) -> dict:
        """What :meth:`restore` takes; later steps do not reach it."""
        weight = self.sample_weight
        return {**self.__dict__, "records": list(self.records), "sample_weight": None if weight is None else weight.clone()}

    def restore(self, values: dict) -> None:
        """Back to a :meth:`snapshot`."""
        self.__dict__.clear()
        self.__dict__.update(values)

    def learned(self) -> dict:
        """What a checkpoint keeps; allocation.py checks it."""
        return {name: getattr(self, name) for name in LEARNED}

    def used_bits(self) -> float:
        """Average bits per element in the last packing."""
        return float(self.used.float().mean()) if isinstance(self.used, Tensor) else self.used

    def draw_seed(self) -> Tensor:
        """Seed and offset of one packing's noise."""
        return draw_seed(None if torch.compiler.is_compiling() else _local.generator)

    def pack(self, x: Tensor, is_norm: bool = False) -> Packed:
        """`x`, sample axis first, packed as the config says; shared with another consumer of the same tensor in this forward."""
        seed, session = self._begin()  # drawn even if unused: how many numbers are drawn must not depend on sharing
        # Under checkpointing the second forward, which is in no session, must save tensors of the same sizes.
        shared = session.lookup(x, self.config) if session is not None and not under_checkpoint() else None
        if shared is not None:
            owner, packed, record = shared
            self.used, self.elements = owner.used, 0
            return packed._replace(energy=_join(record, is_norm))
        packed, record = self._pack(x, (), seed, session, is_norm)
        if session:
            session.remember(x, self.config, self, packed, record)
        return packed

    def pack_normalized(self, x: Tensor, mean: Tensor, inverse_std: Tensor) -> tuple[Packed, Record | None]:
        """What a batch norm makes of `x` before weight and bias, which is nobody else's, packed."""
        return self._pack(x, (mean, inverse_std), *self._begin(), True)

    def _begin(self) -> tuple[Tensor, Session | None]:
        """For a packing: its noise's seed, and the session that counts it."""
        seed, session = self.draw_seed(), current_session()
        if session:
            self.order = session.count()
        return seed, session

    def _pack(self, x: Tensor, statistics: tuple[Tensor, ...], seed: Tensor, session, is_norm: bool) -> tuple[Packed, Record | None]:
        config, group, ops = self.config, op_group_size(self.config.group_size), ops_for(x)
        if config.adaptive:
            return self._pack_adaptive(x, statistics, seed, session, is_norm)
        quantize, bits = ops.norm_quantize if statistics else ops.group_quantize, int(config.bits)
        return Packed(*quantize(x, *statistics, bits, group, seed), None, bits, group, seed, None), None

    def reuse(self, norm: NormOutput) -> Packed:
        """The packed tensor behind an input that is not packed itself."""
        self.draw_seed()  # as in pack()
        self.order = current_session().count()
        self.used, self.elements = norm.owner.used, 0
        return norm.packed._replace(energy=_join(norm.record, False))

    def pack_derivative(self, x: Tensor, function: str) -> Packed:
        """The derivative of `function` at `x`, which is nobody else's, packed."""
        config = self.config
        if function in DERIVATIVES:
            return self.pack(DERIVATIVES[function](x), is_norm=True)
        if config.adaptive:
            return self.pack(ops_for(x).smooth_derivative(x, function), is_norm=True)
        group, (seed, _) = op_group_size(config.group_size), self._begin()
        codes, ranges = ops_for(x).smooth_quantize(x, function, int(config.bits), group, seed)
        return Packed(codes, ranges, None, int(config.bits), group, seed, None)

    def fixed_bits(self) -> int:
        """For what bits do not adapt for: the config's average, or what is just above it."""
        return next(bits for bits in (1, 2, 4, 8) if bits >= self.config.bits)

    def pack_in(self, x: Tensor, bits: int) -> Packed:
        """`x`, which is nobody else's, packed in `bits` that do not adapt."""
        group, (seed, _) = op_group_size(self.config.group_size), self._begin()
        self.used = float(bits)
        codes, ranges = ops_for(x).group_quantize(x, bits, group, seed)
        return Packed(codes, ranges, None, bits, group, seed, None)

    def _pack_adaptive(
        self, x: Tensor, statistics: tuple[Tensor, ...], seed: Tensor, session, is_norm: bool
    ) -> tuple[Packed, Record | None]:
        ops, group, samples, elements = ops_for(x), op_group_size(self.config.group_size), x.shape[0], x.numel()
        variance = (ops.norm_variance if statistics else ops.group_variance)(x.detach(), *statistics, group)
        indices = session.indices if session and self.config.use_gradient else None
        if indices is not None and indices.numel() != samples:
            indices = None  # a layer that folds other axes into its batch: those are no samples of the data set
        weighted = variance if indices is None else variance * _sent(self._weights(indices), variance.device)[:, None]
        if session is not None and not under_checkpoint():
            budget = session.whole_bits(self.budget, samples, elements // samples, self.config.max_bits)
        else:  # a checkpoint's second forward, which is in no session, must come to the number of the first
            budget = min(max(round(self.budget * samples), samples), self.config.max_bits * samples)
        bits = ops.allocate_bits(weighted, budget, self.config.max_bits)
        quantize = ops.norm_quantize_mixed if statistics else ops.group_quantize_mixed
        codes, ranges = quantize(x, *statistics, bits, budget, group, seed)
        self.used = bits
        record = None
        if session and session.learns(self.config):
            record = Record(elements // samples, variance, [], [], indices)
            self.records.append(record)
        energy = _join(record, is_norm)
        self.elements = elements
        return Packed(codes, ranges, bits, 0, group, seed, energy), record

    def _weights(self, indices: Tensor) -> Tensor:
        """Gradient magnitudes of the samples' last visit; unseen ones count as the mean of the others."""
        known = self.sample_weight
        if known is None:
            return torch.ones(indices.numel(), dtype=torch.float32, device="cpu")
        inside = indices < known.numel()
        weight = torch.where(inside, known[indices.clamp(max=known.numel() - 1)], float("nan"))
        return torch.where(weight.isnan(), weight.nanmean().nan_to_num(1.0), weight)

    def remember_gradients(self, indices: Tensor, weight: Tensor) -> None:
        """Keeps the samples' gradient magnitudes, float32 on the CPU, for their next visit; 4 bytes a sample of the data set and layer."""
        size = int(indices.max()) + 1
        if self.sample_weight is None or self.sample_weight.numel() < size:
            before = 0 if self.sample_weight is None else self.sample_weight.numel()
            grown = torch.full((max(size, 2 * before),), float("nan"), dtype=torch.float32, device="cpu")
            if before:
                grown[:before] = self.sample_weight
            self.sample_weight = grown
        self.sample_weight[indices] = weight


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`. From pinned memory: of other memory a copy waits for the GPU."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _join(record: Record | None, is_norm: bool) -> Tensor | None:
    """A new consumer's energy buffer; NaN until its backward has run."""
    if record is None:
        return None
    energy = torch.full((record.variance.shape[0], 2), float("nan"), dtype=torch.float32, device=record.variance.device)
    record.energies.append(energy)
    record.is_norm.append(is_norm)
    return energy


class Session:
    """One forward of a QModule: tensors met in it are packed once, and layers learn for the next one."""

    def __init__(self, indices: Tensor | None, learning: bool):
        self.indices, self.learning = indices, learning
        self.owed = 0.0  # bits that the layers so far got too little by rounding; of a batch of few samples that adds up
        self._packed: dict[int, list[tuple]] = {}  # by the tensor's id
        self.norms: dict[int, tuple] = {}  # likewise
        self._count = 0

    def count(self) -> int:
        """Numbers the packings in the order of the forward."""
        self._count += 1
        return self._count

    def whole_bits(self, average: float, samples: int, elements: int, most: int) -> int:
        """A number of bits near `average` a sample that `samples` of `elements` each can have.

        Of the nearest such numbers it is the one that brings all layers so far closest to what they should have together.
        """
        wanted, near = _nearest_totals(average, int(samples), most)
        total = near[0]
        for other in near[1:]:
            if abs(self.owed + elements * (wanted - other)) < abs(self.owed + elements * (wanted - total)):
                total = other
        self.owed += elements * (wanted - total)
        return total

    def learns(self, config: ActivationConfig) -> bool:
        """Whether the step records variances and gradient energies for `config`'s layers."""
        return (self.learning and config.per_layer) or (config.use_gradient and self.indices is not None)

    def lookup(self, x: Tensor, config: ActivationConfig):
        """What an earlier consumer made of the very same tensor, unchanged since, under an equal config."""
        for reference, version, asked, *found in self._packed.get(id(x), ()):
            if reference() is x and version == x._version and (asked is config or asked == config):
                return found
        return None

    def remember_norm(self, y: Tensor, norm: NormOutput) -> None:
        """Offers a way to make `y`."""
        self.norms[id(y)] = (weakref.ref(y), y._version, norm)

    def remember(self, x: Tensor, config: ActivationConfig, owner: LayerState, packed: Packed, record: Record | None) -> None:
        """Offers `packed` to later consumers of `x`."""
        if not x.is_inference():
            others = [entry for entry in self._packed.get(id(x), ()) if entry[0]() is x]  # not those of a tensor that is gone
            self._packed[id(x)] = [*others, (weakref.ref(x), x._version, config, owner, packed, record)]


@functools.lru_cache(maxsize=4096)
def _nearest_totals(average: float, samples: int, most: int) -> tuple[float, tuple[int, ...]]:
    """`average` bits a sample as a total, and the whole numbers nearest to it, the nearest first, that `samples` can have together."""

    def possible(total: int) -> bool:  # as a sum of `samples` numbers out of 1, 2, 4, ..., most
        return samples <= total and total // most + (total % most).bit_count() <= samples

    wanted = min(max(float(average), 1.0), float(most)) * samples
    near = {next((b for b in range(math.ceil(wanted) - 1, samples, -1) if possible(b)), samples)}
    near |= {next((b for b in range(math.floor(wanted) + 1, most * samples) if possible(b)), most * samples)}
    if wanted.is_integer() and possible(int(wanted)):
        near.add(int(wanted))
    return wanted, tuple(sorted(near, key=lambda b: (abs(wanted - b), b)))


class _Local(threading.local):
    session: Session | None = None
    disabled = False
    generator: torch.Generator | None = None
    op = ""
    held = False


_local = _Local()


def current_session() -> Session | None:
    """The session of the QModule forward that this thread is in. What is compiled, be it a part of the model alone, is in none."""
    return None if torch.compiler.is_compiling() else _local.session


def swap_session(session: Session | None) -> Session | None:
    """Makes `session` the current one and returns the previous."""
    previous, _local.session = _local.session, session
    return previous


def session_to_reuse() -> Session | None:
    """The current session, where a convolution's input may be made of a batch norm's."""
    session = current_session()
    return None if session is None or under_checkpoint() else session


def norm_behind(y: Tensor) -> NormOutput | None:
    """How to make `y` in the backward, if it is a norm's output and unchanged since."""
    session = current_session()
    reference, version, norm = (None, None, None) if session is None else session.norms.get(id(y), (None, None, None))
    if reference is None or reference() is not y or version != y._version:
        return None
    return None if session_to_reuse() is None else norm


def under_checkpoint() -> bool:
    """Whether saved tensors go to torch.utils.checkpoint, in its first forward or in its second."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    name = getattr(hooks[0], "__qualname__", "") if hooks else ""
    return "checkpoint" in name or "recomputation" in name


def is_disabled() -> bool:
    """Whether this thread is in :func:`override` with ``disabled``, or traces by torch.jit, which is for inference."""
    return _local.disabled or torch.jit.is_tracing()


@contextlib.contextmanager
def override(disabled: bool = False, generator: torch.Generator | None = None):
    """For reports: within it this thread compresses nothing, or draws the noise's seeds from a generator of its own."""
    previous = _local.disabled, _local.generator
    _local.disabled, _local.generator = disabled, generator
    try:
        yield
    finally:
        _local.disabled, _local.generator = previous


def note_op(name: str) -> None:
    """Remembers which op is running, for reports; not where :func:`hold_op` has."""
    if not _local.held:
        _local.op = name


def hold_op(name: str) -> None:
    """Makes `name` the op until :func:`hold_op` is called with an empty one: whatever it calls is part of it."""
    _local.op, _local.held = name or _local.op, bool(name)


def noted_op() -> str:
    """The op noted last in this thread."""
    return _local.op
