import signal

import pytest
import torch
from small_runs import SMALL


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
