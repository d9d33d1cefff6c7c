import os
import signal
import subprocess

import pytest
import torch
from small_runs import EXAMPLES, SMALL

STAND_IN = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
if [ -n "${FAIL:-}" ] && [[ "$*" == *$FAIL* ]]; then exit "$STATUS"; fi
for word in "$@"; do if [ "${previous:-}" = --workspace ]; then touch "$word/last.pt"; fi; previous=$word; done
"""


@pytest.fixture(autouse=True)
def ctrl_c():
    """As a terminal's programs have it: a shell's background jobs, and so perhaps these tests, ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def train(tmp_path):
    """Function running train.py's main in this process: exit status, content of last.pt, log entries."""
    import logs
    import train

    def run(name, *flags):
        workspace = tmp_path / name
        status = train.main([*SMALL, "--workspace", str(workspace), *map(str, flags)])
        last, log = workspace / "last.pt", workspace / "log.jsonl"
        return status, torch.load(last, weights_only=True) if last.exists() else None, logs.read(log) if log.exists() else []

    return run


@pytest.fixture
def told(monkeypatch, capsys):
    """Function running a script as its last line does, in this process: exit status, and the line that it ends with where it fails."""
    from pathlib import Path

    from said import said

    def run(script, *flags):
        monkeypatch.setattr("sys.argv", [script.__file__])
        capsys.readouterr()
        try:
            status = said(lambda: script.main([*map(str, flags)]))
        except SystemExit as stopped:  # argparse's, whose last line counts
            return stopped.code, capsys.readouterr().err.splitlines()[-1]
        lines = capsys.readouterr().err.splitlines()  # perhaps of a progress bar, too
        assert not status or lines[-1].startswith(f"{Path(script.__file__).name}: ")
        return status, lines[-1] if status else ""

    return run


@pytest.fixture
def stand_in(tmp_path):
    """Function running a shell script with a stand-in for Python: exit status, output, and the command lines that were started."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def run(script, arguments, **variables):
        calls.write_text("")
        own = {"PYTHON": str(python), "CALLS": str(calls), "WORKSPACE": str(tmp_path / "runs")}
        done = subprocess.run(
            [EXAMPLES / script, *arguments.split()], env=os.environ | own | variables, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    return run
