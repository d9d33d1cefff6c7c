"""First convolutions that stay in floats: of a binary network they can take as long as all that is packed behind them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import _C
from ..inputs import names_refusals
from .affine import affine_of
from .kernels import value_only
from .pending import Pending
from .symbolic import as_node
from .waiting import Waiting

COLUMNS = 16  # output channels of a panel
POINTS = (0, 1, -1, 2, -2, 0.5)  # and infinity: csrc/packed/stem_kernels.h
TAPS = 4  # of even pixels, and of odd ones
MOST_CHANNELS, FEWEST_TAPS, MOST_TAPS = 4, 5, 2 * TAPS


def stem_panels(weight: Tensor) -> Tensor:
    """float32 [M, C, kH, kW] of 5 to 8 taps each way to float32 [ceil(M / 16), steps, 16]: by the points across lines, by those along
    them, by even and odd lines, then even pixels' channels before odd ones'.

    A point's weights are the value there of the polynomial whose coefficients are the taps, over the product of its distances from the
    other points; at infinity the last coefficient, which is left out where no kernel of this size has one.
    """
    outputs, _, *size = weight.shape
    points = torch.tensor(POINTS, dtype=torch.float64, device=weight.device)
    apart = points[:, None] - points
    apart.fill_diagonal_(1)
    at = F.pad(points[:, None] ** torch.arange(TAPS, device=weight.device) / apart.prod(1, keepdim=True), (0, 0, 0, 1))
    at[-1, -1] = 1
    height, width = size
    taps = F.pad(weight.double(), (0, MOST_TAPS - width, 0, MOST_TAPS - height)).unflatten(-1, (TAPS, 2)).unflatten(-3, (TAPS, 2))
    every = torch.einsum("ps,qt,mcsytx->pyqxcm", at, at, taps)  # x, y: odd
    last_lines, last = (max(taps - 2 * (TAPS - 1), 0) for taps in size)  # of even and odd ones, at infinity
    steps = []
    for point, lines in enumerate(every):
        own = lines[:last_lines] if point == len(POINTS) else lines
        steps += [own[:, :-1].transpose(0, 1).flatten(0, 3), own[:, -1, :last].flatten(0, 2)]
    steps = F.pad(torch.cat(steps), (0, -outputs % COLUMNS))
    return steps.unflatten(-1, (-1, COLUMNS)).transpose(0, 1).contiguous().float()


def is_stem(module: nn.Module) -> bool:
    """Whether `module` is a float convolution that csrc/packed/stem_kernels.h computes: a large kernel in steps of two over an image."""
    return (
        type(module) is nn.Conv2d
        and module.in_channels <= MOST_CHANNELS
        and module.groups == 1
        and tuple(module.stride) == (2, 2)
        and tuple(module.dilation) == (1, 1)
        and all(FEWEST_TAPS <= taps <= MOST_TAPS for taps in module.kernel_size)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


class PackedStemConv2d(Waiting, nn.Conv2d):
    """nn.Conv2d for inference, by minimal filtering: its weight stays float, and sums are rounded otherwise. Outputs come in tiles of
    4 x 4: a pixel that is NaN or infinite makes NaN of all sixteen where the plain layer does of those that see it."""

    plain = nn.Conv2d
    _made: tuple | None = None

    @names_refusals
    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer's."""
        if isinstance(input, fx.Proxy):
            return as_node(self, input)
        if not self._takes(input):
            return super().forward(input)
        return Pending(self._run, input, self._steps, self) if self.awaits() else self._run(input)

    def _run(self, x: Tensor, norm: nn.Module | None = None, **after) -> Tensor:
        return torch.ops.quantize.stem_conv2d(x, *self._filter(norm), self.stride, self.padding, **after)

    def _takes(self, input: Tensor) -> bool:
        return (
            type(input) is Tensor
            and input.device.type == "cpu"
            and input.dim() == 4
            and input.shape[1] == self.in_channels
            and input.dtype == self.weight.dtype == torch.float32
            and not torch.compiler.is_compiling()
            and torch._C._get_tracing_state() is None
            and value_only(input)
            and not (torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (self.weight, self.bias)))
            and not torch.is_autocast_enabled("cpu")
        )

    def _filter(self, norm: nn.Module | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weight, bias and panels, with what `norm` does to the output: made again when one of them has changed."""
        made, of = self._made, None if norm is None else (norm, norm.eps)
        if made is not None and made[0] == of and made[1].unchanged():
            return made[2]
        with torch.no_grad():
            weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
            if norm is not None:
                scale, shift = affine_of(norm)
                weight = (weight.double() * scale.view(-1, 1, 1, 1)).float()
                bias = (shift if bias is None else bias.double() * scale + shift).float()
            found = weight, bias, stem_panels(weight)
        if not _C.in_transform():
            watched = [(owner, part) for owner, part in ((self._parameters, "weight"), (self._parameters, "bias"))]
            if norm is not None:
                watched += [(norm._parameters, "weight"), (norm._parameters, "bias")]
                watched += [(norm._buffers, "running_mean"), (norm._buffers, "running_var")]
            watch = _C.Watch([(owner, part, owner[part]) for owner, part in watched if owner[part] is not None])
            vars(self)["_made"] = (of, watch, found)
        return found

    def __getstate__(self):
        """Without what is made of the weight at the first use."""
        return {key: value for key, value in super().__getstate__().items() if key != "_made"}


class PackedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d behind such a convolution, with whose weight it is multiplied in evaluation."""

    plain = nn.BatchNorm2d

    def forward(self, input: Tensor) -> Tensor | Pending:
        """As the plain layer's."""
        if type(input) is not Pending:
            return as_node(self, input) if isinstance(input, fx.Proxy) else super().forward(input)
        found = input.norm(self) if self._is_fixed() else None
        return super().forward(input.value()) if found is None else found

    def _is_fixed(self) -> bool:
        asked = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (self.weight, self.bias))
        return not (self.training or asked) and self.running_mean is not None
