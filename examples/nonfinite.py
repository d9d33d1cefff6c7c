"""Which layer made a loss NaN or infinite."""

import torch
from torch import Tensor, nn


def first_nonfinite(model: nn.Module, inputs: Tensor) -> str:
    """Run `model` on `inputs` once more and name the first layer whose output is not finite although its input is."""
    if not _finite(inputs):
        return "the input batch itself holds values that are not finite"
    found = []

    def look(name, module):
        def hook(_, arguments, output):
            if not found and _finite(arguments) and not _finite(output):
                found.append((name, module))

        return hook

    # Inner modules finish before the outer ones, so the first to be found is the innermost.
    handles = [module.register_forward_hook(look(name, module)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return "every layer's output is finite when run again: the loss itself overflowed"
    name, module = found[0]
    broken = [key for key, parameter in module.named_parameters() if not _finite(parameter)]
    cause = f"its {' and '.join(broken)} had become so before" if broken else "its input and parameters are finite"
    return f"the first layer to make it is {name} ({type(module).__name__}): {cause}"


def _finite(value):
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, (tuple, list)):
        return all(map(_finite, value))
    return True
