"""Activations with learned bits and a learned end: the op against autograd with the same noise, and the quantizer in a model."""

import copy

import pytest
import torch
from same_bits import assert_isas_agree
from torch import nn
from torch.utils.checkpoint import checkpoint

import quantize
from quantize import DiffQ, Uniform
from quantize.weight.learned_activation import LearnedBitsQuantizer

ops = torch.ops.quantize
SEED = torch.tensor([3, 4])


def twin(x, ends, noise):
    """The op in PyTorch's own functions."""
    return torch.minimum(torch.maximum(x, ends[0]), ends[1]) + noise * ends[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5, 17), (2, 2048), (4097,)], ids=str)
def test_against_autograd(each_isa, shape, dtype):
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    noise = ops.clipped_noise(torch.zeros(shape), torch.tensor([-1.0, 1.0, 1.0]), SEED)
    results = []
    for function in (lambda a, e: ops.clipped(a, e, SEED), lambda a, e: twin(a.float(), e, noise).to(dtype)):
        a, ends = (
            x.clone().requires_grad_(),
            torch.tensor([-0.5003, 0.8007, 0.1], requires_grad=True),
        )  # no half's own number: twin and op part at ties
        y = function(a, ends)
        y.backward(grad)
        results.append((y.detach(), a.grad, ends.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5 * len(x.flatten()) ** 0.5)
    assert noise.abs().max() <= 0.5


def test_isas_and_threads_agree():
    x, ends = torch.randn(50_001), torch.tensor([-1.0, 1.0, 0.2])

    def run():
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((ops.clipped_noise(x, ends, SEED), *ops.clipped_noise_backward(x, x, ends, SEED)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        return found[0]

    assert_isas_agree(run)


def test_ends_with_gaps_in_memory():
    x, ends = torch.randn(100), torch.tensor([-1.0, 1.0, 0.2])
    apart = ends.repeat_interleave(2)[::2]
    assert torch.equal(ops.clipped_noise(x, apart, SEED), ops.clipped_noise(x, ends, SEED))
    for got, want in zip(ops.clipped_noise_backward(x, x, apart, SEED), ops.clipped_noise_backward(x, x, ends, SEED), strict=True):
        assert torch.equal(got, want)


def test_op_errors():
    with pytest.raises(ValueError, match="ends must have 3 elements"):
        ops.clipped_noise(torch.randn(3), torch.ones(2), SEED)
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16"):
        ops.clipped_noise(torch.randn(3).double(), torch.ones(3), SEED)
    with pytest.raises(ValueError, match="seed must be an int64 CPU tensor"):
        ops.clipped_noise(torch.randn(3), torch.ones(3), torch.ones(2))


@pytest.mark.parametrize("name", ["clipped_noise", "clipped_noise_backward"])
def test_opcheck(name):
    x, ends = torch.randn(4, 5), torch.tensor([-1.0, 1.0, 0.2])
    arguments = (x, ends, SEED) if name == "clipped_noise" else (x, x, ends, SEED)
    torch.library.opcheck(getattr(ops, name).default, arguments)


def prepared(low=0.0, init_bits=8):
    torch.manual_seed(0)
    model = quantize.prepare(
        nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)), DiffQ(activation_bits="learned", init_bits=init_bits)
    )
    model(torch.rand(16, 64) + low)
    return model


@pytest.mark.parametrize("low", [0.0, -0.5])
def test_training_noise_has_the_deviation_of_rounding(low):
    model = prepared(low)
    quantizer = model[0].activation_quantizer
    x = (torch.rand(4000, 64) + low) * 0.9
    noisy = quantizer(x) - x
    quantizer.eval()
    rounded = quantizer(x) - x
    assert 0.9 < noisy.std() / rounded.std() < 1.1
    assert quantizer.is_signed == (low < 0)
    assert quantizer(torch.zeros(3)).eq(0).all()  # padding is exact


def test_converted_equals_evaluation():
    for low in (0.0, -0.5):
        model = prepared(low, init_bits=4).eval()
        x = torch.rand(8, 64) + low
        packed = quantize.convert(model)
        assert packed[0].activation_bits == model[0].activation_quantizer.bits == 4
        torch.testing.assert_close(packed(x), model(x), atol=1e-5, rtol=1e-5)
        assert [row.activation_bits for row in quantize.summary(packed, x).layers] == [4, 4]


def test_bits_follow_the_penalty_and_the_loss():
    model = prepared()
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if not name.endswith("logits")], 1e-3)
    bits = torch.optim.Adam([{"params": []}])
    quantize.add_bit_parameters(bits, model, lr=0.05)
    assert len(bits.param_groups[-1]["params"]) == 4  # two weights, two inputs
    before = float(quantize.activation_penalty(model))
    for _ in range(60):
        loss = model(torch.rand(16, 64)).square().mean() + 1e3 * quantize.activation_penalty(model)
        for o in (optimizer, bits):
            o.zero_grad()
        loss.backward()
        for o in (optimizer, bits):
            o.step()
    assert float(quantize.activation_penalty(model)) < 0.75 * before
    assert all(p.isfinite().all() for p in model.parameters())
    assert 2 <= model[0].activation_quantizer.bits < 8


def test_state_and_copies():
    model, other = prepared(-0.5), prepared()
    model[0].activation_quantizer.logits.data.fill_(0.3)
    other.load_state_dict(model.state_dict())
    x = torch.rand(4, 64) - 0.5
    for own in (other, copy.deepcopy(model)):
        assert own[0].activation_quantizer.is_signed and own[0].activation_quantizer.initialized
        assert torch.equal(own.eval()(x), model.eval()(x))


def test_calibrate_and_half():
    model = quantize.prepare(nn.Sequential(nn.Linear(8, 4)), DiffQ(activation_bits="learned"))
    quantize.calibrate(model, [torch.randn(16, 8) for _ in range(3)])
    assert model[0].activation_quantizer.initialized and model[0].activation_quantizer.is_signed
    assert model.half().train()(torch.randn(4, 8).half()).dtype == torch.float16
    assert model.eval()(torch.randn(4, 8).half()).isfinite().all()


def test_starts_inside_a_checkpoint():
    new, results = quantize.prepare(nn.Sequential(nn.Linear(8, 8)), DiffQ(activation_bits="learned")), []
    x, started = torch.randn(4, 8), copy.deepcopy(new)
    started(x)
    for model in (started, new):
        torch.manual_seed(0)
        own = x.clone().requires_grad_()
        checkpoint(model, own, use_reentrant=False).sum().backward()
        results.append([own.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_bound_below_zero_comes_back():
    model = prepared()
    bound = model[0].activation_quantizer.bound
    bound.data.fill_(-0.1)
    optimizer = torch.optim.Adam([bound], 0.05)
    x = torch.rand(16, 64)
    for _ in range(20):
        optimizer.zero_grad()
        (model[0].activation_quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert bound > 0.3


def test_values_that_are_not_finite():
    quantizer = prepared(-0.5)[0].activation_quantizer
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0]])
    for training in (True, False):
        y = quantizer.train(training)(x)[0]
        assert y[0].isnan() and y[1:].isfinite().all() and y[1] > 0 > y[2]
    assert quantizer.train()(torch.zeros(0, 64)).shape == (0, 64)


def test_nan_logit_and_errors():
    model = prepared()
    model[0].activation_quantizer.logits.data.fill_(torch.nan)
    model(torch.rand(4, 64)).sum().backward()
    assert model[0].activation_quantizer.bits == 8 and quantize.activation_penalty(model).isfinite()
    with pytest.raises(ValueError, match="activation_penalty: model must be prepared with"):
        quantize.activation_penalty(quantize.prepare(nn.Linear(2, 2), Uniform(4)))
    with pytest.raises(ValueError, match="model must have run in training mode"):
        quantize.activation_penalty(quantize.prepare(nn.Sequential(nn.Linear(2, 2)), DiffQ(activation_bits="learned")))
    with pytest.raises(TypeError, match="activation_penalty: model must be an nn.Module"):
        quantize.activation_penalty(3)
    with pytest.raises(ValueError, match="DiffQ: min_bits must be from 2 to 8"):
        DiffQ(min_bits=1, activation_bits="learned")
    with pytest.raises(TypeError, match="DiffQ: activation_bits"):
        DiffQ(activation_bits="all")
    assert isinstance(model[0].activation_quantizer, LearnedBitsQuantizer)
