"""Checks of arguments: what counts as a number, and what is said about the others."""

import numpy as np
import pytest
import torch
from torch import nn

from quantize.checks import check_integer, check_module, check_number


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3)])
def test_integers(value):
    check_integer("f", "x", value, 1, 8)
    check_number("f", "x", value, 1, 8)


@pytest.mark.parametrize("value", [3.0, np.float32(3), True, np.bool_(True), "3", None, 3j, [3], torch.tensor(3)])
def test_what_is_no_integer(value):
    with pytest.raises(TypeError) as error:
        check_integer("f", "x", value, 1, 8)
    assert str(error.value) == f"f: x must be an integer from 1 to 8; got {value!r}"


def test_numbers():
    for value in (0.5, np.float16(0.5), np.float64(0.5), 1):
        check_number("f", "x", value, 0, 1)
    for value in (True, np.bool_(True), "0.5", None, 0.5j):
        with pytest.raises(TypeError, match="f: x must be a number from 0 to 1; got"):
            check_number("f", "x", value, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "an integer of at least 1; got 0"),
        ((9, 1, 8), "an integer from 1 to 8; got 9"),
        ((10**30, 1, 8), "an integer from 1 to 8; got 10000"),
        ((9, 1, 8, "few"), "few; got 9"),
    ],
)
def test_ranges(arguments, message):
    with pytest.raises(ValueError, match=f"f: x must be {message}"):
        check_integer("f", "x", *arguments)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_nan_is_in_no_range(value):
    with pytest.raises(ValueError, match="f: x must be a number from 0 to 1; got"):
        check_number("f", "x", value, 0, 1)


def test_modules():
    check_module("f", nn.Linear(1, 1))
    for other in (nn.Linear, torch.relu, [nn.Linear(1, 1)]):
        with pytest.raises(TypeError, match="f: model must be an nn.Module; got (type|builtin_function_or_method|list)"):
            check_module("f", other)
