"""Layers whose weight is kept as packed codes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from .. import _C
from ..inputs import name_of, names_refusals
from . import functional, kernels
from .form import GROUPED, Form
from .grid import PARTS, Grid, grid_of
from .pending import Pending
from .symbolic import as_node
from .waiting import Waiting
from .weight import PackedWeight

TENSORS = ("codes", "group_bits", "scales", "bias", *PARTS)  # what is stored of a layer; they keep their dtype
MADE = ("_plan", "_table", "_call")  # what kernels.py makes of them at the first use
ATTRIBUTES = {  # what tells one layer of a kind from another, with the defaults that files leave out
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
    "output_padding": 0,
    "padding_mode": "zeros",
    "num_heads": None,
}


class OnGrid(nn.Module):
    """Mixin: an input on a fixed grid. `.half()` and the like leave the buffers named in TENSORS as they are, and set `dtype`."""

    dtype: torch.dtype

    def set_grid(self, grid: Grid | None) -> None:
        """Sets the levels of the input; None: it is left as it is."""
        parts = {} if grid is None else grid.parts
        for name in PARTS:
            self.register_buffer(name, parts.get(name))
        self._grid_fields = {} if grid is None else grid.fields()

    @property
    def grid(self) -> Grid | None:
        """The levels of the input."""
        return grid_of(self._grid_fields, self._buffers)

    @property
    def activation_bits(self) -> int | None:
        """Of the input's levels; None where it is left as it is."""
        return self._grid_fields.get("activation_bits")

    def _apply(self, fn, recurse=True):
        kept = {name: self._buffers[name] for name in TENSORS if self._buffers.get(name) is not None}
        if not kept:
            return super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.dtype, device=next(iter(kept.values())).device))
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        if probe.is_floating_point():
            self.dtype = probe.dtype
        return self


class InputQuantizer(OnGrid):
    """Quantizes the input of a layer that has no packed counterpart: the same grid as in training, fixed.

    `axis`: the dimension of channels.
    """

    def __init__(self, grid: Grid, axis: int):
        super().__init__()
        self.axis, self.dtype = axis, torch.float32
        self.set_grid(grid)

    @property
    def bits(self) -> int:
        """Of the levels."""
        return self.activation_bits

    def forward(self, input: Tensor) -> Tensor:
        """`input` on the grid; shape and dtype as given."""
        if isinstance(input, fx.Proxy):
            return as_node(self, input)
        return self.grid.apply(input, self.axis)

    def extra_repr(self) -> str:
        """Bits."""
        return f"bits={self.bits}"


class PackedLayer(Waiting, OnGrid):
    """Base of the packed layers. :func:`quantize.convert` and :func:`quantize.load` make them out of float ones, by a change of class.

    Buffers: `codes` uint8[N, row_bytes], one row an output channel (quantize/packed/layout.py), and `scales` float32[N]; where groups have
    bits of their own `codes` uint8[bytes], `group_bits` uint8[ceil(groups / 2)] and `scales` float32[rows, 2] (quantize/packed/form.py).
    `bias` float32[N] or None; with `activation_bits` also `step` and `zero_point`, float32 scalars, or for inputs of one bit `threshold`
    float32[C] and `flip` uint8[C], if more than zero (grid.py). All keep these dtypes under ``.half()`` and the like; the output has the
    input's dtype. Whatever else the layer had (stride, hooks, attributes of
    one's own) it still has, but names that are the packed layer's: tensors of such a name are an error.

    For inference. The gradient flows to the input as through the float layer, straight through the rounding of activations but not through
    a sign; the weight has none.
    """

    plain: type[nn.Module]
    form: Form
    _next, _fed = None, False  # feed()
    spatial = 0
    transposed = False

    def __init__(self, *args, **kwargs):
        raise TypeError(f"{type(self).__name__} is made of a {self.plain.__name__} by quantize.convert or quantize.load")

    @classmethod
    def become(cls, module: nn.Module, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype, plain_bias: bool) -> None:
        """Turns a layer into a packed one in place. The tensors are taken as they are; `weight` may be shared by several layers."""
        module.__class__ = cls
        for name in ("weight", *TENSORS):
            module._parameters.pop(name, None)
            module._buffers.pop(name, None)
        for name in (*MADE, "_next", "_fed", "_observers", "_steps", "_region", "placed", "staying"):
            vars(module).pop(name, None)
        module.form, module.dtype = weight.form, dtype
        module.plain_bias, module.folded, module.feeds = plain_bias, None, None
        for name, tensor in (*weight.parts.items(), ("bias", bias)):
            module.register_buffer(name, tensor)
        module.set_grid(None)

    @property
    def packed_weight(self) -> PackedWeight:
        """What stands behind `weight`; the tensors are the layer's buffers."""
        return PackedWeight(self.form, {part: self._buffers[part] for part in self.form.parts})

    @property
    def method(self) -> str:
        """Of quantization, as files name it."""
        return self.form.method

    @property
    def bits(self) -> int:
        """Bits of a code, at most."""
        return self.form.bits

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.form.shape

    def quantize_inputs(self, grid: Grid) -> None:
        """Sets the levels of the input."""
        self.set_grid(grid)

    def feed(self, name: str, other: PackedLayer, between: Iterable[nn.Module], region: _C.Region) -> None:
        """From now on the output goes to the layer `other`, of that `name`, and nowhere else: as bits, where both run on their codes.

        `between`: the modules that see it on its way, whose hooks are to see floats. `region`: outside it that is not so.
        """
        self.feeds = name
        vars(other)["_fed"] = True
        vars(self).update(_next=other, _region=region)  # past nn.Module, which would make it a submodule
        self.watch(other, *between)

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for, decoded at each access: Tensor in the float layer's shape, contiguous. Read-only."""
        return self.decoded().to(self.dtype).contiguous()

    def decoded(self) -> Tensor:
        """The weight in float32, in the memory order of the codes."""
        return self.form.decode(self._buffers, kernels.table(self))

    @names_refusals
    def forward(self, input: Tensor) -> Tensor:
        """As the float layer's with the quantized weight."""
        if type(input) is Pending:
            if (found := kernels.run_chain(self, input)) is not None:
                return found
            input = input.value()
        call = None if torch.compiler.is_compiling() else self.__dict__.get("_call")
        if call is not None and not self.watched() and (found := call(input)) is not None:
            return found
        if isinstance(input, fx.Proxy):
            return as_node(self, input)
        self._check_input(input)
        found = kernels.run(self, input)
        return functional.run(self, self._quantized(input)) if found is None else found

    def _check_input(self, input: Tensor) -> None:
        if not isinstance(input, Tensor) or not (input.is_floating_point() or (self._fed and input.dtype == torch.uint8)):
            raise TypeError("input must be a floating-point Tensor")  # names_refusals says more
        removed = self._grid_fields.get("removed")
        if (self.folded is not None or removed) and input.dim() != self.spatial + 2:
            norm = self.folded[0] if self.folded is not None else removed[0]
            raise ValueError(
                f"{name_of(self)}: input must have {self.spatial + 2} dimensions, as its folded batch norm {norm!r} wants; "
                f"got {list(input.shape)}"
            )

    def _quantized(self, input: Tensor) -> Tensor:
        grid = self.grid
        return input if grid is None else grid.apply(input, -self.spatial - 1)

    def __getstate__(self):
        """Without what is made of the codes at the first use."""
        return {key: value for key, value in self.__dict__.items() if key not in MADE}

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        for name in MADE:  # of the original's buffers
            vars(replica).pop(name, None)
        return replica

    def extra_repr(self) -> str:
        """The float layer's, then method and bits."""
        activations = "" if self.activation_bits is None else f", activation_bits={self.activation_bits}"
        plain = self.plain.extra_repr(self)
        bits = f"bits<={self.bits}" if self.method == GROUPED else f"bits={self.bits}"
        return f"{plain}, method={self.method}, {bits}{activations}"


class PackedLinear(PackedLayer):
    """nn.Linear on packed codes; Tensor[*, in_features] to Tensor[*, out_features].

    Example:
        >>> model = quantize.convert(quantize.prepare(nn.Sequential(nn.Linear(64, 10)), quantize.Uniform(4)))
        >>> model[0]
        PackedLinear(in_features=64, out_features=10, bias=True, method=uniform, bits=4)
        >>> model[0].codes.shape  # 64 codes of 4 bits a row
        torch.Size([10, 32])
    """

    plain = nn.Linear


class PackedConv1d(PackedLayer):
    """nn.Conv1d on packed codes.

    Example:
        >>> model = quantize.convert(quantize.prepare(nn.Sequential(nn.Conv1d(8, 16, 3)), quantize.Uniform(8)))
        >>> model(torch.randn(4, 8, 9)).shape
        torch.Size([4, 16, 7])
    """

    plain, spatial = nn.Conv1d, 1


class PackedConv2d(PackedLayer):
    """nn.Conv2d on packed codes, with every stride, padding, padding mode, dilation and grouping.

    Example:
        >>> model = quantize.convert(quantize.prepare(nn.Sequential(nn.Conv2d(16, 16, 3)), quantize.Uniform(2)))
        >>> model[0].codes.nbytes, model[0].scales.nbytes  # 144 codes of 2 bits a row are 36 bytes, padded to 40
        (640, 64)
        >>> model(torch.randn(4, 16, 9, 9)).shape
        torch.Size([4, 16, 7, 7])
    """

    plain, spatial = nn.Conv2d, 2


class PackedConv3d(PackedLayer):
    """nn.Conv3d on packed codes.

    Example:
        >>> model = quantize.convert(quantize.prepare(nn.Sequential(nn.Conv3d(8, 16, 3)), quantize.PowerOfTwo(4)))
        >>> model(torch.randn(4, 8, 9, 9, 9)).shape
        torch.Size([4, 16, 7, 7, 7])
    """

    plain, spatial = nn.Conv3d, 3


class _PackedConvTranspose(PackedLayer):
    transposed = True

    @names_refusals
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As the float layer's with the quantized weight."""
        if isinstance(input, fx.Proxy):
            return as_node(self, input, output_size)
        self._check_input(input)
        input = self._quantized(input)
        geometry = (self.stride, self.padding, self.kernel_size, self.spatial, self.dilation)
        return functional.run(self, input, self.plain._output_padding(self, input, output_size, *geometry))


class PackedConvTranspose1d(_PackedConvTranspose):
    """nn.ConvTranspose1d on packed codes; a row holds one output channel's weights, as in the other convolutions.

    Example:
        >>> model = quantize.convert(quantize.prepare(nn.Sequential(nn.ConvTranspose1d(8, 16, 3)), quantize.Uniform(8)))
        >>> model(torch.randn(4, 8, 9)).shape
        torch.Size([4, 16, 11])
    """

    plain, spatial = nn.ConvTranspose1d, 1


class PackedConvTranspose2d(_PackedConvTranspose):
    """nn.ConvTranspose2d on packed codes; a row holds one output channel's weights, as in the other convolutions.

    Example:
        >>> model = quantize.convert(quantize.prepare(nn.Sequential(nn.ConvTranspose2d(8, 16, 3)), quantize.Uniform(8)))
        >>> model(torch.randn(4, 8, 9, 9)).shape
        torch.Size([4, 16, 11, 11])
    """

    plain, spatial = nn.ConvTranspose2d, 2


class PackedConvTranspose3d(_PackedConvTranspose):
    """nn.ConvTranspose3d on packed codes; a row holds one output channel's weights, as in the other convolutions.

    Example:
        >>> model = quantize.convert(quantize.prepare(nn.Sequential(nn.ConvTranspose3d(8, 16, 3)), quantize.Uniform(8)))
        >>> model(torch.randn(4, 8, 9, 9, 9)).shape
        torch.Size([4, 16, 11, 11, 11])
    """

    plain, spatial = nn.ConvTranspose3d, 3


# Float layer to packed one, by exact type: a subclass has a forward of its own, which reads a float weight.
PACKED = {
    cls.plain: cls
    for cls in (
        PackedLinear,
        PackedConv1d,
        PackedConv2d,
        PackedConv3d,
        PackedConvTranspose1d,
        PackedConvTranspose2d,
        PackedConvTranspose3d,
    )
}
