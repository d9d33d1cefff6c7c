"""The allocator on time, interrupted, and beside other threads."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from allocation_problems import matrix, objectives, sensitivity

import quantize

# Dense cross terms of 120 layers: nobody proves that in a test's time.
HARD = 'sensitivity(matrix("indefinite", 120, 3, 0), 120)'


@pytest.fixture
def hard():
    return sensitivity(matrix("indefinite", 120, 3, 0), 120)


def test_time_limit(hard):
    begin = time.process_time()
    allocation = quantize.allocate(hard, max_bytes=500, time_limit=0.3)
    assert time.process_time() - begin < 15
    assert not allocation.proven and not allocation.interrupted
    assert "not proven" in repr(allocation)
    mine = torch.tensor([[hard.choices.index(c) for c in allocation.choice.values()]])
    assert allocation.objective == pytest.approx(objectives(hard.matrix, mine, 3).item())
    assert allocation.lower_bound < allocation.objective
    # More time cannot do worse, and its answer is not below the first bound.
    longer = quantize.allocate(hard, max_bytes=500, time_limit=1.5)
    assert allocation.lower_bound <= longer.objective <= allocation.objective


@pytest.mark.parametrize("seconds", [1e-9, 1e-3, 0.01, 0.03])
def test_bounds_hold_whenever_it_stops(seconds):
    """Against the proven optimum."""
    for kind in ("low_rank", "indefinite", "diagonal"):
        s = sensitivity(matrix(kind, 24, 3, 1), 24)
        best = quantize.allocate(s, max_bytes=90, max_bit_ops=95, time_limit=120)
        early = quantize.allocate(s, max_bytes=90, max_bit_ops=95, time_limit=seconds)
        assert best.proven
        slack = 1e-5 * abs(best.objective)
        assert early.lower_bound <= best.objective + slack and early.objective >= best.lower_bound - slack


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupt_returns_the_best():
    code = f"""
import signal, sys, warnings
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
sys.path.insert(0, {os.path.dirname(__file__)!r})
from allocation_problems import matrix, sensitivity
import quantize
s = {HARD}
warnings.simplefilter("always")
print("ready", flush=True)
with warnings.catch_warnings(record=True) as caught:
    allocation = quantize.allocate(s, max_bytes=500, time_limit=120)
print(allocation.interrupted, allocation.bytes <= 500, allocation.lower_bound <= allocation.objective)
print([warning.category.__name__ for warning in caught], caught[0].message)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    lines = output.splitlines()
    assert lines[0] == "True True True"
    assert lines[1].startswith("['RuntimeWarning'] allocate: interrupted; the best so far: objective ")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_what_a_handler_raises_is_raised(hard):
    def handler(number, frame):
        raise LookupError("from the handler")

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(LookupError, match="from the handler"):
            quantize.allocate(hard, max_bytes=500, time_limit=60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_other_threads_run(hard):
    """Python counts while it searches, and it can search in two threads."""
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(quantize.allocate(hard, max_bytes=500, time_limit=1.0))) for _ in range(2)]
    for thread in threads:
        thread.start()
    turns = 0
    while any(thread.is_alive() for thread in threads):
        turns += 1
        time.sleep(0.005)
    assert turns > 10
    assert len(answers) == 2 and all(a.bytes <= 500 for a in answers)
