"""What autograd keeps of a forward."""

import torch


def saved_dtypes(model, x):
    """Of all that `model` saves for the backward of `x`."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        model(x)
    return set(saved)
