"""Models whose parameters or activations are tensors of several processes: what is theirs is kept as it is, and reports say so."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import quantize
from quantize import ActivationConfig

CONFIGS = [ActivationConfig(bits=2, max_bits=2), ActivationConfig()]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))


@pytest.mark.parametrize("config", CONFIGS)
def test_tensor_parallel(process_group, config):
    mesh, x = init_device_mesh("cpu", (1,)), torch.randn(4, 8)
    plan = {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}
    plain, ours = parallelize_module(mlp(), mesh, plan), quantize.QModule(parallelize_module(mlp(), mesh, plan), config)
    for model in (plain, ours):
        model(x).square().sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad.full_tensor(), b.grad.full_tensor())
    assert quantize.memory_report(ours, x).saved_bytes > 0
    distributed = quantize.QModule(distribute_module(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.5)), mesh), config)
    distributed(distribute_tensor(x, mesh)).sum().backward()
    assert all(p.grad is not None for p in distributed.parameters())


def test_reports_of_sharded_models(process_group):
    mesh, x = init_device_mesh("cpu", (1,)), torch.randn(64, 8)
    model = quantize.QModule(mlp(), CONFIGS[0])
    expected = quantize.memory_report(model, x)
    sharded = fully_shard(copy.deepcopy(model), mesh=mesh)
    report = quantize.memory_report(sharded, x)
    assert report.saved_bytes <= expected.saved_bytes + sum(p.numel() * 4 for p in model.parameters())
    assert quantize.memory_report(fully_shard(mlp(), mesh=mesh), x).saved_bytes > report.saved_bytes
    with pytest.raises(ValueError, match="variance_report: model must have parameters that the loss depends on"):
        quantize.variance_report(fully_shard(copy.deepcopy(model), mesh=mesh), [(x, torch.arange(64) % 2)], F.cross_entropy)
    sharded(x).sum().backward()
    assert quantize.QModule(sharded, CONFIGS[1]) is sharded
    sharded(x).sum().backward()
