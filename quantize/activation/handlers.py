"""What a forward may call, to how it is compressed: a handler for each function, with its arguments after the Interceptor."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import functional, products, row_norms
from ..layers.attention import attention
from ..layers.autocast import raised
from .state import hold_op


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


def _multi_head_attention(mode, *args, function=F.multi_head_attention_forward, **kwargs):
    # With a mode to ask, it hands itself over whole, and the calls that it is made of, which are to be compressed, are not seen. So it runs
    # as if there were none to ask.
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
    if out is not None:
        return plain(input, exponent, out=out)
    if not isinstance(input, Tensor) or type(exponent) not in (int, float) or exponent not in (2, 3):
        return plain(input, exponent)
    (input,) = raised("pow.Tensor_Scalar", input)
    if exponent == 3:
        return _unary(mode, input, function="cube", plain=lambda x: plain(x, exponent))
    return products.square(lambda: mode.state(None, "square"), input, plain=lambda: plain(input, exponent))


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


def _addmm(mode, *args, plain, **factors):
    """As a linear layer, where that is what it is: Hugging Face's Conv1D."""
    if len(args) == 3 and not factors and type(args[2]) is nn.Parameter and args[2].dim() == 2 and args[0].dim() == 1:
        bias, input, weight = args
        return functional.linear(mode.state(weight, "linear"), input, weight.t(), bias)
    return plain(*args, **factors)


def _pad(interceptor, input, pad, mode="constant", value=None):
    return functional.pad(input, pad, mode, value)


def _adaptive_avg_pool(mode, input, output_size, *, n, plain):
    return functional.adaptive_avg_pool(input, output_size, n=n, plain=lambda: plain(input, output_size))


# Everything else runs as it is and is named in the memory report.
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
