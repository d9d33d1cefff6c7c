"""What captured models notice, and what they refuse: changes of the model, hooks, forwards that depend on values."""

import copy

import pytest
import torch
import torch.nn.functional as F
from capture_models import Forward, packed
from torch import nn

import quantize


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


def test_what_a_model_may_return():
    fast = quantize.capture(Forward(lambda self, x: (x, object())))
    with pytest.raises(TypeError, match="capture: model must return tensors, numbers and strings in containers; got object"):
        fast(torch.ones(2))
    with pytest.raises(TypeError, match="capture: model must be an nn.Module; got function"):
        quantize.capture(lambda x: x)


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
