"""Every example in a public docstring runs, and every public name has a docstring; README's figures are the benchmarks'."""

import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import quantize

ROOT = Path(__file__).resolve().parents[1]
NAMES = [name for name in quantize.__all__ if not name.startswith("__")]


def members(cls):
    """Its own public methods and properties that have something to say beyond nn's."""
    return {k: v for k, v in vars(cls).items() if not k.startswith("_") and (callable(v) or isinstance(v, property))}


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name):
    value = getattr(quantize, name)
    assert inspect.getdoc(value), f"{name} has no docstring"
    if inspect.isclass(value):
        for member, function in members(value).items():
            assert inspect.getdoc(function), f"{name}.{member} has no docstring"
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(recurse=False).find(value, name, globs={"torch": torch, "nn": nn, "quantize": quantize, name: value}):
        runner.run(test)
    assert runner.failures == 0


def test_all_have_an_example():
    without = {n for n in NAMES if ">>>" not in (inspect.getdoc(getattr(quantize, n)) or "")}
    assert without == {
        "MemoryReport",
        "PackedActivations",
        "SizeReport",
        "Summary",
        "VarianceReport",
    }  # results, shown where they come from


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="needs the source tree")
def test_readme_says_what_was_measured():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
