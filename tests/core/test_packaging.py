"""What pyproject.toml, setup.py and MANIFEST.in promise to those who install the package."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
# Modules whose package has another name.
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "google": "google-cloud-compute"}


def named() -> set[str]:
    """The packages that pyproject.toml names: what is always installed, and the extras."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^\w+ = \[(.*)\]", text[text.index("[project]") : text.index("[tool.setuptools]")], re.M)
    return {re.split(r"[=<>\[]", package)[0] for packages in lists for package in re.findall(r'"(.+?)"', packages)}


def imported(script: Path) -> set[str]:
    """Modules that a script imports, or a test skips without."""
    found = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "importorskip":
            found.add(node.args[0].value)
    return {name.partition(".")[0] for name in found}


@pytest.mark.parametrize("folder", ["quantize", "examples", "benchmarks", "tests"])
def test_what_is_imported_can_be_installed(folder):
    scripts = sorted((ROOT / folder).rglob("*.py"))
    own = {path.stem for room in ("examples", "benchmarks", "tests") for path in (ROOT / room).rglob("*.py")}
    own |= {path.name for path in (ROOT / "examples").iterdir() if path.is_dir()} | {"quantize"}
    missing = {}
    for script in scripts:
        for module in imported(script) - own - sys.stdlib_module_names:
            if PACKAGES.get(module, module) not in named():
                missing[module] = str(script)
    assert not missing


def test_types_are_installed(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "quantize" / "py.typed").exists()


def test_macros_may_hold_anything(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--quiet", "--version"])
    defines = runpy.run_path("setup.py")["defines"]
    assert defines({"VERSION": "0.1.0", "REASON": 'no nvcc in /my "C:\\tools"/bin'}) == [
        '-DQUANTIZE_VERSION="0.1.0"',
        '-DQUANTIZE_REASON="no nvcc in /my \\"C:\\\\tools\\"/bin"',
    ]
