import pytest
import torch
from small_runs import COMPRESSIONS, SMALL


@pytest.fixture(autouse=True)
def one_thread():
    """Layers of a few channels: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture(params=COMPRESSIONS)
def compression(request):
    return COMPRESSIONS[request.param]
