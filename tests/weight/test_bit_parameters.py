"""The bits' place in an optimizer, and the guard."""

import copy
import warnings

import pytest
import torch
from diffq_models import COARSE, Net, gradients, images, logits_of
from torch import nn

from quantize import DiffQ, Uniform, add_bit_parameters, prepare, size_penalty, weight_bits


def parts(*options):
    model = prepare(Net(), COARSE)
    return model, torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.3)


def test_bits_get_a_group_of_their_own():
    model, optimizer = parts()
    before = [p for p in model.parameters() if not any(p is own for own in logits_of(model))]
    guard = add_bit_parameters(optimizer, model, lr=0.02)
    assert repr(guard) == "BitGuard(steps=0, skipped=0)"
    rest, bits = optimizer.param_groups
    assert [id(p) for p in rest["params"]] == [id(p) for p in before]
    assert [id(p) for p in bits["params"]] == [id(p) for p in logits_of(model)]
    assert (bits["lr"], bits["weight_decay"], rest["lr"], rest["weight_decay"]) == (0.02, 0.0, 0.1, 0.3)
    start = [own.detach().clone() for own in logits_of(model)]
    gradients(model, images())
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(start, logits_of(model), strict=True))
    assert (guard.steps, guard.skipped) == (1, 0)


def test_bits_without_a_gradient_do_not_decay():
    model, optimizer = parts()
    add_bit_parameters(optimizer, model)
    start = [own.detach().clone() for own in logits_of(model)]
    for own in logits_of(model):
        own.grad = torch.zeros_like(own)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(start, logits_of(model), strict=True))


def test_a_second_optimizer():
    model = prepare(Net(), COARSE)
    logits = logits_of(model)
    main = torch.optim.SGD([p for p in model.parameters() if not any(p is own for own in logits)], lr=0.1)
    bits = torch.optim.Adam([{"params": []}])
    guard = add_bit_parameters(bits, model, lr=torch.tensor(0.1))
    before = copy.deepcopy(model.state_dict())
    gradients(model, images())
    main.step()
    bits.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed >= {name for name in dict(model.named_parameters()) if name != "conv.bias"}  # before a norm: no gradient
    assert guard.steps == 1


def test_errors_of_add_bit_parameters():
    model, optimizer = parts()
    with pytest.raises(TypeError, match="add_bit_parameters: optimizer must be a torch.optim.Optimizer; got Net"):
        add_bit_parameters(model, optimizer)
    with pytest.raises(TypeError, match="model must be an nn.Module; got list"):
        add_bit_parameters(optimizer, list(model.parameters()))
    for lr in (True, "1e-3", None):
        with pytest.raises(TypeError, match="lr must be a finite number from 0; got"):
            add_bit_parameters(optimizer, model, lr=lr)
    for lr in (-1e-3, float("nan")):
        with pytest.raises(ValueError, match="lr must be a finite number from 0; got"):
            add_bit_parameters(optimizer, model, lr=lr)
    for other in (Net(), prepare(Net(), Uniform(4))):
        with pytest.raises(ValueError, match=r"model must have learned bits; call quantize.prepare\(model, quantize.DiffQ\(\)\) first"):
            add_bit_parameters(optimizer, other)
    assert len(optimizer.param_groups) == 1  # nothing of it happened
    add_bit_parameters(optimizer, model)
    with pytest.raises(ValueError, match="in one optimizer, once; they are in this optimizer already"):
        add_bit_parameters(optimizer, model)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="in one optimizer, once; they are in another optimizer already"):
        add_bit_parameters(other, model)
    del optimizer
    add_bit_parameters(other, model)  # the first one is gone


def test_a_scheduler_comes_after():
    model, optimizer = parts()
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match="must not have a learning-rate scheduler yet, which would not know the bits' group"):
        add_bit_parameters(optimizer, model)
    model, optimizer = parts()
    add_bit_parameters(optimizer, model, lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    gradients(model, images())
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.05])


def test_distributed_data_parallel_comes_between(process_group):
    parallel = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 3)))
    prepare(parallel.module, COARSE)
    with pytest.raises(ValueError, match="model must be prepared before it is wrapped in DistributedDataParallel"):
        add_bit_parameters(torch.optim.SGD(parallel.parameters(), lr=0.1), parallel)
    model = prepare(nn.Sequential(nn.Linear(4, 3)), COARSE)
    parallel = nn.parallel.DistributedDataParallel(model)
    add_bit_parameters(torch.optim.SGD(parallel.parameters(), lr=0.1), parallel)
    assert torch.equal(size_penalty(parallel), size_penalty(model))


def spoil_logit(model, bad):
    logits_of(model)[2].grad[1] = bad


def spoil_norm(model, bad):
    model.norm.weight.grad[3] = bad


def spoil_prepared(model, bad):
    model.fc.parametrizations.weight.original.grad[1, 2] = bad


def spoil_frozen(model, bad):
    model.conv.parametrizations.weight.original.grad[0, 0, 1, 1] = bad


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spoil", [spoil_logit, spoil_norm, spoil_prepared, spoil_frozen])
def test_a_bad_gradient_skips_the_whole_step(spoil, bad):
    model, optimizer = parts()
    guard = add_bit_parameters(optimizer, model, lr=0.1)
    model.conv.eval()  # its bits get no gradient
    gradients(model, images())
    optimizer.step()
    before, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    gradients(model, images())
    before |= {name: value.clone() for name, value in model.state_dict().items() if "running" in name or "tracked" in name}
    spoil(model, bad)
    optimizer.step()
    assert repr(guard) == "BitGuard(steps=2, skipped=1)"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, states["state"][index][name]) for name, value in state.items())
    gradients(model, images())
    optimizer.step()
    assert (guard.steps, guard.skipped) == (3, 1)
    assert not torch.equal(before["fc.bias"], model.fc.bias)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_tied_embedding_s_own_gradient_counts():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, i):
            return self.out(self.embedding(i))

    model = prepare(Language(), COARSE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = add_bit_parameters(optimizer, model)
    found = model.embedding(torch.tensor([1, 2]))
    found.register_hook(lambda grad: grad * torch.inf)
    model.out(found).sum().backward()
    optimizer.step()
    assert guard.skipped == 1
    assert model.embedding.weight.isfinite().all()


def test_many_skipped_steps_are_warned_of():
    model = prepare(nn.Linear(4, 3), COARSE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = add_bit_parameters(optimizer, model)

    def run(steps, bad):
        for i in range(steps):
            for p in model.parameters():
                p.grad = torch.full_like(p, torch.nan if i < bad else 0.0)
            optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(100, 9)
    with pytest.warns(UserWarning, match="add_bit_parameters: 10 of the last 100 steps were skipped .*19 of 200 in all"):
        run(100, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(100, 3)
    assert (guard.steps, guard.skipped) == (300, 22)


def test_another_optimizer_that_holds_the_bits_is_warned_of():
    model = prepare(nn.Linear(64, 64), COARSE)
    every = torch.optim.SGD(model.parameters(), 0.1, weight_decay=5e-2)
    own = torch.optim.Adam([{"params": []}])
    add_bit_parameters(own, model)

    def run(*optimizers):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for optimizer in optimizers:
            optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(own)
        model.load_state_dict(copy.deepcopy(model.state_dict()))  # once is no sign of it
        run(own), run(own), run(every, own), run(every, own)
    with pytest.warns(UserWarning, match="something else changes the bits between the steps of their optimizer") as caught:
        run(every, own)
    assert caught[0].filename == __file__


def test_bits_that_are_all_alike_start_apart_and_are_left_alone_later():
    def bits(model):
        return weight_bits(model)["weight"]

    def added(model):
        add_bit_parameters(torch.optim.Adam([{"params": []}]), model)
        return bits(model)

    model = prepare(nn.Linear(64, 64), DiffQ(8, init_bits=6))
    started = added(model).clone()
    assert len(set(started.tolist())) > 500
    assert 5.4 < float(started.min()) < 5.6 < 6.4 < float(started.max()) < 6.6
    assert abs(float(started.mean()) - 6) < 1e-3
    again = prepare(nn.Linear(64, 64), DiffQ(8, init_bits=6))
    again.load_state_dict(model.state_dict())
    assert torch.equal(added(again), started)
    with torch.no_grad():
        for group in again.parameters():
            group.fill_(-8)
    resumed = prepare(nn.Linear(64, 64), DiffQ(8, init_bits=6))
    resumed.load_state_dict(again.state_dict())  # at their least, all of them
    assert torch.equal(added(resumed), bits(again))
    assert added(prepare(nn.Linear(16, 16), DiffQ(0))).tolist() == pytest.approx([8])


def test_bits_are_projected_into_their_bounds():
    model = prepare(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)), DiffQ())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    add_bit_parameters(optimizer, model, lr=1e4)
    for sign, bits in ((1, 2.0), (-1, 15.0)):
        for p in model.parameters():
            p.grad = torch.full_like(p, float(sign))
        optimizer.step()
        assert all(own.abs().max() == 8 for own in logits_of(model))
        for found in weight_bits(model).values():
            torch.testing.assert_close(found, torch.full_like(found, bits), rtol=0, atol=13 * 4e-4)
    optimizer.zero_grad()
    size_penalty(model).backward()
    assert all((own.grad > 0).all() for own in logits_of(model))  # the way back


class Norms(nn.Module):
    """A prepared layer between two parameters that are not."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.norm(x))


def deadly_recipe(guarded, bad, steps=6):
    """Two optimizers under one gradient scaler, one clipping of all gradients, and an overflow in a layer that is not quantized."""
    torch.manual_seed(0)
    model = prepare(Norms(), COARSE)
    logits = logits_of(model)
    main = torch.optim.SGD([p for p in model.parameters() if not any(p is own for own in logits)], lr=0.01)
    bits = torch.optim.Adam([{"params": []}] if guarded else logits, lr=0.01)
    guard = add_bit_parameters(bits, model, lr=0.01) if guarded else None
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(steps):
        main.zero_grad()
        bits.zero_grad()
        loss = model(torch.randn(16, 8)).square().mean() + size_penalty(model)
        scaler.scale(loss).backward()
        if step == 3:
            model.norm.weight.grad[2] = bad
        scaler.unscale_(main)
        scaler.unscale_(bits)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(main)
        scaler.step(bits)
        scaler.update()
    return model, guard


def test_the_recipe_that_killed_the_original():
    dead, _ = deadly_recipe(False, torch.nan)
    assert all(own.isnan().all() for own in logits_of(dead))
    for bad, skipped in ((torch.nan, 1), (torch.inf, 0)):  # clipping divides the others by infinity: zeros harm nobody
        model, guard = deadly_recipe(True, bad)
        assert all(p.isfinite().all() for p in model.parameters())
        assert (guard.steps, guard.skipped) == (6, skipped)


def test_optimizers_with_names():
    model = prepare(Net(), DiffQ())
    optimizer = torch.optim.AdamW(model.named_parameters(), 1e-3)
    add_bit_parameters(optimizer, model)
    names = dict(model.named_parameters())
    for group in optimizer.param_groups:
        assert len(group["params"]) == len(group["param_names"])
        assert all(names[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in logits_of(model)}
