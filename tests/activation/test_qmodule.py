"""QModule converts in place and leaves the model what it was: a test per clause of the promise."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from copies import through_pickle, through_torch_save
from saved import saved_dtypes
from torch import nn

import quantize
from quantize import ActivationConfig, QModule

FIXED = ActivationConfig(bits=2, max_bits=2)
OFF = ActivationConfig(enabled=False)


class Net(nn.Module):
    """Every kind of layer that QModule replaces, one it does not, a nested module, a buffer and a bare parameter."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1, groups=2))
        self.norm = nn.GroupNorm(2, 8)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(32, 5)
        self.scale = nn.Parameter(torch.ones(5))
        self.register_buffer("shift", torch.zeros(5))

    def forward(self, x):
        x = self.norm(self.body(self.conv1(x)))
        return self.fc(self.drop(self.pool(x).flatten(1))) * self.scale + self.shift


def images(n=4):
    return torch.randn(n, 3, 16, 16)


def gradients(model, x, seed=0):
    torch.manual_seed(seed)
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_close(a, b):
    for got, want in zip([a[0], *a[1]], [b[0], *b[1]], strict=True):
        torch.testing.assert_close(got, want)


# ---------------------------------------------------------------------------------------------------------------- identity


def test_in_place_and_the_same_objects():
    model = Net()
    parameters, buffers, modules = list(model.parameters()), list(model.buffers()), list(model.modules())
    names = [n for n, _ in model.named_modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert QModule(model, FIXED) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert [n for n, _ in model.named_modules()] == names
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert isinstance(model, Net)
    assert isinstance(model, QModule)
    assert isinstance(model.body[3], nn.Conv2d)
    assert model.config is FIXED
    assert model.conv1.config is FIXED


def test_forward_is_bit_equal_and_so_is_evaluation():
    plain = Net()
    ours = QModule(copy.deepcopy(plain), FIXED)
    x = images()
    torch.manual_seed(1)
    for a, b in zip(plain.body.parameters(), ours.body.parameters(), strict=True):
        assert torch.equal(a, b)
    plain.drop.p = ours.drop.p = 0.0
    assert torch.equal(plain(x), ours(x))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), ours.buffers(), strict=True))
    before = torch.get_rng_state()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(plain.eval()(x), ours.eval()(x))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        assert saved_dtypes(ours, x) == set()


@pytest.mark.parametrize("config", [OFF, {}, {"*": None}, {"*": OFF}, {"*": FIXED, "?*": None, "": None}], ids=str)
def test_off_is_off(config):
    plain = Net()
    ours = QModule(copy.deepcopy(plain), config)
    x = images()
    a, b = gradients(ours, x), gradients(plain, x)
    assert all(torch.equal(got, want) for got, want in zip([a[0], *a[1]], [b[0], *b[1]], strict=True))
    assert torch.uint8 not in saved_dtypes(ours, x)
    assert ours.layer_bits() == {}


def test_eight_bits_are_close_and_two_bits_are_near():
    plain, x = Net(), images(32)
    plain.drop.p = 0.0  # its numbers come after the noise's seeds
    exact = torch.cat([g.flatten() for g in gradients(plain, x)[1]])
    for bits, least in ((8, 0.9999), (4, 0.99), (2, 0.9)):
        ours = QModule(copy.deepcopy(plain), ActivationConfig(bits=bits, max_bits=bits))
        got = torch.cat([g.flatten() for g in gradients(ours, x)[1]])
        assert F.cosine_similarity(got, exact, dim=0) > least


def test_optimizer_made_before():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    QModule(model, FIXED)
    before = model.conv1.weight.detach().clone()
    model(images()).sum().backward()
    optimizer.step()
    assert not torch.equal(model.conv1.weight, before)


def test_shared_modules_and_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.again = nn.Linear(6, 6)
            self.b = nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.again(self.a(x)))

    plain = Tied()
    with torch.no_grad():  # inputs are the levels of two bits, which the layers only move: decoded exactly, and sums are of integers
        plain.a.weight.copy_(torch.eye(6).roll(1, 0))
        plain.a.bias.zero_(), plain.b.bias.zero_()
    x = torch.randint(4, (64, 6)).float()
    x[:, 0], x[:, 1] = 0, 3
    ours = QModule(copy.deepcopy(plain), FIXED)
    assert ours.a is ours.again
    assert ours.b.weight is ours.a.weight
    assert len(list(ours.parameters())) == 3
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert torch.uint8 in saved_dtypes(ours, x)
    for got, want in zip(gradients(ours, x)[1], gradients(plain, x)[1], strict=True):
        assert want.any() and torch.equal(got, want)


def test_hooks_are_kept_and_called():
    model, calls = Net(), []
    model.conv1.register_forward_pre_hook(lambda m, a: calls.append("pre"))
    model.conv1.register_forward_hook(lambda m, a, o: calls.append("forward"))
    model.conv1.register_full_backward_hook(lambda m, i, o: calls.append("backward"))
    model.body[1].register_forward_hook(lambda m, a, o: o * 0)
    model.register_forward_hook(lambda m, a, o: calls.append("model"))
    model.fc.weight.register_hook(lambda g: calls.append("gradient"))
    model.register_state_dict_post_hook(lambda m, state, prefix, local: calls.append("state"))
    QModule(model, FIXED)
    model(images().requires_grad_()).sum().backward()
    model.state_dict()
    assert calls == ["pre", "forward", "model", "gradient", "backward", "state"]
    assert model.conv1.weight.grad.abs().sum() == 0


def test_dtypes_modes_and_requires_grad():
    model = Net().to(torch.bfloat16)
    model.conv1.requires_grad_(False)
    model.body.eval()
    model.fc.double()
    QModule(model, FIXED)
    assert [p.dtype for p in model.conv1.parameters()] == [torch.bfloat16] * 2
    assert model.fc.weight.dtype == torch.float64
    assert not model.conv1.weight.requires_grad
    assert model.training
    assert not model.body.training
    assert not model.body[0].training
    assert model.eval().training is False
    assert not model.drop.training
    model.float().half().to("cpu")
    assert model.conv1.weight.dtype == torch.float16
    model.to("meta")
    assert model.conv1.weight.is_meta


# ---------------------------------------------------------------------------------------------------------------- checkpoints, copies


def test_state_dicts_go_both_ways():
    plain, ours = Net(), QModule(Net(), FIXED)
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours.conv1.weight, plain.conv1.weight)
    other = Net()
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.fc.weight, plain.fc.weight)
    with pytest.raises(RuntimeError, match="fc.weight"):
        ours.load_state_dict({k: v for k, v in plain.state_dict().items() if k != "fc.weight"})
    assert ours.load_state_dict(plain.state_dict(), assign=True).missing_keys == []


@pytest.mark.parametrize("config", [FIXED, ActivationConfig(bits=2), {"*": FIXED, "fc": None}], ids=["fixed", "adaptive", "mapping"])
@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, through_pickle, through_torch_save])
def test_copies(way, config):
    model, x = QModule(Net(), config), images()
    for _ in range(3):
        gradients(model, x)  # also in the middle of a step: records of the last one are there
    twin = way(model)
    assert type(twin) is type(model)
    assert twin.config == model.config
    assert list(twin.state_dict()) == list(model.state_dict())
    assert twin.layer_bits().keys() == model.layer_bits().keys()
    # A shallow copy's layers are the model's, which learn from its steps: compared with what they were.
    reference = copy.deepcopy(model) if way is copy.copy else model
    assert_close(gradients(twin, x, 4), gradients(reference, x, 4))
    if way is not copy.copy:
        assert twin.conv1.weight is not model.conv1.weight
        assert twin.conv1._state is not model.conv1._state
        twin.fc.weight.data.zero_()
        assert model.fc.weight.abs().sum() > 0
    assert torch.uint8 in saved_dtypes(twin, x)


def test_a_deepcopy_learns_on_its_own():
    model = QModule(Net(), ActivationConfig(bits=2))
    twin = copy.deepcopy(model)
    for _ in range(6):
        gradients(twin, images())
    assert set(model.layer_bits().values()) == {2.0}
    assert set(twin.layer_bits().values()) != {2.0}


def test_layers_by_hand_copy_too():
    layer = quantize.QConv2d(3, 4, 3, config=FIXED)
    for way in (copy.deepcopy, through_pickle, through_torch_save):
        twin = way(layer)
        assert type(twin) is quantize.QConv2d
        assert twin.config == FIXED
        assert torch.equal(twin.weight, layer.weight)
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_a_model_that_is_let_go_is_freed():
    model = QModule(Net(), ActivationConfig(bits=2))
    gradients(model, images())
    reference = weakref.ref(model.conv1.weight)
    del model
    gc.collect()
    assert reference() is None


# ---------------------------------------------------------------------------------------------------------------- kinds of models


def test_a_disabled_layer_by_hand_stays_so():
    model = nn.Sequential(quantize.QLinear(8, 8, config=OFF), nn.Linear(8, 8))
    gradients(QModule(model, FIXED), torch.randn(4, 8))
    assert model.layer_bits() == {"1": 2.0}


def test_lazy_layers():
    model = QModule(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)), FIXED)
    for _ in range(2):
        model(torch.randn(2, 3, 6, 6)).sum().backward()
    assert isinstance(model[0], nn.Conv2d)
    assert saved_dtypes(model, torch.randn(2, 3, 6, 6)) >= {torch.uint8}
    assert set(model.layer_bits()) == {"0", "1", "4"}


def test_models_in_models():
    inner = QModule(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), ActivationConfig(bits=4, max_bits=4))
    outer = nn.Sequential(inner, nn.Linear(8, 3))
    outer(torch.randn(4, 8)).sum().backward()
    assert inner.layer_bits() == {"0": 4.0}
    QModule(outer, FIXED)
    outer(torch.randn(4, 8)).sum().backward()
    assert outer.layer_bits() == {"0.0": 2.0, "1": 2.0}
    assert list(outer.state_dict()) == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]


def test_two_models_with_two_configs():
    plain = Net()
    a, b = QModule(copy.deepcopy(plain), FIXED), QModule(copy.deepcopy(plain), ActivationConfig(bits=8, max_bits=8))
    x = images()
    (a(x) + b(x)).sum().backward()
    assert set(a.layer_bits().values()) == {2.0}
    assert set(b.layer_bits().values()) == {8.0}
    assert torch.uint8 not in saved_dtypes(plain, x)


def test_converting_twice_takes_the_second_config():
    model = QModule(Net(), ActivationConfig(bits=2))
    gradients(model, images())
    again = QModule(model, ActivationConfig(bits=4, max_bits=4))
    assert again is model
    assert type(model).__mro__.count(QModule) == 1
    gradients(model, images())
    assert set(model.layer_bits().values()) == {4.0}
    QModule(model, OFF)
    assert torch.uint8 not in saved_dtypes(model, images())


def test_layers_with_a_config_of_their_own_keep_it():
    own = ActivationConfig(bits=8, max_bits=8)
    model = nn.Sequential(nn.Linear(8, 8), quantize.QLinear(8, 8, config=own), quantize.QLinear(8, 8))
    QModule(model, FIXED)
    gradients(model, torch.randn(4, 8))
    assert model.layer_bits() == {"0": 2.0, "1": 8.0, "2": 2.0}


def test_mapping_of_patterns():
    four = ActivationConfig(bits=4, max_bits=4)
    model = QModule(Net(), {"*": FIXED, "body.*": four, "conv1": None, "fc": OFF})
    gradients(model, images())
    assert model.layer_bits() == {"body.0": 4.0, "body.3": 4.0, "norm": 2.0, "mul#1": 2.0}  # the last: `* self.scale`
    assert type(model.conv1) is nn.Conv2d
    assert isinstance(model.config, dict)


@pytest.mark.parametrize("bad", [torch.ones(3), "model", None, nn.Linear, lambda x: x])
def test_only_modules(bad):
    with pytest.raises(TypeError, match="QModule: model must be an nn.Module"):
        QModule(bad, FIXED)


def test_script_modules_are_refused():
    with pytest.warns(DeprecationWarning) if torch.__version__ >= "2.10" else pytest.MonkeyPatch.context():
        scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(TypeError, match="QModule: model must not be a ScriptModule"):
        QModule(scripted, FIXED)


def test_config_is_optional():
    assert QModule(nn.Linear(3, 3)).config == ActivationConfig()
