"""Attention: outputs bit-equal, gradients those of the packed query, key and value, nothing else kept."""

import copy

import pytest
import torch
import torch.nn.functional as F
from exact_levels import EXACT, keeps, levels, run
from torch import nn

import quantize
from quantize.activation.state import override


def config(bits):
    return quantize.ActivationConfig(bits=bits, max_bits=bits)


class Attend(nn.Module):
    """`options` by name are attention's. Heads are cut out of one tensor, as models do."""

    def __init__(self, groups=1, mask=None, learned=False, **options):
        super().__init__()
        self.groups, self.options = groups, {"scale": 0.02, **options}
        self.mask = nn.Parameter(mask) if learned else mask

    def forward(self, x):
        query, key, value = x.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        if self.groups > 1:
            key, value = key[:, :: self.groups], value[:, :: self.groups]
        return F.scaled_dot_product_attention(query, key, value, self.mask, **self.options)


LOWER = torch.ones(30, 30, dtype=torch.bool).tril()
CASES = {
    "plain": lambda: Attend(),
    "causal": lambda: Attend(is_causal=True),
    "mask": lambda: Attend(mask=LOWER),
    "bias": lambda: Attend(mask=torch.randn(30, 30)),
    "learned bias": lambda: Attend(mask=torch.randn(4, 30, 30), learned=True),
    "grouped": lambda: Attend(groups=2, enable_gqa=True),
    "dropout": lambda: Attend(dropout_p=0.3),
    "dropout and bias": lambda: Attend(dropout_p=0.3, mask=torch.randn(30, 30)),
}


def both(case, x, bits=EXACT):
    """Outputs and gradients, plain and ours, by the same dropout; and what ours saved."""
    plain = case()
    ours = quantize.QModule(copy.deepcopy(plain), bits)
    torch.manual_seed(3)
    y, grads, _ = run(plain, x)
    torch.manual_seed(3)
    with override(generator=torch.Generator().manual_seed(1)):
        got, got_grads, saved = run(ours, x)
    return (y, grads), (got, got_grads), keeps(saved, ours, x)


@pytest.mark.parametrize("name", CASES)
def test_as_plain_at_exact_levels(name):
    plain, ours, saved = both(CASES[name], levels(3, 30, 3 * 4 * 16))
    assert torch.equal(ours[0], plain[0]) and ours[0].stride() == plain[0].stride()
    for a, b in zip(ours[1], plain[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert saved == {torch.uint8}


@pytest.mark.parametrize("name", CASES)
def test_the_mean_of_two_bits_is_near(name):
    """Query and key in 8 bits bias the mean by less than a hundredth; of 60 draws of the value's noise an eighth is left."""
    case, x = CASES[name](), torch.randn(3, 30, 3 * 4 * 16)
    case.options["scale"] = 0.25
    torch.manual_seed(3)
    exact = run(case, x)[1][0]
    model, draws = quantize.QModule(copy.deepcopy(case), config(2)), []
    for seed in range(60):
        torch.manual_seed(3)
        with override(generator=torch.Generator().manual_seed(seed)):
            draws.append(run(model, x)[1][0])
    draws = torch.stack(draws)
    spread = (draws.var(0).sum() / exact.square().sum()).sqrt()
    assert 0.1 < spread < 2
    assert (draws.mean(0) - exact).norm() / exact.norm() < 1.2 * spread / 60**0.5 + 0.01


def test_gradients_are_unbiased_in_the_value():
    # Query and key at levels of 8 bits, the value at any: over 400 draws each mean is within five deviations, the sum by its own.
    x = levels(2, 30, 3 * 4 * 16)
    x[..., 2 * 64 :] = torch.randn(2, 30, 64)
    case = Attend()
    exact = run(case, x)[1][0]
    model = quantize.QModule(copy.deepcopy(case), quantize.ActivationConfig(bits=2, max_bits=2, group_size="sample"))
    draws = torch.stack([run(model, x)[1][0] for _ in range(400)])
    deviation = draws.std(0)
    assert torch.equal(draws[0][..., 128:], exact[..., 128:])  # of the value: it is not in its own gradient
    noisy = deviation[..., :128] > 0
    assert noisy.float().mean() > 0.9
    z = ((draws.mean(0) - exact)[..., :128] / deviation[..., :128].clamp_min(1e-12) * 20)[noisy]
    assert z.abs().max() < 6
    assert abs(float(z.mean())) < 0.2  # half of a deviation would be one


def test_dropout_draws_the_same_again_and_leaves_the_generator_alone():
    x = torch.randn(3, 30, 3 * 4 * 16, requires_grad=True)
    model = quantize.QModule(Attend(dropout_p=0.3), config(8))
    y = model(x)
    torch.manual_seed(11)
    expected = torch.rand(5)
    torch.manual_seed(11)
    y.sum().backward()
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    plain, ours, saved = both(Attend, levels(3, 30, 3 * 4 * 16).to(dtype))
    assert torch.equal(ours[0], plain[0]) and ours[0].dtype == dtype
    torch.testing.assert_close(ours[1][0], plain[1][0], rtol=0.02, atol=1e-3)
    assert saved == {torch.uint8}


def test_autocast():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.attend = nn.Linear(64, 3 * 64), Attend(mask=torch.randn(4, 30, 30), learned=True)

        def forward(self, x):
            return self.attend(self.qkv(x))

    plain, x = Net(), torch.randn(3, 30, 64)
    ours = quantize.QModule(copy.deepcopy(plain), config(8))
    for model in (plain, ours):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
            assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert a.grad.dtype == b.grad.dtype
        assert F.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0) > 0.999


def layers():
    encoder = nn.TransformerEncoderLayer(64, 4, 128, activation="gelu", batch_first=True, dropout=0.0)
    decoder = nn.TransformerDecoderLayer(64, 4, 128, batch_first=True, dropout=0.0)

    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x):
            y, weights = self.attention(x, x, x)
            return y + weights.sum(-1, keepdim=True)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, x):
            return self.decoder(x, x.flip(1), tgt_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]))

    return {"encoder": encoder, "decoder": Both(), "with weights": Weights()}


@pytest.mark.parametrize("name", layers())
def test_pytorch_s_transformers(name):
    plain, x = layers()[name], torch.randn(4, 40, 64)
    ours = quantize.QModule(copy.deepcopy(plain), config(8))
    y, grads, _ = run(plain, x)
    got, got_grads, saved = run(ours, x)
    assert torch.equal(got, y)
    for a, b in zip(got_grads, grads, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99
    assert any(not torch.equal(a, b) for a, b in zip(got_grads, grads, strict=True))
    assert {n for n in ours.layer_bits() if n.endswith("out_proj")}
    two = quantize.QModule(ours, config(2))
    report = quantize.memory_report(two, x)
    if name != "with weights":  # by a softmax of its own, which is kept
        assert report.ratio > 7
        assert {row.reason for row in report.layers if row.bytes > 4096} <= {"", "attention's mask, kept as it is"}
        assert {row.bits for row in report.layers if "attention" in row.op and not row.reason} == {6}  # 8, 8 and 2
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), two.eval()(x))


def test_nan_and_inf_stay_in_their_sample():
    for bad in (torch.nan, torch.inf):
        x = torch.randn(4, 30, 3 * 4 * 16)
        x[1, 3, 5] = x[1, 3, 130] = bad
        _, (grad,), _ = run(quantize.QModule(Attend(), config(2)), x)
        assert grad[[0, 2, 3]].isfinite().all()
        assert not grad[1].isfinite().all()


def test_one_attention_twice_in_one_forward():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x):
            y = self.attention(x, x, x, need_weights=False)[0]
            return self.attention(y, x, x, need_weights=False)[0]

    plain, x = Twice(), torch.randn(4, 40, 64)
    y, grads, _ = run(plain, x)
    got, got_grads, _ = run(quantize.QModule(copy.deepcopy(plain), config(8)), x)
    assert torch.equal(got, y)
    for a, b in zip(got_grads, grads, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99


def test_evaluation_is_pytorch_s_fused_kernel():
    plain = nn.TransformerEncoderLayer(64, 4, 128, activation="gelu", batch_first=True).eval()
    ours, x = quantize.QModule(copy.deepcopy(plain), config(2)), torch.randn(4, 40, 64)
    with torch.no_grad(), torch.profiler.profile() as profile:
        y = ours(x)
        assert torch.equal(y, plain(x))
    calls = [event.count for event in profile.key_averages() if event.key == "aten::_transformer_encoder_layer_fwd"]
    assert calls == [2]


def test_layers_that_are_told_to_stay_plain():
    model = quantize.QModule(nn.Sequential(Attend()), {"*": config(2), "": None})
    assert torch.uint8 not in {t.dtype for t in run(model, torch.randn(3, 30, 192))[2]}


def test_what_is_left_to_pytorch():
    x = torch.randn(3, 30, 3 * 4 * 16)
    for model, shaped in ((Attend(), x.double()), (Attend(), x[:0])):
        y, grads, _ = run(model, shaped)
        got, got_grads, saved = run(quantize.QModule(copy.deepcopy(model), config(2)), shaped)
        assert torch.equal(got, y) and torch.equal(got_grads[0], grads[0])
        assert torch.uint8 not in {t.dtype for t in saved}
    ours = quantize.QModule(Attend(), config(2))
    assert torch.equal(ours(x), Attend()(x))  # nobody asks for a gradient
    with torch.no_grad():
        assert torch.equal(ours(x.requires_grad_()), Attend()(x))
    for bad in (Attend(mask=torch.ones(7, 7)), Attend(groups=2)):
        with pytest.raises(RuntimeError) as plain:
            bad(x)
        with pytest.raises(RuntimeError) as got:
            quantize.QModule(bad, config(2))(x)
        assert str(got.value) == str(plain.value)


def test_second_derivatives_are_refused():
    x = torch.randn(3, 30, 192, requires_grad=True)
    with pytest.raises(RuntimeError, match="attention: the backward of a layer with compressed activations is not differentiable"):
        torch.autograd.grad(quantize.QModule(Attend(), config(2))(x).square().sum(), x, create_graph=True)


def test_bad_arguments():
    q = torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match="attention: packed must be codes, ranges and seed .* got 1 tensors and 3 numbers"):
        torch.ops.quantize.attention(q, q, q, None, 0.0, False, None, False, [q], [8, 8, 2], 16)
