"""Activations with learned bits and a learned end (NIPQ, CVPR 2023), and what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..checks import check_module
from ..seed import draw_seed
from .config import DiffQ
from .diffq import first_logit
from .lsq import ActivationQuantizer, Observer
from .quantizer import SMALLEST_STEP

MOST_BITS = 8  # of an input that integer kernels take


class LearnedBitsQuantizer(ActivationQuantizer):
    """``x`` clipped to [0, bound], or [-bound, bound] where the first tensor has negative values, with the noise of learned bits.

    In evaluation, and converted, it is on the grid of 2^b levels, b rounded. The clipping is learned together with the bits, so that few
    bits find a narrow range. The bound's gradient is scaled as a learned step's (LSQ). Source: NIPQ (Shin et al., CVPR 2023), section 3.
    """

    optimizer = None  # a weak reference to the one that trains the bits

    def __init__(self, config: DiffQ, device=None):
        nn.Module.__init__(self)
        self.least, self.most = config.min_bits, min(config.max_bits, MOST_BITS)
        self.bound = nn.Parameter(torch.ones((), dtype=torch.float32, device=device))
        first = first_logit(self.least, self.most, min(config.init_bits, self.most))
        self.logits = nn.Parameter(torch.full((1,), first, dtype=torch.float32, device=device))
        self.register_buffer("signed", torch.zeros((), dtype=torch.int64, device=device))  # 0 or 1, as `seen`
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64, device=device))
        self.initialized = self.is_signed = False  # what the buffers hold, known without waiting for the device
        self.zeros = False
        self.observer: Observer | None = None
        self.features: int | None = None  # elements of a sample, in the last forward pass

    @property
    def bits(self) -> int:
        """The rounded bits. Waits for the device."""
        return int(torch.ops.quantize.diffq_group_bits(self.logits.detach().float(), self.least, self.most, True))

    @property
    def step(self) -> Tensor:
        """Between two levels of the grid."""
        return self.bound.detach().float().clamp(min=SMALLEST_STEP) * (1 + self.is_signed) / self.levels

    @property
    def zero_point(self) -> Tensor:
        """The level of zero."""
        return torch.full_like(self.bound, 2 ** (self.bits - 1) if self.is_signed else 0, dtype=torch.float32, requires_grad=False)

    def learned(self) -> Tensor:
        """The bits of the noise, differentiable, without rounding."""
        return self.least + (self.most - self.least) * torch.sigmoid(self.logits.float().nan_to_num(nan=60.0)[0])

    def forward(self, x: Tensor) -> Tensor:
        """`x` with noise in training and on the grid in evaluation; shape and dtype as given."""
        if self.observer is not None or not self.training:
            return super().forward(x)
        if x.numel():
            self.features = x.shape[1:].numel() if x.dim() > 1 else x.numel()
        if not self.initialized:
            own = self._start_from(x)  # records nothing: a checkpoint's second forward, which starts no more, must save as many tensors
            if not self.initialized:  # nothing but zeros, which get no noise
                return self._on_grid(x, own)
        part = 1 / math.sqrt(max(self.features or 1, 1) * (2**self.most - 1))
        bound = self.bound.float()
        # Straight through: a bound that training drove to zero or below can come back.
        bound = bound * part + (bound.clamp(min=SMALLEST_STEP) - bound * part).detach()
        low = -bound if self.is_signed else torch.zeros_like(bound)
        scale = (bound - low) / (2 ** self.learned() - 1)
        return torch.ops.quantize.clipped(x, torch.stack([low, bound, scale]), draw_seed())

    @torch.no_grad()
    def start(self, observer: Observer, method: str) -> None:
        """Sets the bound from what `observer` has seen."""
        step, zero_point = observer.grid(self.levels, method)
        self.bound.fill_(step * max(zero_point, self.levels - zero_point))
        self.signed.fill_(zero_point > 0)
        self.seen.fill_(True)
        self.initialized, self.is_signed = True, zero_point > 0

    def _read_buffers(self) -> None:
        super()._read_buffers()
        self.is_signed = bool(self.signed)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

    def extra_repr(self) -> str:
        """Bounds of the bits, and whether data have been seen."""
        return f"bits={self.least} to {self.most}, initialized={self.initialized}"


def learned_activations(model: nn.Module) -> Iterator[LearnedBitsQuantizer]:
    """All activation quantizers of `model` with learned bits, in module order."""
    return (module for module in model.modules() if isinstance(module, LearnedBitsQuantizer))


def activation_penalty(model: nn.Module) -> Tensor:
    """The size of a sample's quantized layer inputs, in MiB, as a function of their learned bits; to be added to the loss.

    Inputs are those of the last forward pass in training mode, each counted where it is used; a layer that is called several times, once.

    Args:
        model: prepared with ``DiffQ(activation_bits="learned")``, DistributedDataParallel around it or not.

    Returns:
        float32 scalar on the bits' device.

    Raises:
        TypeError: naming the argument.
        ValueError: no learned activation bits, or no forward pass yet.

    Example:
        >>> model = quantize.prepare(nn.Sequential(nn.Linear(1024, 4)), quantize.DiffQ(activation_bits="learned", init_bits=4))
        >>> _ = model(torch.randn(2, 1024))
        >>> round(float(quantize.activation_penalty(model)) * 2**20)  # 1,024 inputs of half a byte
        512
    """
    check_module("activation_penalty", model)
    found = list(learned_activations(model))
    if not found:
        raise ValueError(
            'activation_penalty: model must be prepared with DiffQ(activation_bits="learned"); it has no learned activation bits'
        )
    sizes = [q.features * q.learned() for q in found if q.features is not None]
    if not sizes:
        raise ValueError("activation_penalty: model must have run in training mode before; it has not")
    return torch.stack(sizes).sum() / (8 << 20)
