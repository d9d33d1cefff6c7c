"""Files name the headers of what they use: a build that joins files in another order, or without precompiled headers, must not break."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
ATEN = Path(torch.__file__).parent / "include/ATen"
OTHERS = {  # beside the ops, each of which has a header of its name
    "parallel_for": "ATen/Parallel.h",
    "get_num_threads": "ATen/Parallel.h",
    "NoGradGuard": "ATen/core/grad_mode.h",
    "Tensor": "ATen/core/Tensor.h",
}

pytestmark = pytest.mark.skipif(not CSRC.exists(), reason="the sources are not here")


@cache
def included(file: Path) -> frozenset[str]:
    """What `file` includes, also by the project's own headers."""
    found = set()
    for name in re.findall(r'#include [<"](.+?)[>"]', file.read_text()):
        own = (file.parent / name).resolve()
        found |= included(own) if own.exists() else {name}
    return frozenset(found)


def wanted(file: Path) -> set[str]:
    """The headers of the ops and of OTHERS that `file` itself names."""
    text = re.sub(r"//.*", "", file.read_text())
    ops = {name for name in re.findall(r"\bat::(\w+)\(", text) if (ATEN / f"ops/{name}.h").exists()}
    return {f"ATen/ops/{name}.h" for name in ops} | {header for name, header in OTHERS.items() if re.search(rf"\bat::{name}\b", text)}


@pytest.mark.parametrize("file", sorted(p.relative_to(CSRC).as_posix() for p in CSRC.rglob("*") if p.suffix in (".cpp", ".cu")))
def test_what_a_file_uses_it_includes(file):
    assert wanted(CSRC / file) - included(CSRC / file) == set()
