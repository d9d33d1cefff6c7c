"""QSyncBatchNorm in two gloo processes against a plain batch norm on the joint batch."""

import pytest
import sync_batch_norm_processes as processes
import torch
from torch import nn


@pytest.fixture(scope="module")
def results(gloo):
    """What each process wrote."""
    folder = gloo(processes.__file__)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def expected(name):
    """The same of nn.BatchNorm on the joint batch, in double: rounding errors are then ours alone."""
    x, grad = (t.double() for t in processes.joint(name))
    cls = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[x.dim()]
    module = processes.layer(name, cls).double()
    for _ in range(2):
        x = x.detach().clone().requires_grad_()
        module.zero_grad()
        y = module(x)
        y.backward(grad)
    gradients = {n: p.grad for n, p in module.named_parameters()}
    module.eval()
    return y.detach(), x.grad, gradients, dict(module.named_buffers()), module(x).detach()


def close(got, want, name):
    tolerance = {"far from zero": 2e-3, "double": 1e-12}.get(name, 2e-5)  # fp32 holds 1024 + x to 6e-5
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [n for n in processes.CASES if n != "two bits"])
def test_two_processes_are_one_batch(results, name):
    y, dx, gradients, buffers, evaluated = expected(name)
    close(torch.cat([r[name][0] for r in results]), y, name)
    close(torch.cat([r[name][1] for r in results]), dx, name)
    close(torch.cat([r[name][4] for r in results]), evaluated, name)
    for result in results:
        assert result[name][2].keys() == gradients.keys()
        for key, want in gradients.items():
            assert (result[name][2][key] is None) == (want is None)
            if want is not None:
                close(result[name][2][key], want, name)
        for key, want in buffers.items():
            close(result[name][3][key], want, name)


def test_two_bits(results):
    y, dx, gradients, *_ = expected("two bits")
    close(torch.cat([r["two bits"][0] for r in results]), y, "two bits")
    got = torch.cat([r["two bits"][1] for r in results]).double()
    assert torch.nn.functional.cosine_similarity(got.flatten(), dx.flatten(), dim=0) > 0.99
    close(results[0]["two bits"][2]["bias"], gradients["bias"], "two bits")
    assert not torch.equal(results[0]["two bits"][2]["weight"].double(), gradients["weight"])


def test_too_few_values_are_refused_by_all(results):
    for result in results:
        assert "input must have more than one value per channel" in result["too few"]


def test_energies_are_those_of_the_joint_batch(results):
    want, squares = processes.energies(slice(None), nn.BatchNorm2d)
    got = torch.cat([r["energy"][0] for r in results])
    torch.testing.assert_close(got[:, 0], want[:, 0])
    # Relative to the input gradient of the process, which is a part of the joint one. The packed kernels add up in another order.
    shares = torch.cat([r["energy"][1].expand(len(r["energy"][0])) for r in results])
    torch.testing.assert_close(got[:, 1] * shares, want[:, 1] * squares, rtol=1e-4, atol=0)


def test_bits_move_between_synchronized_layers_too(results):
    for result in results:
        states = result["settled"]
        assert states["1"]["updates"] == 4 and states["1"]["curve"][0] > 0
        assert states["1"]["budget"] > 2 > states["3"]["budget"]
        spent = sum(state["budget"] * state["elements"] for state in states.values())
        assert spent == pytest.approx(2 * sum(state["elements"] for state in states.values()))
