"""Every example in a public docstring runs, and every public name has a docstring; README's figures are the benchmarks'."""

import doctest
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import quantize

ROOT = Path(__file__).resolve().parents[1]
RESULTS = {"MemoryReport", "PackedActivations", "SizeReport", "Summary", "VarianceReport"}
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
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(recurse=False).find(value, name, globs={"torch": torch, "nn": nn, "quantize": quantize, name: value}):
        runner.run(test)
    assert runner.failures == 0


def test_all_have_an_example():
    without = {n for n in NAMES if ">>>" not in (inspect.getdoc(getattr(quantize, n)) or "")}
    assert without == RESULTS  # shown where they come from


def section(function, title):
    """The lines of a docstring that stand under a title such as ``Args:``, less their indent."""
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)+)", inspect.getdoc(function) + "\n", re.MULTILINE)
    return textwrap.dedent(found[1]) if found else ""


def explained(text):
    """The names that lines of a section begin with: ``a:`` or ``a, b:``."""
    return {name for names in re.findall(r"^(\w+(?:, \w+)*):", text, re.MULTILINE) for name in names.split(", ")}


def assert_explained(function, what):
    """Every argument in a line of its own, and what it returns and raises."""
    signature = inspect.signature(function)
    arguments = {name for name in signature.parameters if name != "self"}
    if arguments:
        assert explained(section(function, "Args")) == arguments, what
        assert section(function, "Raises"), what
    if inspect.isroutine(function) and arguments and signature.return_annotation not in ("None", None):
        assert section(function, "Returns"), what


@pytest.mark.parametrize("name", NAMES)
def test_arguments_results_and_errors_are_explained(name):
    value = getattr(quantize, name)
    if inspect.isclass(value) and issubclass(value, nn.Module) and value is not quantize.QModule:
        assert "config=" in inspect.getdoc(value) or not name.startswith("Q")
        return  # the rest is the nn layer's own
    if name in RESULTS | {"Allocation"}:
        kept = {k for k, v in inspect.getmembers(value) if not k.startswith("_") and not callable(v)}
        assert explained(section(value, "Attributes")) >= kept, name
    elif value is quantize.QModule:
        assert explained(section(value, "Args")) == {"model", "config"}
        assert section(value, "Returns") and section(value, "Raises")
    else:
        assert_explained(value, name)
    for member in members(value) if inspect.isclass(value) else ():
        if inspect.isroutine(getattr(value, member)):
            assert_explained(getattr(value, member), f"{name}.{member}")


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="needs the source tree")
def test_readme_says_what_was_measured():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
