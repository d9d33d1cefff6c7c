"""convert(): what becomes of every kind of model, and what it refuses."""

import copy
import math
import sys
import threading

import numpy as np
import pytest
import torch
from packed_models import Attention, PaddedConv, Residual, Tied, packed_of, warm
from torch import nn
from torch.nn.utils import parametrize

from quantize import ActivationConfig, DiffQ, DoReFa, QConv2d, QModule, QReLU, load, save, size_penalty
from quantize.packed.contents import packed_weights
from quantize.packed.convert import convert
from quantize.packed.modules import InputQuantizer, PackedConv2d, PackedLinear
from quantize.weight.config import PowerOfTwo, Uniform
from quantize.weight.prepare import prepare

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_prepared_model_trains_on():
    model = prepare(Residual().train(), Uniform(4, activation_bits=8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(X).square().mean().backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    packed = convert(model)
    assert model.training and not any(m.training for m in packed.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and len(before) == len(model.state_dict())
    first = packed(X)
    optimizer.step()
    model(X).square().mean().backward()
    assert torch.equal(packed(X), first)  # nothing is shared
    assert not torch.equal(convert(model)(X), first)
    assert parametrize.is_parametrized(model.conv1) and model.conv1.weight.requires_grad


@pytest.mark.parametrize("config", [Uniform(4), PowerOfTwo(4), {"*": Uniform(8), "conv1": None}, {"conv2": PowerOfTwo(3)}], ids=str)
def test_outputs_are_the_prepared_models(config):
    prepared, packed = packed_of(Residual(), config)
    torch.testing.assert_close(packed(X), prepared(X), rtol=1e-5, atol=1e-5)


def test_layers_left_alone_stay():
    model = warm(Residual())
    prepared = prepare(model, {"*": Uniform(4), "conv1": None})
    packed = convert(prepared)
    assert type(packed.conv1) is nn.Conv2d and type(packed.bn1) is nn.BatchNorm2d and torch.equal(packed.conv1.weight, model.conv1.weight)
    assert [type(packed.conv2), type(packed.fc)] == [PackedConv2d, PackedLinear]


def test_root_layer():
    prepared = prepare(nn.Linear(9, 4), Uniform(4))
    packed = convert(prepared)
    assert type(packed) is PackedLinear
    torch.testing.assert_close(packed(torch.ones(2, 9)), prepared(torch.ones(2, 9)))


@pytest.mark.parametrize("first", ["prepare", "QModule"])
def test_with_compressed_activations(first):
    config, activations = Uniform(4, activation_bits=8), ActivationConfig(bits=2, max_bits=2)
    model = Residual()
    if first == "prepare":
        model = QModule(prepare(model, config), activations)
    else:
        model = prepare(QModule(model, activations), config)
    model(X).sum().backward()
    packed = convert(model)
    assert type(packed) is Residual and type(packed.fc) is PackedLinear and type(packed.bn2) is nn.BatchNorm2d
    assert not any(m._forward_hooks for m in packed.modules() if m is not packed) and isinstance(model, QModule)
    assert list(packed.conv1._forward_pre_hooks) == [] and not hasattr(packed.conv1, "_state")
    torch.testing.assert_close(packed(X), model.eval()(X), rtol=1e-3, atol=1e-3)
    model.train()(X).sum().backward()


def test_compressed_layers_by_hand():
    model = prepare(nn.Sequential(QConv2d(3, 4, 3), QReLU(), PaddedConv(4, 4, 3)), {"0": Uniform(4)})
    packed = convert(model)
    assert [type(m) for m in packed] == [PackedConv2d, nn.ReLU, PaddedConv]
    assert not {"config", "_state", "_explicit_config"} & (set(vars(packed[0])) | set(vars(packed[1])))
    torch.testing.assert_close(packed(X), model.eval()(X))


def test_attention_is_decoded():
    x = torch.randn(2, 5, 8)
    prepared, packed = packed_of(Attention(), Uniform(4))
    assert type(packed.attn) is nn.MultiheadAttention and type(packed.mlp) is PackedLinear
    assert packed_weights(packed.attn)["in_proj_weight"].bits == 4 and "weight" in packed_weights(packed.attn.out_proj)
    with torch.no_grad():
        assert torch.equal(packed.attn.in_proj_weight, prepared.attn.in_proj_weight)
        assert torch.equal(packed.attn.out_proj.weight, prepared.attn.out_proj.weight)
        torch.testing.assert_close(packed(x), prepared(x))


@pytest.mark.parametrize("activation_bits", [None, 4])
def test_encoder_layers_keep_their_input_grids(activation_bits):
    """nn.TransformerEncoderLayer's fused path reads weights past the layers' forward: it must not be taken."""
    x = torch.randn(2, 5, 8)
    config = Uniform(8, activation_bits=activation_bits)
    prepared, packed = packed_of(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), config, x)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), prepared(x))
        torch.testing.assert_close(copy.deepcopy(packed)(x), prepared(x))


def test_forwards_of_their_own_are_decoded():
    prepared, packed = packed_of(nn.Sequential(PaddedConv(3, 4, 2), nn.ReLU()), Uniform(4, activation_bits=6), X)
    assert type(packed[0]) is PaddedConv and isinstance(packed[0].activation_quantizer, InputQuantizer)
    assert not packed[0].weight.requires_grad
    with torch.no_grad():
        assert torch.equal(packed(X), prepared(X))
        assert torch.equal(copy.deepcopy(packed)(X), prepared(X))
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model[0].forward = lambda x: nn.functional.conv2d(x, model[0].weight)
    assert type(convert(prepare(model, Uniform(4)))[0]) is nn.Conv2d


def test_ties():
    prepared, packed = packed_of(Tied(), Uniform(4))
    assert packed.inner.codes is packed.head.codes and packed.inner.scales is packed.head.scales
    assert torch.equal(packed.embedding.weight, prepared.embedding.weight)
    ids = torch.arange(6)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids), prepared(ids))
    different = convert(prepare(Tied(), {"inner": Uniform(4), "head": Uniform(8)}))
    assert (different.inner.bits, different.head.bits) == (4, 8) and different.inner.codes is not different.head.codes


def test_one_module_under_two_names():
    layer = nn.Linear(6, 6)
    packed = convert(prepare(nn.Sequential(layer, nn.ReLU(), layer), Uniform(4)))
    assert packed[0] is packed[2] and type(packed[0]) is PackedLinear


def test_parametrizations_of_ones_own():
    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", Twice())  # before: what is quantized is its result
    parametrize.register_parametrization(model[1], "bias", Twice())  # beside
    prepared = prepare(model, Uniform(8))
    packed = convert(prepared)
    x = torch.randn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), prepared(x))
        torch.testing.assert_close(prepared(x), prepared(x))
    assert type(packed[0]) is PackedLinear and parametrize.is_parametrized(packed[1], "bias")
    parametrize.register_parametrization(prepared[0], "weight", Twice())
    with pytest.raises(ValueError, match="the quantizer must be the last parametrization of '0.weight'"):
        convert(prepared)


def test_hooks_and_attributes_go_along():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    seen = []
    model[0].register_forward_hook(lambda m, a, out: seen.append(out.shape))
    model[0].note = "mine"
    packed = convert(prepare(model, Uniform(4)))
    packed(X)
    assert len(seen) == 1 and packed[0].note == "mine"


def test_refusals():
    with pytest.raises(TypeError, match="convert: model must be an nn.Module; got int"):
        convert(3)
    with pytest.raises(TypeError, match="pass model.module"):
        convert(nn.DataParallel(prepare(nn.Linear(3, 3), Uniform(4))))
    with pytest.raises(TypeError, match="pass model._orig_mod"):
        convert(torch.compile(prepare(nn.Linear(3, 3), Uniform(4))))
    with pytest.raises(TypeError, match="ScriptModule"):
        convert(torch.jit.script(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="model must be prepared by quantize.prepare; no weight is"):
        convert(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="it is converted already"):
        convert(convert(prepare(nn.Linear(3, 3), Uniform(4))))
    with pytest.raises(
        ValueError, match=r"quantizer of layer 'conv1' \(and those of 'conv2'.*\) must have seen data; run a batch or quantize.calibrate"
    ):
        convert(prepare(Residual(), Uniform(4, activation_bits=4)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(bad):
    model = prepare(Residual(), Uniform(4))
    with torch.no_grad():
        model.conv2.parametrizations.weight.original[1, 2, 0, 0] = bad
    with pytest.raises(ValueError, match="convert: 'conv2.weight' must be finite; got 1 values"):
        convert(model)


def test_all_zero_channels():
    model = nn.Linear(6, 4)
    with torch.no_grad():
        model.weight[1] = 0
    packed = convert(prepare(model, PowerOfTwo(4)))
    assert packed.weight[1].eq(0).all() and packed.scales.isfinite().all()


def test_threads_beside_it():
    # Tracing replaces nn.Module's methods for all threads meanwhile.
    plain, stop, failures = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), threading.Event(), []
    model = prepare(nn.Sequential(*[nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(8)]), Uniform(4, 8))
    model.train()(torch.randn(2, 4, 4, 4))
    found, calls = [], (nn.Module.__call__, nn.Module.__getattr__)
    expected = sum(isinstance(m, nn.Identity) for m in convert(model).modules())

    def serve():
        while not stop.is_set():
            try:
                plain(torch.randn(2, 4))
            except Exception as error:
                failures.append(error)

    def pack():
        found.append(sum(isinstance(m, nn.Identity) for m in convert(model).modules()))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        server = threading.Thread(target=serve)
        packers = [threading.Thread(target=pack) for _ in range(6)]
        for thread in (server, *packers):
            thread.start()
        for thread in packers:
            thread.join()
        stop.set()
        server.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert found == [expected] * 6
    assert calls == (nn.Module.__call__, nn.Module.__getattr__)


class Keeps(nn.Module):
    """Keeps an activation."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        self.features = torch.relu(self.first(x))
        self.all = [self.features]
        return self.last(self.features)


def test_activations_that_the_model_keeps():
    model = prepare(Keeps(), DiffQ(group_size=4))
    x = torch.randn(2, 4)
    (model(x).sum() + size_penalty(model)).backward()
    packed = convert(model)
    assert torch.equal(packed.features, model.features.detach())
    assert not packed.features.requires_grad
    assert model.features.grad_fn is not None


def test_attributes_that_cannot_be_copied():
    model = prepare(nn.Sequential(nn.Linear(4, 2)), Uniform(4))
    model[0].lock = threading.Lock()
    with pytest.raises(TypeError, match=r"convert: model must be one that copy.deepcopy copies; its attribute '0.lock', a lock, is not"):
        convert(model)


@pytest.mark.parametrize("name", ["step", "scales", "codes", "threshold"])
@pytest.mark.parametrize("buffer", [True, False])
def test_names_that_packed_layers_have(name, buffer):
    model = prepare(nn.Sequential(nn.Linear(4, 2)), Uniform(4))
    model[0].register_buffer(name, torch.ones(2)) if buffer else setattr(model[0], name, 3)
    with pytest.raises(ValueError, match=f"layer '0' must not have '{name}' as an attribute of its own"):
        convert(model)


def test_on_another_default_device():
    model = prepare(nn.Sequential(nn.Linear(4, 2)), Uniform(4))
    with torch.device("meta"):
        packed = convert(model)
    x = torch.randn(3, 4)
    assert torch.equal(packed(x), convert(model)(x))


def test_another_default_dtype():
    model = convert(prepare(nn.Sequential(nn.Linear(64, 8)), DoReFa(1, 1)))
    x = torch.rand(3, 64)
    expected = copy.deepcopy(model)(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(model(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "config", [Uniform(np.int64(4)), PowerOfTwo(np.int32(3)), DiffQ(np.int64(4), min_bits=np.float32(2)), DoReFa(np.int8(2), np.int8(2))]
)
def test_numpy_numbers(config, tmp_path):
    model = convert(prepare(nn.Sequential(nn.Linear(8, 4)), config))
    save(model, tmp_path / "model.safetensors")
    x = torch.rand(2, 8)
    assert torch.equal(load(nn.Sequential(nn.Linear(8, 4)), tmp_path / "model.safetensors")(x), model(x))
