"""measure_sensitivity in gloo processes: what one process measures, by parts."""

import functools

import pytest
import sensitivity_processes as processes
import torch

from quantize import Sensitivity


@pytest.fixture(scope="module")
def launched(gloo):
    """Where so many processes put what came out."""
    return functools.cache(lambda world: gloo(processes.__file__, world))


@pytest.fixture(scope="module")
def alone():
    return {name: processes.measure(name) for name in processes.CASES}


def same(folder, world, name, want):
    found = [Sensitivity.load(folder / f"{name} {rank}") for rank in range(world)]
    for own in found:
        assert torch.equal(own.matrix, found[0].matrix)  # whoever saves it
        assert own.layers == want.layers and own.samples == want.samples and own.other_bytes == want.other_bytes
        assert torch.equal(own.bytes, want.bytes) and torch.equal(own.bit_ops, want.bit_ops)
    torch.testing.assert_close(found[0].matrix, want.matrix, rtol=1e-12, atol=1e-12 * float(want.matrix.abs().max()))


@pytest.mark.parametrize("world, name", [*((2, name) for name in processes.CASES), *((3, name) for name in processes.FEW)])
def test_processes_give_what_one_does(launched, alone, world, name):
    same(launched(world), world, name, alone[name])


def test_different_arguments_are_refused_by_all(launched):
    for rank in range(2):
        text = torch.load(launched(2) / f"text {rank}")
        for what in ("batches", "model"):
            assert text[what] == "measure_sensitivity: model and batches must be the same in all processes; they are not"


@pytest.mark.parametrize("name, lost", processes.STOPPED)
def test_stopped_processes_go_on(launched, alone, name, lost):
    for rank in range(2):
        text = torch.load(launched(2) / f"text {rank}")
        assert [text[f"{when} {name} {lost}"] for when in ("stopped", "there", "gone")] == [True] * 3
    same(launched(2), 2, f"resumed {name} {lost}", alone[name])


def test_the_damaged_file_of_one_is_refused_by_all(launched):
    first, second = (torch.load(launched(2) / f"text {rank}")["damaged"] for rank in range(2))
    assert "checkpoint.0-of-2 is damaged or no safetensors file" in first
    assert second == "measure_sensitivity: checkpoint must be of this measurement in all processes; another process' is not"
