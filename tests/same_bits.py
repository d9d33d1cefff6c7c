"""Tensors compared bit for bit, and what every ISA of this machine makes of the same inputs."""

import pytest
import torch

from quantize import _C

needs_isas = pytest.mark.skipif(len(_C.supported_isas()) < 2, reason="needs a machine with more than the portable ISA")


def on_every_isa(function):
    """{ISA: function()}; the ISA is then the one from before, whatever happens."""
    before, results = _C.cpu_isa(), {}
    try:
        for isa in _C.supported_isas():
            _C.set_cpu_isa(isa)
            results[isa] = function()
    finally:
        _C.set_cpu_isa(before)
    return results


def patterns(t):
    """Floats as the integers of their bits, which tell zeros apart, and NaN; other tensors as they are."""
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize]) if t.is_floating_point() else t


def assert_isas_agree(function):
    """function() gives the same list of tensors on every ISA, to the bit, but any NaN is as good as another. Returns the portable one."""
    results = on_every_isa(function)
    for isa, got in results.items():
        for number, (a, b) in enumerate(zip(got, results["portable"], strict=True)):
            a, b = (patterns(t.masked_fill(t.isnan(), torch.nan) if t.is_floating_point() else t) for t in (a, b))
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda text, place=f"{isa}, result {number}": f"{place}: {text}")
    return results["portable"]


def assert_same_bits(got, want):
    """Tensors, of whichever device, with equal values, NaN like NaN, dtypes and strides."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True, check_stride=True)
