"""prepare(): low-bit weights in any model, by parametrization."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from ..activation.intercept import keep_two_values
from ..calls import call
from ..checks import check_module, first_of
from ..dtypes import FLOATS
from ..hooks import add_hook, add_pre_hook
from ..inputs import raise_named, refusal
from ..modes import evaluating
from ..patterns import check, resolve, unmatched
from .config import XNOR, DiffQ, DoReFa, PowerOfTwo, Ternary, Uniform, WeightConfig
from .diffq import DiffQQuantizer, draw_together, read_when_ready
from .dorefa import quantize_gradient_of
from .lsq import METHODS, ActivationQuantizer, Observer
from .quantizer import WeightQuantizer, make_activation_quantizer, make_quantizer

CONFIGS = (Uniform, PowerOfTwo, DiffQ, Ternary, XNOR, DoReFa)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear)


class PreparedWeight(NamedTuple):
    """A weight that a quantizer stands before."""

    layer: str  # the module's name
    module: nn.Module
    tensor: str  # "weight"; "in_proj_weight" of nn.MultiheadAttention; "weight_ih_l0" and so on of nn.LSTM
    quantizer: WeightQuantizer

    @property
    def name(self) -> str:
        """As the plain model's parameter."""
        return f"{self.layer}.{self.tensor}" if self.layer else self.tensor

    @property
    def latent(self) -> Tensor:
        """The full-precision weight that the quantizer is given."""
        return parametrized_without(self.module, self.tensor, self.quantizer)


def parametrized_without(module: nn.Module, tensor: str, quantizer: WeightQuantizer) -> Tensor:
    """What `quantizer` is given: the parameter, or what other parametrizations before it make of it."""
    chain = module.parametrizations[tensor]
    value = chain.original if chain.is_tensor else tuple(getattr(chain, f"original{i}") for i in range(chain.ntensors))
    for other in chain:
        if other is quantizer:
            return value
        value = other(*value) if isinstance(value, tuple) else other(value)
    raise ValueError(f"{tensor} has no such quantizer")


def prepared_weights(model: nn.Module) -> Iterator[PreparedWeight]:
    """Every prepared weight of `model`, in module order; shared ones at each place."""
    for name, module in model.named_modules(remove_duplicate=False):
        if not parametrize.is_parametrized(module):
            continue
        for tensor, chain in module.parametrizations.items():
            for quantizer in chain:
                if isinstance(quantizer, WeightQuantizer):
                    yield PreparedWeight(name, module, tensor, quantizer)


def prepare(model: nn.Module, config) -> nn.Module:
    """Quantizes the weights of convolutions, linear and recurrent layers and attention projections while the model trains. In place.

    ``module.weight`` is then the quantized weight, computed from the full-precision parameter at each use; its gradient goes straight
    through (STE). The parameter objects stay what they are, so an optimizer made before goes on working; `state_dict` keeps them under
    torch.nn.utils.parametrize's names. With activation bits the layer's input is quantized as well: for :class:`quantize.XNOR` to its sign,
    for :class:`quantize.DoReFa` within [0, 1], else by a learned step: a new parameter (``module.activation_quantizer.step``) that an
    optimizer made afterwards will train. Goes together with :class:`quantize.QModule` (before or after it), DistributedDataParallel
    (prepare first), autocast, deepcopy and torch.compile.

    A learned step starts with the first batch, or :func:`quantize.calibrate`: make a moving average of the model (EMA) after that, or it
    will average where the step was before. Pickle knows no parametrized modules: keep the state dict.

    Args:
        model: any nn.Module, or a single layer.
        config: :class:`quantize.Uniform`, :class:`quantize.PowerOfTwo`, :class:`quantize.DiffQ`, :class:`quantize.Ternary`,
            :class:`quantize.XNOR` or :class:`quantize.DoReFa`, or a mapping from glob patterns over module names to one of these or to
            None, which leaves the layer alone; the last match wins. What :func:`quantize.allocate` returns is such a mapping.

    Returns:
        The same object.

    Raises:
        TypeError: `model` is no nn.Module, `config` of another type, or a weight is not floating-point.
        ValueError: nothing to prepare; a layer prepared before; a weight that is empty, not finite, or not yet there (lazy layers).
            The layer is named, and the model is as it was.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> model = quantize.prepare(model, {"*": quantize.PowerOfTwo(bits=4), "0": None})
        >>> model(torch.randn(2, 3, 8, 8)).sum().backward()
        >>> quantize.weight_bits(model)
        {'3.weight': tensor(4.)}
    """
    check_module("prepare", model)
    check(config, CONFIGS, "prepare")
    if hasattr(config, "check_model"):  # quantize.Allocation
        config.check_model(model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("prepare: model must be prepared before it is wrapped in DistributedDataParallel; got the wrapped one")
    found = list(_candidates(model))
    for pattern in unmatched(config, [name for name, _ in model.named_modules()]):
        warnings.warn(f"prepare: config's pattern {pattern!r} matches no module of the model", stacklevel=2)
    chosen = [(name, module, own) for name, module in found if (own := resolve(config, name)) is not None]
    if not chosen:
        layers = ", ".join(repr(name) for name, _ in found[:5]) or "none"
        raise ValueError(f"prepare: model must have a layer that config chooses; its convolution and linear layers are {layers}")
    for name, module, own in chosen:
        for tensor in tensor_names(module):
            check_weight(name, module, tensor)
        if own.activation_bits is not None and quantizes_input(module) and hasattr(module, "activation_quantizer"):
            raise ValueError(f"prepare: layer {name!r} must not have 'activation_quantizer' as an attribute of its own; rename it")
    shared: dict[tuple, WeightQuantizer] = {}
    for name, module, own in chosen:
        _prepare_layer(name, module, own, shared)
    if any(isinstance(own, DiffQ) for _, _, own in chosen):
        draw_together(model)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(hasattr(m, "activation_quantizer") for m in encoder.modules()):
            encoder.use_nested_tensor = False  # of padded inputs, for a fused path that no quantized input takes
    return model


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if tensor_names(module))


def tensor_names(module: nn.Module) -> list[str]:
    """The weights of `module` that prepare takes."""
    if isinstance(module, LAYERS):
        return ["weight"]
    if isinstance(module, nn.MultiheadAttention):
        return ["in_proj_weight"] if module.in_proj_weight is not None else []
    if isinstance(module, nn.RNNBase):
        return [name for name in module._flat_weights_names if name.startswith("weight")]
    return ["weight_ih", "weight_hh"] if isinstance(module, nn.RNNCellBase) else []


def channel_axis(module: nn.Module) -> int:
    """The dimension of output channels of its weights."""
    return 1 if isinstance(module, TRANSPOSED) else 0


def quantizes_input(module: nn.Module) -> bool:
    """Whether activation bits mean anything to it: modules that read weights without calling their layers have no input to quantize."""
    return isinstance(module, LAYERS) and not isinstance(module, NonDynamicallyQuantizableLinear)


def check_weight(name: str, module: nn.Module, tensor: str, who: str = "prepare") -> None:
    """ValueError or TypeError for a weight that cannot be quantized."""
    at = f"{who}: {tensor} of layer {name!r}"
    if parametrize.is_parametrized(module, tensor) and any(isinstance(q, WeightQuantizer) for q in module.parametrizations[tensor]):
        raise ValueError(f"{at} must not be prepared already; make a new model for another configuration")
    if module._parameters.get(tensor) is None and not parametrize.is_parametrized(module, tensor):
        raise ValueError(
            f"{at} must be a parameter; got {type(getattr(module, tensor, None)).__name__} (remove weight_norm or pruning first)"
        )
    weight = getattr(module, tensor)
    if isinstance(weight, nn.parameter.UninitializedTensorMixin):
        raise ValueError(f"{at} must be initialized; run a batch through the lazy layer first")
    if weight.dtype not in FLOATS:
        raise TypeError(f"{at} must be float32, float16 or bfloat16; got {weight.dtype}")
    if not weight.numel():
        raise ValueError(f"{at} must not be empty; got shape {list(weight.shape)}")
    if weight.device.type != "meta" and not bool(weight.detach().isfinite().all()):
        raise ValueError(f"{at} must be finite; got {int((~weight.isfinite()).sum())} values that are NaN or infinite")


def _prepare_layer(name: str, module: nn.Module, config: WeightConfig, shared: dict[tuple, WeightQuantizer]) -> None:
    axis = channel_axis(module)
    for tensor in tensor_names(module):
        weight = getattr(module, tensor)
        key = (id(weight), config, axis)  # what a quantizer learns of a tied weight is learned once
        quantizer = shared.get(key) if module._parameters.get(tensor) is weight else None
        if quantizer is None:
            quantizer = make_quantizer(config, weight, axis)
        if module._parameters.get(tensor) is weight:
            shared[key] = quantizer
        parametrize.register_parametrization(module, tensor, quantizer, unsafe=True)  # safe: drawing noise to check the shape would not be
        quantizer.train(module.training)
        if isinstance(quantizer, DiffQQuantizer):
            read_when_ready(module, tensor)
    if isinstance(module, nn.RNNBase):
        _flatten_at_use(module)
    if not quantizes_input(module):
        return
    if config.activation_bits is not None:
        own = make_activation_quantizer(config, next(module.parameters()).device)
        own.layer_name = name
        module.activation_quantizer = own.train(module.training)
        add_pre_hook(module, quantize_input_of, with_kwargs=True)
        keep_two_values(module)  # where QModule was first
    if isinstance(config, DoReFa) and config.gradient_bits < 32:
        add_hook(module, quantize_gradient_of)


def _flatten_at_use(module: nn.RNNBase) -> None:
    """Recurrent layers keep a list of their weights: quantized ones in it would be of another forward pass, and of a graph."""
    vars(module).pop("_flat_weights", None)
    type(module)._flat_weights = property(  # parametrize gives each module a class of its own
        lambda own: [getattr(own, name, None) for name in own._flat_weights_names], lambda own, weights: None
    )


def quantize_input_of(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The forward pre-hook of layers with activation bits."""
    if args:
        return (_quantized(module, args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": _quantized(module, kwargs["input"])}


def _quantized(module: nn.Module, input: Tensor) -> Tensor:
    quantizer = module.activation_quantizer
    if not getattr(quantizer, "initialized", True) and (wrong := refusal(module, input)) is not None:
        raise wrong  # before the grid starts from it
    try:
        return quantizer(input)
    except Exception as error:
        raise_named(error, module, input)


def weight_bits(model: nn.Module) -> dict[str, Tensor]:
    """The bits now in force, by the plain model's parameter names: a scalar, or a number for each group where they are learned.

    Learned bits are those of the noise in training mode and whole ones, as files have them, in evaluation mode.

    Args:
        model: a prepared model; of any other there is nothing to say.

    Returns:
        {name: float32 Tensor}: a scalar, or [groups] of learned bits.

    Raises:
        TypeError: `model` is no nn.Module.

    Example:
        >>> quantize.weight_bits(quantize.prepare(nn.Linear(8, 4), quantize.Uniform(weight_bits=4)))
        {'weight': tensor(4.)}
    """
    check_module("weight_bits", model)
    found = {}
    for weight in prepared_weights(model):
        own = weight.quantizer
        found[weight.name] = own.bits() if isinstance(own, DiffQQuantizer) else torch.tensor(float(own.config.weight_bits))
    return found


def calibrate(model: nn.Module, batches: Iterable, method: str = "mse") -> nn.Module:
    """Sets the activation quantizers of a prepared model from data, for post-training quantization. In place.

    The model runs over `batches` twice in evaluation mode with inputs unquantized: once for their ranges, once for their histograms. All
    processes of a distributed run end with the same grids.

    Args:
        model: a prepared model with activation bits.
        batches: inputs (Tensor[N, ...], or a tuple or list whose first item is one), in something that can be walked through twice: a
            list, a DataLoader. A mapping holds the model's arguments by name, if its keys are those names; anything else is passed to the
            model as it is.
        method: ``"mse"`` (the smallest squared error), ``"minmax"``, or ``"percentile"`` (99.99 % of the values inside).

    Returns:
        The same object.

    Raises:
        TypeError: naming the argument.
        ValueError: `method` unknown, no activation quantizers, no batches, or an input not finite.

    Example:
        >>> model = quantize.prepare(nn.Sequential(nn.Linear(8, 4)), quantize.Uniform(8, activation_bits=8))
        >>> _ = quantize.calibrate(model, [torch.randn(16, 8) for _ in range(4)])
        >>> model[0].activation_quantizer.initialized
        True
    """
    check_module("calibrate", model)
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes)):
        raise TypeError(f"calibrate: batches must be iterable; got {type(batches).__name__}")
    if isinstance(batches, Tensor):  # whose rows would be taken for batches
        raise TypeError(f"calibrate: batches must be an iterable of inputs, as [inputs]; got one Tensor{list(batches.shape)}")
    if method not in METHODS:
        raise ValueError(f"calibrate: method must be one of {', '.join(map(repr, METHODS))}; got {method!r}")
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    if not quantizers:
        raise ValueError("calibrate: model must be prepared with activation_bits; it has no activation quantizers")
    try:
        for quantizer in quantizers:
            quantizer.observer = Observer()
        for walk in range(2):
            count = 0
            with torch.no_grad(), evaluating(model):
                for batch in batches:
                    call(model, first_of("calibrate", batch, count, may_be_empty=True))  # empty: of one process of several
                    count += 1
            if not count:
                raise ValueError(f"calibrate: batches must hold something each time they are walked through; walk {walk + 1} got nothing")
            for quantizer in quantizers:
                quantizer.observer.advance()
        for quantizer in quantizers:
            quantizer.zeros = quantizer.zeros or quantizer.observer.zeros
            if quantizer.observer.reached:  # else its first input decides
                quantizer.start(quantizer.observer, method)
    finally:
        for quantizer in quantizers:
            quantizer.observer = None
    return model
