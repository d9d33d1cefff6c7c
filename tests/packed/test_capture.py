"""Captured models: the same numbers without Python."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from capture_models import Forward, packed
from torch import fx, nn
from torch.profiler import ProfilerActivity, profile

import quantize
from quantize.packed.capture import MOST


class Around(nn.Module):
    """What a captured model is part of."""

    def __init__(self, fast):
        super().__init__()
        self.model, self.fast = fast.model, fast

    def forward(self, x):
        return self.fast(x)


def calls(run):
    """The names of the ops that `run` calls, sorted."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return sorted(event.name for event in seen.events() if event.name.startswith("quantize::"))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "config",
    [
        quantize.XNOR(),
        quantize.Uniform(4, activation_bits=8),
        quantize.PowerOfTwo(4, activation_bits=8),
        quantize.DoReFa(2, 2),
        quantize.Uniform(8),
        quantize.DiffQ(),
    ],
    ids=lambda config: f"{type(config).__name__}-{config.activation_bits}",
)
def test_gives_the_models_own_numbers(config, memory_format):
    model = packed(config)
    fast = quantize.capture(model)
    with torch.no_grad():
        for n in (2, 1, 2, 2):
            x = torch.randn(n, 3, 32, 32).to(memory_format=memory_format)
            before, expected = x.clone(), model(x)
            for _ in range(2):
                assert torch.equal(fast(x), expected)
            assert torch.equal(x, before)
        assert len(fast._captures[1]) == 2
        used = calls(lambda: model(x))  # computed together, as without a capture
        assert calls(lambda: fast(x)) == used and (used or isinstance(config, quantize.DiffQ))


def test_no_python_runs():
    seen = []
    model = Forward(lambda self, x: (seen.append(1), F.relu(x))[1])
    fast = quantize.capture(model)
    for _ in range(5):
        x = torch.randn(4)
        assert torch.equal(fast(x), x.relu())
    assert len(seen) == 3  # the call's own, the recorded one, and one on other values


FORWARDS = {
    "lists": lambda self, x: torch.cat([x, x + 1, self.weight, *x.split(1)]),
    "index": lambda self, x: x[:, torch.tensor([1, 0]), None],
    "in place": lambda self, x: (x + 1).relu_().mul_(2),
    "constant in place": lambda self, x: torch.tensor([1.0, 2.0, 3.0]).mul_(2) + x,
    "several": lambda self, x: x.topk(2, dim=1).values + x.max(1, keepdim=True).values,
    "views": lambda self, x: (x.clone().t()[0].add_(1), x.t().reshape(-1))[1],
    "view changed": lambda self, x: (y := x.clone(), y[0].zero_(), y)[2],
    "input": lambda self, x: x,
    "parameter": lambda self, x: self.weight,
    "filled": lambda self, x: torch.full_like(x, 3) + torch.zeros(3) + torch.arange(3),
    "einsum": lambda self, x: torch.einsum("ij,kj->ik", x, self.weight),
    "attention": lambda self, x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "interpolate": lambda self, x: F.interpolate(x[None, None], scale_factor=2, mode="bilinear"),
    "out": lambda self, x: torch.add(x, 1, out=torch.empty(2, 3)),
    "optional": lambda self, x: F.layer_norm(x, (3,)) + F.linear(x, self.weight[:, :1].expand(3, 3)),
    "shape": lambda self, x: x * x.shape[0] + len(x),
}


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
@pytest.mark.parametrize("grad", [False, True])
def test_forwards(forward, grad):
    fast = quantize.capture(model := Forward(forward, weight=nn.Parameter(torch.randn(3, 3))))
    for _ in range(3):
        x = torch.randn(2, 3, requires_grad=grad)
        out = fast(x)
        with torch.no_grad():
            assert torch.equal(out, model(x.detach().clone()))
        assert not out.requires_grad or out is x or out is model.weight


def test_an_input_changed_in_place():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)).eval()
    fast = quantize.capture(model)
    for _ in range(3):
        x = torch.randn(4, 3)
        expected, after = model(x.clone()), x.relu()
        assert torch.equal(fast(x), expected) and torch.equal(x, after)


def test_containers():
    def forward(self, images, *, scale=1.0, more=None, flag=True):
        out = {"sum": images["a"] * scale + images["b"], "rest": (images["a"].relu(), 3, None, "name")}
        return out if more is None else (out["sum"] + more, flag)

    fast = quantize.capture(model := Forward(forward))

    def check(*args, **kwargs):
        for _ in range(2):
            ours, theirs = fast(*args, **kwargs), model(*args, **kwargs)
            leaves, form = torch.utils._pytree.tree_flatten(ours)
            others, other_form = torch.utils._pytree.tree_flatten(theirs)
            assert form == other_form
            assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(leaves, others, strict=True))

    images = {"a": torch.randn(3), "b": torch.randn(3)}
    check(images)
    check(images, scale=2.0)
    check(images, scale=2)
    check(images, more=torch.ones(3), flag=1)
    check(images, more=torch.ones(3), flag=True)
    check({"a": torch.randn(2, 3), "b": torch.randn(3)})
    count = sum(map(len, fast._captures.values()))
    assert count == 6
    check(images, scale=2.0)
    assert sum(map(len, fast._captures.values())) == count
    listed = Forward(lambda self, x, sizes: x * sizes[0])
    assert torch.equal(quantize.capture(listed)(torch.ones(2), [4]), torch.full((2,), 4.0))
    unhashed = Forward(lambda self, x, by: x * len(by))
    assert torch.equal(quantize.capture(unhashed)(torch.ones(2), bytearray(b"abc")), torch.full((2,), 3.0))


def test_modes():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval().requires_grad_(False)
    fast, x = quantize.capture(model), torch.randn(4, 8)
    fast(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype == torch.bfloat16 and torch.equal(fast(x), model(x))
    assert fast(x).dtype == torch.float32 and torch.equal(fast(x), model(x))
    with torch.inference_mode():
        assert torch.equal(fast(x), model(x)) and fast(torch.randn(4, 8)).is_inference()
    leaf = x.clone().requires_grad_()
    assert not fast(leaf).requires_grad and not fast(leaf).requires_grad
    assert torch.equal(torch.jit.trace(lambda x: fast(x), x, check_trace=False)(x + 1), model(x + 1))
    assert torch.equal(fx.symbolic_trace(Around(fast))(x), model(x))
    assert torch.allclose(torch.vmap(fast)(x), model(x), atol=1e-6)
    assert torch.allclose(torch.func.jvp(fast, (x,), (x,))[0], model(x), atol=1e-6)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fast(mode.from_tensor(x)).shape == (4, 2)
    assert torch.equal(fast(x), model(x))


def test_compiled_around():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    fast, x = quantize.capture(model), torch.randn(4, 8)
    compiled = torch.compile(lambda x: fast(x) + 1, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(compiled(x), model(x) + 1, atol=1e-6)
    assert not compiled(x).requires_grad


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(8, 6).t(),
        lambda: torch.randn(1, 8).expand(6, 8),
        lambda: torch.randn(12, 16)[::2, ::2],
        lambda: torch.randn(0, 8),
        lambda: torch.randn(50)[2:].view(6, 8),
        lambda: torch.randn(6, 8).to_sparse(),
        lambda: nn.Parameter(torch.randn(6, 8)),
        lambda: torch.zeros(6, 8),
        lambda: torch.full((6, 8), torch.nan),
        lambda: torch.full((6, 8), torch.inf),
        lambda: torch.randn(8),
        lambda: torch.randn(1, 8),
    ],
    ids=["turned", "expanded", "strided", "empty", "offset", "sparse", "parameter", "zeros", "nan", "infinite", "unbatched", "one"],
)
def test_inputs_of_any_kind(make):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    fast = quantize.capture(model)
    with torch.no_grad():
        for _ in range(3):
            x = make()
            assert torch.allclose(fast(x), model(x), rtol=0, atol=0, equal_nan=True)


def test_single_numbers_and_none_at_all():
    fast = quantize.capture(Forward(lambda self, x: x.sin() * 2))
    for _ in range(3):
        x = torch.randn(())
        assert torch.equal(fast(x), x.sin() * 2)
    nothing = quantize.capture(Forward(lambda self: self.weight * 2, weight=nn.Parameter(torch.ones(3))))
    for _ in range(3):
        assert torch.equal(nothing(), torch.full((3,), 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_frozen_weights_and_layers_that_are_called_twice(dtype):
    layer = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    model = Forward(lambda self, x: self.layer(self.layer(x).relu()), layer=layer).to(dtype)
    fast = quantize.capture(model)
    for form in (torch.contiguous_format, torch.channels_last, torch.channels_last):
        x = torch.randn(2, 4, 6, 6, dtype=dtype).to(memory_format=form)
        assert torch.equal(fast(x), model(x)) and fast(x).stride() == model(x).stride()


def test_on_meta():
    model = nn.Linear(4, 2).to("meta").eval()
    fast = quantize.capture(model)
    for _ in range(2):
        assert fast(torch.ones(3, 4, device="meta")).shape == (3, 2)


def test_integers():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).eval()
    fast = quantize.capture(model)
    for _ in range(3):
        ids = torch.randint(5, (4, 2))
        assert torch.equal(fast(ids), model(ids))


def test_noise_is_drawn_anew():
    fast = quantize.capture(model := Forward(lambda self, x: F.dropout(x, 0.5, training=True)))
    x = torch.ones(1000)
    fast(x)
    torch.manual_seed(3)
    first, second = fast(x), fast(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(model(x), first)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    quantize.capture(nn.ReLU().eval())(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_more_than_so_many():
    model = nn.Linear(4, 2).eval()
    fast = quantize.capture(model)
    for n in range(1, MOST + 5):
        fast(torch.randn(n, 4))
        fast(input=torch.randn(n, 4))
    assert sum(map(len, fast._captures.values())) == MOST
    for n in (1, MOST + 4):
        x = torch.randn(n, 4)
        assert torch.equal(fast(x), model(x))


def test_copies_capture_for_themselves():
    fast = quantize.capture(nn.Linear(4, 2).eval())
    x = torch.randn(3, 4)
    fast(x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert other.model is not fast.model and torch.equal(other(x), fast(x)) and torch.equal(other(x), fast(x))
    assert repr(fast) == "Captured(Linear(in_features=4, out_features=2, bias=True))"


def test_a_model_may_hold_its_capture():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(3, 4)
    model.fast = quantize.capture(model)
    for _ in range(2):
        assert torch.equal(model.fast(x), model(x))
    other = copy.deepcopy(model)
    assert other.fast.model is other and torch.equal(other.fast(x), model(x))
    gone = weakref.ref(model)
    del model, other
    gc.collect()
    assert gone() is None


def test_threads_share_it():
    model = packed(quantize.XNOR())
    fast, failed = quantize.capture(model), []

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        for i in range(10):
            x = torch.randn(1 + (i + seed) % 3, 3, 32, 32, generator=generator)
            with torch.no_grad():
                if not torch.equal(fast(x), model(x)):
                    failed.append((seed, i))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_recurrent_and_attention():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lstm = nn.Embedding(9, 8), nn.LSTM(8, 8, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, ids):
            return self.encoder(self.lstm(self.embed(ids))[0]).mean(1)

    model = Text().eval()
    fast = quantize.capture(model)
    with torch.no_grad():
        for _ in range(3):
            ids = torch.randint(9, (2, 5))
            assert torch.allclose(fast(ids), model(ids), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [quantize.XNOR(), quantize.Uniform(4, activation_bits=8)], ids=["XNOR", "Uniform"])
def test_on_a_gpu(config):
    model = packed(config).cuda()
    fast = quantize.capture(model)
    with torch.no_grad():
        for n in (2, 1, 2):
            x = torch.randn(n, 3, 32, 32, device="cuda")
            expected = model(x)
            for _ in range(2):
                assert torch.allclose(fast(x), expected, rtol=1e-5, atol=1e-5)
