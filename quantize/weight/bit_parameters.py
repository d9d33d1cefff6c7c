"""Training the learned bits: their place in an optimizer, and the guard that keeps a bad step away from them."""

from __future__ import annotations

import sys
import warnings
import weakref

import torch
from torch import Tensor, nn

from .. import _C
from ..checks import check_module, check_number
from .diffq import diffq_quantizers
from .learned_activation import learned_activations

FARTHEST = 8.0  # logits are kept within +-8: bits then lie within 0.04 % of a bound, and still have a slope to come back by
WINDOW, OFTEN = 100, 10  # a warning for each window of steps in which so many were skipped
MOVED = 3  # a warning after so many steps in a row between which something else changed the bits


class BitGuard:
    """What :func:`add_bit_parameters` returns: an optimizer's step is skipped whole if a gradient is NaN or infinite.

    Attributes:
        steps: of the optimizer since. skipped: how many of them changed nothing.
    """

    def __init__(self, logits: list[nn.Parameter]):
        self.steps = self.skipped = 0
        self.logits = logits
        self._recent = 0
        self._left = self._versions()
        self._moved = 0  # steps in a row before which something else had changed the bits

    def _versions(self) -> list[int]:
        return [0 if logits.is_inference() else logits._version for logits in self.logits]

    def before_step(self, optimizer: torch.optim.Optimizer, args, kwargs) -> tuple[tuple, dict] | None:
        """The optimizer's step pre-hook. A closure is called here, before the gradients are looked at; the step gets its loss."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            args, kwargs = (args[0], lambda: loss), {name: value for name, value in kwargs.items() if name != "closure"}
        self.steps += 1
        self._moved = self._moved + 1 if self._versions() != self._left else 0
        if self._moved == MOVED:
            warnings.warn(
                f"add_bit_parameters: something else changes the bits between the steps of their optimizer, {MOVED} times in a row; if "
                "that is another optimizer that holds them too, unguarded and with its weight decay, make it without them",
                stacklevel=3,  # the caller of step()
            )
        owned = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not _C.all_finite([p.grad for p in owned]):
            for parameter in owned:
                parameter.grad = None
            self.skipped += 1
            self._recent += 1
        if self.steps % WINDOW == 0:
            if self._recent >= OFTEN:
                warnings.warn(
                    f"add_bit_parameters: {self._recent} of the last {WINDOW} steps were skipped because of gradients that are NaN or "
                    f"infinite ({self.skipped} of {self.steps} in all); a lower learning rate or loss scale may help",
                    stacklevel=3,  # the caller of step()
                )
            self._recent = 0
        return None if closure is None else (args, kwargs)

    def after_step(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        """The optimizer's step post-hook: projects the bits into their bounds."""
        _C.clamp_all(self.logits, FARTHEST)
        self._left = self._versions()

    def __repr__(self):
        return f"BitGuard(steps={self.steps}, skipped={self.skipped})"


def add_bit_parameters(optimizer: torch.optim.Optimizer, model: nn.Module, lr: float = 1e-3) -> BitGuard:
    """Gives an optimizer the learned bits of a DiffQ model, as a parameter group of their own, and guards its steps.

    A step of `optimizer` is skipped whole, and counted, if one of its gradients is NaN or infinite. That is what keeps a second optimizer
    alive beside a gradient scaler: after an overflow the scaler skips the step of the first one only, while ``clip_grad_norm_`` has
    multiplied the bits' gradients by NaN too. The bits' gradients are small: an optimizer that is invariant to their scale suits them, such
    as Adam, either for all parameters or as a second one, ``torch.optim.Adam([{"params": []}])``; then the first one must be made without
    the bits (before prepare, or without the parameters whose names end in ``logits``): a warning says when something else changes them.

    Bits that all groups of a weight have as they started are spread over half a bit up and down, evenly: else groups that move together
    would change their whole bits together, and the size of the file would jump.

    Call it after prepare and DistributedDataParallel, and before a learning-rate scheduler is made. A copy of the optimizer
    (``copy.deepcopy``, pickle) has no hooks and so no guard.

    Args:
        optimizer: any of torch.optim but LBFGS. A closure that its step gets is called once, before the guard looks at the gradients. If
            it was made with ``model.parameters()`` after prepare, the bits leave their old group.
        model: the prepared one, DistributedDataParallel around it or not.
        lr: of the bits' group, whose weight decay is 0.

    Returns:
        A BitGuard with the counts `steps` and `skipped`; it warns when 10 of 100 steps are skipped.

    Raises:
        TypeError: naming the argument.
        ValueError: the model has no learned bits; they are in another optimizer; DistributedDataParallel was made before prepare; or a
            scheduler before this call.

    Example:
        >>> model = quantize.prepare(nn.Linear(8, 4), quantize.DiffQ())
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        >>> guard = quantize.add_bit_parameters(optimizer, model, lr=0.01)
        >>> (model(torch.randn(2, 8)).sum() + 5 * quantize.size_penalty(model)).backward()
        >>> optimizer.step()
        >>> guard
        BitGuard(steps=1, skipped=0)
    """
    who = "add_bit_parameters"
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{who}: optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    check_module(who, model)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(f"{who}: optimizer must take one gradient a step; got LBFGS")
    check_number(
        who, "lr", lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr, 0, sys.float_info.max, "a finite number from 0"
    )
    quantizers = [*diffq_quantizers(model), *learned_activations(model)]
    if not quantizers:
        raise ValueError(f"{who}: model must have learned bits; call quantize.prepare(model, quantize.DiffQ()) first")
    logits = [q.logits for q in quantizers]
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError(
            f"{who}: optimizer must not have a learning-rate scheduler yet, which would not know the bits' group; make it after"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        known = {id(p) for p in model._module_parameters}
        if any(id(p) not in known for p in logits):
            raise ValueError(f"{who}: model must be prepared before it is wrapped in DistributedDataParallel, which does not know its bits")
    for quantizer in quantizers:
        other = quantizer.optimizer and quantizer.optimizer()
        if other is not None:
            which = "this optimizer" if other is optimizer else "another optimizer"
            raise ValueError(f"{who}: the bits of model must be in one optimizer, once; they are in {which} already")
    before = [dict(group) for group in optimizer.param_groups]
    try:
        _move(optimizer, model, logits, lr)
        for quantizer in diffq_quantizers(model):
            quantizer.spread()
    except BaseException:
        del optimizer.param_groups[len(before) :]
        for group, old in zip(optimizer.param_groups, before, strict=True):
            group.update(old)
        raise
    guard = BitGuard(logits)
    optimizer.register_step_pre_hook(guard.before_step)
    optimizer.register_step_post_hook(guard.after_step)
    for quantizer in quantizers:
        quantizer.optimizer = weakref.ref(optimizer)
    return guard


def _move(optimizer: torch.optim.Optimizer, model: nn.Module, logits: list[nn.Parameter], lr: float) -> None:
    """The bits to a group of their own."""
    own = set(logits)
    for group in optimizer.param_groups:
        kept = [i for i, p in enumerate(group["params"]) if p not in own]
        for what in ("params", "param_names"):  # names: of optimizers made from named_parameters()
            if what in group:
                group[what] = [group[what][i] for i in kept]
    named = any("param_names" in group for group in optimizer.param_groups)
    names = {p: name for name, p in model.named_parameters()}
    optimizer.add_param_group({"params": [(names[p], p) for p in logits] if named else logits, "lr": lr, "weight_decay": 0.0})
