"""Functional calls in a QModule's forward, compressed as the layers are.

A model may call ``F.relu`` where another has ``nn.ReLU``, and layers that subclass nn's (timm's ``BatchNormAct2d``, padded or
weight-standardised convolutions) keep a forward of their own. A TorchFunctionMode around the forward sees the calls that all of these make.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..hooks import add_hook, add_pre_hook, remove_hooks
from ..layers import functional, products, row_norms
from ..layers.attention import attention
from .config import ActivationConfig
from .state import LayerState, hold_op, under_checkpoint

# Layers whose calls are attributed to them by name: those that the table below can compress. LOSSY: those that pack values.
LOSSY = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.SiLU,
    nn.Hardswish,
    nn.Mish,
    nn.GELU,
    nn.Sigmoid,
    nn.Tanh,
    nn.ELU,
    nn.Softplus,
    nn.PReLU,
)
SUPPORTED = (
    *LOSSY,
    nn.ReLU,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.Dropout,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
)


class _Local(threading.local):
    def __init__(self):
        self.stack: list[Interceptor] = []


_local = _Local()


class Enter:
    """Forward pre-hook of a layer that keeps a forward of its own: the calls it makes are under its name and config."""

    def __init__(self, state: LayerState | None):
        self.state = state

    def __call__(self, module, args):
        if not torch.compiler.is_compiling() and _local.stack:
            _local.stack[-1].layers.append(self.state)


class Leave:
    """The forward hook that ends :class:`Enter`'s reach, also when the layer raises."""

    def __call__(self, module, args, output):
        if not torch.compiler.is_compiling() and _local.stack and _local.stack[-1].layers:
            _local.stack[-1].layers.pop()


def name_calls_of(module: nn.Module, state: LayerState | None) -> None:
    """Puts the calls that `module` makes under `state`; None: leaves them alone."""
    add_pre_hook(module, Enter(state))
    add_hook(module, Leave(), always_call=True)


def forget_calls_of(module: nn.Module) -> None:
    """Undoes :func:`name_calls_of`, however often it was called."""
    remove_hooks(module, lambda hook: isinstance(hook, (Enter, Leave)))


def state_of(module: nn.Module) -> LayerState | None:
    """What stands behind a layer's own packed input, or behind the calls it makes."""
    own = vars(module).get("_state")
    entered = (hook.state for hook in module._forward_pre_hooks.values() if isinstance(hook, Enter))
    return own if isinstance(own, LayerState) else next(entered, None)


def keep_two_values(module: nn.Module) -> None:
    """What is kept of a layer's input is a bit an element where its activation quantizer leaves it two values."""
    quantizer, state = module._modules.get("activation_quantizer"), state_of(module)
    if state is not None and getattr(quantizer, "kind", None) is not None and quantizer.bits == 1:
        state.keep_two_values()


class Interceptor(TorchFunctionMode):
    """Active during one forward of a QModule. `default` is the config of calls outside any named layer, None for none."""

    intercepts = True  # what quantize/layers/base.py knows it by

    def __init__(self, default: ActivationConfig | None, states: dict[str, LayerState], owners: Callable[[], dict[int, str]]):
        super().__init__()
        self.default, self.states, self.owners = default, states, owners
        self.layers: list[LayerState | None] = []
        self.names: dict[int, str] | None = None
        self.anonymous = 0

    def __enter__(self):
        _local.stack.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        _local.stack.pop()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a part of the model that is compiled by itself
            return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        if handler is None or not self.applies():
            return func(*args, **kwargs)
        hold_op(func.__name__)
        try:
            return handler(self, *args, **kwargs)
        finally:
            hold_op("")

    def applies(self) -> bool:
        """Not where the layer or the model's config says no, and not under activation checkpointing, whose second forward runs outside
        of this mode: both must save the same tensors, and the first's are dropped anyway."""
        if self.layers:
            if self.layers[-1] is None:
                return False
        elif self.default is None:
            return False
        return torch.is_grad_enabled() and not under_checkpoint()

    def state(self, weight: Tensor | None, op: str) -> LayerState:
        """The state of the layer that a call belongs to: the one whose forward is running, else the weight's owner, else by order."""
        if self.layers and self.layers[-1] is not None:
            return self.layers[-1]
        name = None
        if weight is not None:
            if self.names is None:
                self.names = self.owners()
            name = self.names.get(id(weight))
        if name is None:
            self.anonymous += 1
            name = f"{op}#{self.anonymous}"
        state = self.states.get(name)
        if state is None:
            state = self.states[name] = LayerState(name, self.default)
        return state


def _conv(mode, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, plain):
    return functional.conv(mode.state(weight, "conv"), input, weight, bias, stride, padding, dilation, groups, plain=plain)


def _conv_transpose(mode, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1, *, plain):
    return functional.conv(
        mode.state(weight, "conv_transpose"), input, weight, bias, stride, padding, dilation, groups,
        plain=plain, transposed=True, output_padding=output_padding,
    )  # fmt: skip


def _linear(mode, input, weight, bias=None):
    return functional.linear(mode.state(weight, "linear"), input, weight, bias)


def _batch_norm(mode, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    owner = weight if weight is not None else running_mean
    return functional.batch_norm(mode.state(owner, "batch_norm"), input, running_mean, running_var, weight, bias, training, momentum, eps)


def _torch_batch_norm(mode, input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled=True):
    return _batch_norm(mode, input, running_mean, running_var, weight, bias, training, momentum, eps)


def _layer_norm(mode, input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    call_plain = lambda: F.layer_norm(input, normalized_shape, weight, bias, eps)  # noqa: E731
    state = mode.state(weight, "layer_norm")
    return row_norms.layer_norm(state, input, normalized_shape, weight, bias, eps, plain=call_plain)


def _rms_norm(mode, input, normalized_shape, weight=None, eps=None):
    call_plain = lambda: F.rms_norm(input, normalized_shape, weight, eps)  # noqa: E731
    return row_norms.rms_norm(mode.state(weight, "rms_norm"), input, normalized_shape, weight, eps, plain=call_plain)


def _group_norm(mode, input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    call_plain = lambda: F.group_norm(input, num_groups, weight, bias, eps)  # noqa: E731
    return row_norms.group_norm(mode.state(weight, "group_norm"), input, num_groups, weight, bias, eps, plain=call_plain)


def _instance_norm(mode, input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5):
    arguments = (input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    state = mode.state(weight if weight is not None else running_mean, "instance_norm")
    return row_norms.instance_norm(state, *arguments, plain=lambda: F.instance_norm(*arguments))


def _torch_instance_norm(mode, input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled):
    return _instance_norm(mode, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _attention(mode, query, key, value, *args, **kwargs):
    call_plain = lambda: F.scaled_dot_product_attention(query, key, value, *args, **kwargs)  # noqa: E731
    return attention(lambda: mode.state(None, "attention"), query, key, value, *args, **kwargs, plain=call_plain)


def _multi_head_attention(mode, *args, **kwargs):
    # With a mode to ask, it hands itself over whole, and the calls that it is made of, which are to be compressed, are not seen. So it runs
    # as if there were none to ask.
    function = F.multi_head_attention_forward
    parts = types.FunctionType(function.__code__, {**vars(F), "has_torch_function": lambda _: False}, argdefs=function.__defaults__)
    hold_op("")  # what it calls has names of its own
    with mode:
        return parts(*args, **kwargs)


def _relu(mode, input, inplace=False, *, plain):
    return functional.clip(input, inplace=inplace, plain=lambda: plain(input, inplace) if inplace else plain(input))


def _relu_method(mode, input, *, plain, inplace):
    return functional.clip(input, inplace=inplace, plain=lambda: plain(input))


def _relu6(mode, input, inplace=False):
    return functional.clip(input, high=6.0, inplace=inplace, plain=lambda: F.relu6(input, inplace))


def _hardtanh(mode, input, min_val=-1.0, max_val=1.0, inplace=False, *, plain):
    low, high = float(min_val), float(max_val)
    if not low < high:  # NaN too, which means no end to the op and NaN everywhere to hardtanh
        return plain(input, min_val, max_val, inplace)
    return functional.clip(input, low, high, inplace=inplace, plain=lambda: plain(input, min_val, max_val, inplace))


def _leaky_relu(mode, input, negative_slope=0.01, inplace=False):
    plain = lambda: F.leaky_relu(input, negative_slope, inplace)  # noqa: E731
    return functional.clip(input, negative_slope=float(negative_slope), inplace=inplace, plain=plain)


def _prelu(mode, input, weight, *, plain):
    return functional.prelu(mode.state(weight, "prelu"), input, weight, plain=lambda: plain(input, weight))


def _dropout(mode, input, p=0.5, training=True, inplace=False):
    return functional.dropout(input, p, training, inplace)


def _torch_dropout(mode, input, p, train):
    return functional.dropout(input, p, train)


def _max_pool(mode, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False, *, n, plain):
    def call_plain():
        return plain(input, kernel_size, stride if stride is not None else [], padding, dilation, ceil_mode)

    return functional.max_pool(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, n=n, plain=call_plain)


def _max_pool_with_indices(mode, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=True, *, n, plain):
    return _max_pool(mode, input, kernel_size, stride, padding, dilation, ceil_mode, True, n=n, plain=plain)


def _avg_pool(
    mode, input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None, *, n, plain
):
    more = (divisor_override,) if n > 1 else ()

    def call_plain():
        return plain(input, kernel_size, stride if stride is not None else [], padding, ceil_mode, count_include_pad, *more)

    return functional.avg_pool(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, n=n, plain=call_plain)


def _mul(mode, input, other, *, out=None, plain, inplace=False):
    if out is not None:
        return plain(input, other, out=out)
    if not inplace and products.keeps_both(input, other) and input.shape == other.shape:
        return products.multiply(lambda: mode.state(None, "mul"), input, other, plain=lambda: plain(input, other))
    large, gate = input, other
    if not inplace and isinstance(input, Tensor) and isinstance(other, Tensor) and other.numel() > input.numel():
        large, gate = other, input
    return functional.mul(lambda: mode.state(None, "mul"), large, gate, inplace, plain=lambda: plain(input, other))


def _matmul(mode, input, other, *, out=None, plain):
    if out is not None:
        return plain(input, other, out=out)
    return products.matmul(lambda: mode.state(None, "matmul"), input, other, plain=lambda: plain(input, other))


def _bmm(mode, input, mat2, *, out=None, plain):
    return _matmul(mode, input, mat2, out=out, plain=plain)


def _square(mode, input, *, out=None, plain):
    if out is not None:
        return plain(input, out=out)
    return products.square(lambda: mode.state(None, "square"), input, plain=lambda: plain(input))


def _pow(mode, input, exponent, *, out=None, plain):
    if out is None and type(exponent) in (int, float) and exponent == 3:
        return _unary(mode, input, function="cube", plain=lambda x: plain(x, exponent))
    if out is None and type(exponent) in (int, float) and exponent == 2:
        return products.square(lambda: mode.state(None, "square"), input, plain=lambda: plain(input, exponent))
    return plain(input, exponent) if out is None else plain(input, exponent, out=out)


def _softmax(mode, input, dim=None, _stacklevel=3, dtype=None):
    plain = lambda: F.softmax(input, dim, _stacklevel, dtype)  # noqa: E731
    return products.softmax(lambda: mode.state(None, "softmax"), input, dim, dtype, plain=plain)


def _torch_softmax(mode, input, dim, dtype=None, *, out=None, plain):
    if out is not None:
        return plain(input, dim, dtype=dtype, out=out)
    return products.softmax(lambda: mode.state(None, "softmax"), input, dim, dtype, plain=lambda: plain(input, dim, dtype=dtype))


def _smooth(mode, input, inplace=False, *, function, plain):
    return functional.smooth(
        lambda: mode.state(None, function), input, function, inplace, plain=lambda: plain(input, inplace) if inplace else plain(input)
    )


def _gelu(mode, input, *, approximate="none"):
    if approximate not in ("none", "tanh"):
        return F.gelu(input, approximate=approximate)  # PyTorch's error
    function = "gelu_tanh" if approximate == "tanh" else "gelu"
    return functional.smooth(lambda: mode.state(None, "gelu"), input, function, plain=lambda: F.gelu(input, approximate=approximate))


def _unary(mode, input, *, out=None, function, plain):
    if out is not None or not _has_positions(input):
        return plain(input) if out is None else plain(input, out=out)
    return functional.smooth(lambda: mode.state(None, function), input, function, plain=lambda: plain(input))


def _has_positions(input) -> bool:
    """Whether it is more than a value a channel: gates of that size a product keeps as they are anyway."""
    return isinstance(input, Tensor) and input.dim() > 2 and input.numel() > input.shape[0] * input.shape[1]


def _elu(mode, input, alpha=1.0, inplace=False):
    if alpha != 1 or inplace:
        return F.elu(input, alpha, inplace)
    return _unary(mode, input, function="elu", plain=F.elu)


def _softplus(mode, input, beta=1.0, threshold=20.0):
    if beta != 1 or threshold != 20:
        return F.softplus(input, beta, threshold)
    return _unary(mode, input, function="softplus", plain=F.softplus)


def _addmm(mode, input, mat1, mat2, *, beta=1, alpha=1, out=None, plain):
    """As a linear layer, where that is what it is: Hugging Face's Conv1D."""
    if type(mat2) is not nn.Parameter or out is not None or beta != 1 or alpha != 1 or not isinstance(input, Tensor) or input.dim() != 1:
        more = {} if out is None else {"out": out}
        return plain(input, mat1, mat2, beta=beta, alpha=alpha, **more)
    return functional.linear(mode.state(mat2, "linear"), mat1, mat2.t(), input)


def _pad(interceptor, input, pad, mode="constant", value=None):
    return functional.pad(input, pad, mode, value)


def _adaptive_avg_pool(mode, input, output_size, *, n, plain):
    return functional.adaptive_avg_pool(input, output_size, n=n, plain=lambda: plain(input, output_size))


# What a forward may call, to how it is compressed. Everything else runs as it is and is named in the memory report.
HANDLERS: dict[Callable, Callable] = {
    **{f: partial(_conv, plain=f) for f in (torch.conv1d, torch.conv2d, torch.conv3d)},
    **{f: partial(_conv_transpose, plain=f) for f in (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)},
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _layer_norm),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), _rms_norm),
    **dict.fromkeys((F.group_norm, torch.group_norm), _group_norm),
    F.instance_norm: _instance_norm,
    torch.instance_norm: _torch_instance_norm,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    F.relu: partial(_relu, plain=F.relu),
    **{f: partial(_relu_method, plain=f, inplace=False) for f in (torch.relu, Tensor.relu)},
    **{f: partial(_relu_method, plain=f, inplace=True) for f in (torch.relu_, Tensor.relu_)},
    F.relu6: _relu6,
    F.hardtanh: partial(_hardtanh, plain=F.hardtanh),
    F.leaky_relu: _leaky_relu,
    **{f: partial(_prelu, plain=f) for f in (F.prelu, Tensor.prelu)},
    F.dropout: _dropout,
    torch.dropout: _torch_dropout,
    **{f: partial(_max_pool, n=1, plain=f) for f in (torch.max_pool1d, F.max_pool1d)},
    **{f: partial(_max_pool, n=2, plain=f) for f in (torch.max_pool2d, F.max_pool2d)},
    **{f: partial(_max_pool, n=3, plain=f) for f in (torch.max_pool3d, F.max_pool3d)},
    F.max_pool1d_with_indices: partial(_max_pool_with_indices, n=1, plain=F.max_pool1d_with_indices),
    F.max_pool2d_with_indices: partial(_max_pool_with_indices, n=2, plain=F.max_pool2d_with_indices),
    F.max_pool3d_with_indices: partial(_max_pool_with_indices, n=3, plain=F.max_pool3d_with_indices),
    torch.avg_pool1d: partial(_avg_pool, n=1, plain=torch.avg_pool1d),
    F.avg_pool2d: partial(_avg_pool, n=2, plain=F.avg_pool2d),
    F.avg_pool3d: partial(_avg_pool, n=3, plain=F.avg_pool3d),
    torch.adaptive_avg_pool1d: partial(_adaptive_avg_pool, n=1, plain=torch.adaptive_avg_pool1d),
    F.adaptive_avg_pool2d: partial(_adaptive_avg_pool, n=2, plain=F.adaptive_avg_pool2d),
    F.adaptive_avg_pool3d: partial(_adaptive_avg_pool, n=3, plain=F.adaptive_avg_pool3d),
    F.pad: _pad,
    **{f: partial(_mul, plain=f) for f in (torch.mul, Tensor.mul, torch.multiply, Tensor.multiply)},
    **{f: partial(_mul, plain=f, inplace=True) for f in (Tensor.mul_, Tensor.multiply_)},
    **{f: partial(_matmul, plain=f) for f in (torch.matmul, Tensor.matmul, Tensor.__matmul__)},
    **{f: partial(_bmm, plain=f) for f in (torch.bmm, Tensor.bmm)},
    **{f: partial(_square, plain=f) for f in (torch.square, Tensor.square)},
    **{f: partial(_pow, plain=f) for f in (torch.pow, Tensor.pow, Tensor.__pow__)},
    F.softmax: _softmax,
    **{f: partial(_torch_softmax, plain=f) for f in (torch.softmax, Tensor.softmax)},
    F.silu: partial(_smooth, function="silu", plain=F.silu),
    F.hardswish: partial(_smooth, function="hardswish", plain=F.hardswish),
    F.mish: partial(_smooth, function="mish", plain=F.mish),
    F.gelu: _gelu,
    **{f: partial(_unary, function="sigmoid", plain=f) for f in (torch.sigmoid, Tensor.sigmoid, torch.special.expit)},
    **{f: partial(_unary, function="tanh", plain=f) for f in (torch.tanh, Tensor.tanh)},
    F.elu: _elu,
    F.softplus: _softplus,
    **{f: partial(_addmm, plain=f) for f in (torch.addmm, Tensor.addmm)},
}
