"""CUDA kernels take what the schema says, in number and kind: else the library aborts at import, which only a CUDA build would show."""

import re
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
KINDS = (  # of a C++ parameter, by the first that matches, and of a schema's
    (r"TensorList|ArrayRef<\w*Tensor>", r"Tensor\[\]|List\[Tensor\]"),
    (r"optional<\w*:*Tensor>|OptionalTensor", r"Optional\[Tensor\]"),
    (r"Tensor", r"Tensor"),
    (r"optional<double>", r"Optional\[float\]"),
    (r"ArrayRef<double>", r"List\[float\]"),
    (r"ArrayRef<bool>|array<bool", r"List\[bool\]"),
    (r"SymIntArrayRef|IntArrayRef", r"List\[(Sym)?[iI]nt\]"),
    (r"string_view", r"str"),
    (r"double", r"float"),
    (r"bool", r"bool"),
    (r"ScalarType|int64_t|SymInt", r"int|SymInt|ScalarType"),
)

pytestmark = pytest.mark.skipif(not CSRC.exists(), reason="the sources are not here")


def registered():
    for file in sorted(CSRC.rglob("*.cu")):
        for op, function in re.findall(r'm\.impl\("(\w+)", (\w+)\)', file.read_text()):
            yield pytest.param(file, op, function, id=op)


def parameters(file: Path, function: str) -> list[str]:
    """Of the function's definition, as written."""
    text = re.sub(r"//.*", "", file.read_text())
    (found,) = re.findall(rf"\b{function}\(([^()]*)\) \{{", text)
    depth, parts = 0, [""]
    for c in found:
        depth += (c == "<") - (c == ">")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


@pytest.mark.parametrize(("file", "op", "function"), list(registered()))
def test_kernels_take_what_the_schema_says(file, op, function):
    wanted = getattr(torch.ops.quantize, op).default._schema.arguments
    got = parameters(file, function)
    assert len(got) == len(wanted), f"{op}: {len(wanted)} arguments, {function} in {file.name} takes {len(got)}"
    for written, argument in zip(got, wanted, strict=True):
        kind = next(schema for cpp, schema in KINDS if re.search(cpp, written))
        assert re.fullmatch(kind, str(argument.type)), f"{op}: {argument.name} is {argument.type}, {function} takes {written!r}"
