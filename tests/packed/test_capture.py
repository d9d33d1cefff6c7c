"""Captured models: the same numbers without Python, and none at all where they could become others."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.profiler import ProfilerActivity, profile

import quantize
from quantize.packed.capture import MOST


class Forward(nn.Module):
    """A module with any forward."""

    def __init__(self, forward, **own):
        super().__init__()
        self.call = forward
        for name, value in own.items():
            setattr(self, name, value)
        self.eval()

    def forward(self, *args, **kwargs):
        return self.call(self, *args, **kwargs)


class Block(nn.Module):
    """Two convolutions and a residual sum, norms before them for signs and behind them otherwise."""

    def __init__(self, channels, signs):
        super().__init__()
        self.signs = signs
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.relu = nn.Hardtanh() if signs else nn.ReLU()

    def forward(self, x):
        if self.signs:
            x = x + self.conv1(self.norm1(x))
            return x + self.conv2(self.norm2(x))
        return self.relu(self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))) + x)


class Around(nn.Module):
    """What a captured model is part of."""

    def __init__(self, fast):
        super().__init__()
        self.model, self.fast = fast.model, fast

    def forward(self, x):
        return self.fast(x)


def packed(config):
    """A small residual network, its first and last layer in floats."""
    signs = config.activation_bits == 1
    stem = nn.Sequential(nn.Conv2d(3, 32, 7, 2, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    model = nn.Sequential(stem, Block(32, signs), Block(32, signs), head).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    quantize.prepare(model, {"*": config, "0.0": None, "3.2": None})
    if isinstance(config, (quantize.Uniform, quantize.PowerOfTwo)) and config.activation_bits:
        quantize.calibrate(model, [torch.randn(2, 3, 32, 32)])
    return quantize.convert(model)


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


def test_changes_are_noticed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1))).eval()
    fast, x = quantize.capture(model), torch.randn(2, 3, 8, 8)

    def same():
        return all(torch.equal(fast(x), model(x)) for _ in range(2))

    assert same()
    with torch.no_grad():
        model[0].weight.mul_(2)
        assert same()
        model[1].running_mean.add_(1)
        assert same()
        model[1].weight = None
        model[1].bias = None
        assert same()
        model[2][0] = nn.Tanh().eval()
        assert same()
        model[2].append(nn.Sigmoid().eval())
        assert same()
        model.load_state_dict(
            {name: torch.randn_like(value) if value.is_floating_point() else value for name, value in model.state_dict().items()}
        )
        model[1].running_var.abs_()
        assert same()
        model.double()
        x = x.double()
        assert same() and fast(x).dtype == torch.float64
        assert len(fast._captures[1]) == 1  # captures of what was are gone
    model.train()
    with pytest.raises(ValueError, match="capture: model must be in evaluation mode; got one in training mode"):
        fast(x)
    model.eval()
    model[0].train()
    with pytest.raises(ValueError, match="evaluation mode"):
        fast(x)
    model.eval()
    assert same()


def test_packed_codes_that_change():
    model = packed(quantize.XNOR())
    fast, x = quantize.capture(model), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
        before = fast(x)
        model[1].conv1.codes.bitwise_not_()
        assert torch.equal(fast(x), model(x)) and not torch.equal(fast(x), before)


def test_hooks_are_called():
    model, seen = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval(), []
    fast, x = quantize.capture(model), torch.randn(2, 3)
    fast(x)
    handle = model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    for _ in range(2):
        fast(x)
    assert len(seen) == 2
    handle.remove()
    assert torch.equal(fast(x), model(x))
    handle = model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert torch.equal(fast(x), (model[0](x) + 1).relu())
    handle.remove()
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(output))
    try:
        fast(x)
    finally:
        everywhere.remove()
    assert len(seen) == 5
    assert torch.equal(fast(x), model(x)) and len(seen) == 5


READS = {
    "item": lambda self, x: x * x.sum().item(),
    "branch": lambda self, x: x if x.sum() > 0 else -x,
    "nonzero": lambda self, x: x[x.flatten().nonzero()[:2, 0]],
    "masked_select": lambda self, x: x[x > 0].sum(),
    "unique": lambda self, x: torch.unique(x),
    "equal": lambda self, x: x + torch.equal(x, x.abs()),
    "noise": lambda self, x: x * torch.rand(1).item(),
    "repeat": lambda self, x: torch.repeat_interleave(x, (x > 0).long(), dim=0),
}


@pytest.mark.parametrize("forward", READS.values(), ids=READS)
def test_reading_values_is_an_error(forward):
    fast = quantize.capture(Forward(forward))
    for _ in range(2):
        with pytest.raises(
            ValueError, match="capture: model must compute the same for all values of its inputs; its forward reads .*aten::"
        ):
            fast(torch.tensor([1.0, -2.0, 3.0, 0.5]))


PAST_ITS_OPS = {
    "numpy": lambda self, x: x * float(x.numpy().sum()),
    "tolist": lambda self, x: x * x.tolist()[0],
    "from_numpy": lambda self, x: x + torch.from_numpy(x.numpy() * 2),
    "count": lambda self, x: x * next(self.__dict__.setdefault("counts", iter(range(9)))),
}


@pytest.mark.parametrize("forward", PAST_ITS_OPS.values(), ids=PAST_ITS_OPS)
def test_reading_values_past_the_ops_is_found_on_other_values(forward):
    with pytest.raises(
        ValueError, match="capture: model must compute the same .*; on other values output 0 of its ops is not that of its forward"
    ):
        quantize.capture(Forward(forward))(torch.tensor([1.0, -2.0, 3.0, 0.5]))


def test_constants_may_be_read():
    scale = torch.tensor(3.0)
    model = Forward(lambda self, x: x * self.scale.item() + (1 if self.scale > 0 else 0), scale=nn.Buffer(scale))
    fast, x = quantize.capture(model), torch.randn(3)
    fast(x)
    assert torch.equal(fast(x), x * 3 + 1)
    model.scale.fill_(-1)
    assert torch.equal(fast(x), -x)


def test_sizes_that_depend_on_values_later():
    library = torch.library.Library("quantize_test_capture", "DEF")
    library.define("longer(Tensor x) -> Tensor")
    library.impl("longer", lambda x: x.clone() if x.flatten()[0] < 100 else torch.cat([x, x]), "CPU")
    fast = quantize.capture(Forward(lambda self, x: torch.ops.quantize_test_capture.longer(x)))
    x = torch.ones(3)
    assert torch.equal(fast(x), x) and torch.equal(fast(x), x)
    with pytest.raises(
        ValueError, match=r"sizes that depend on its inputs' sizes alone; quantize_test_capture::longer gave \[3\] .* and \[6\] now"
    ):
        fast(x * 1000)
    assert torch.equal(fast(x), x)


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


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias)


def test_our_own_hooks_are_ops():
    x = torch.randn(2, 3, 12, 12)
    model = nn.Sequential(OwnConv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(512, 16))
    model = nn.Sequential(model, nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)).eval()
    prepared = quantize.prepare(model, quantize.Uniform(8, activation_bits=8))
    prepared(x)
    packed, compressed = quantize.convert(prepared), quantize.QModule(copy.deepcopy(prepared))
    assert not any(module.training for module in packed.modules())
    for model in (prepared, packed, compressed):
        fast = quantize.capture(model)
        with torch.no_grad():
            for _ in range(2):
                y = torch.randn(2, 3, 12, 12)
                fast(y)
                assert torch.equal(fast(y), model(y))
        assert fast._captures


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


def test_what_a_model_may_return():
    fast = quantize.capture(Forward(lambda self, x: (x, object())))
    with pytest.raises(TypeError, match="capture: model must return tensors, numbers and strings in containers; got object"):
        fast(torch.ones(2))
    with pytest.raises(TypeError, match="capture: model must be an nn.Module; got function"):
        quantize.capture(lambda x: x)


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
    ],
    ids=["turned", "expanded", "strided", "empty", "offset", "sparse", "parameter", "zeros", "nan"],
)
def test_inputs_of_any_kind(make):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    fast = quantize.capture(model)
    with torch.no_grad():
        for _ in range(3):
            x = make()
            assert torch.equal(fast(x), model(x)) or x.isnan().all()


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


def test_a_failed_call_leaves_it_usable():
    model = nn.Sequential(nn.Linear(4, 2)).eval()
    fast, x = quantize.capture(model), torch.randn(3, 4)
    with pytest.raises(RuntimeError):
        fast(torch.randn(3, 5))
    assert torch.equal(fast(x), model(x)) and torch.equal(fast(x), model(x))
    with pytest.raises(RuntimeError):
        fast(torch.randn(3, 5))
    assert torch.equal(fast(x), model(x))
    assert not quantize._C.in_transform()


def test_scripted_modules_and_nested_tensors():
    scripted = nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.ReLU()).eval()
    fast, x = quantize.capture(scripted), torch.randn(2, 8)
    for _ in range(2):
        assert torch.equal(fast(x), scripted(x))
    assert not fast._captures
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()  # which it makes where positions are masked
    fast, masked = quantize.capture(encoder), torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad():
        with pytest.raises(ValueError, match="capture: model must .* its forward reads values"):  # those of the mask
            fast(torch.randn(2, 3, 8), src_key_padding_mask=masked)
        for _ in range(3):
            x = torch.randn(2, 3, 8)
            assert torch.allclose(fast(x), encoder(x), atol=1e-6)


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
