"""Packed layers against the prepared ones they come from: all shapes, and everything a module can be asked to do."""

import copy

import pytest
import torch
from copies import through_pickle, through_torch_save
from torch import nn

from quantize.packed.convert import convert
from quantize.packed.modules import PACKED, PackedConv2d, PackedLayer, PackedLinear
from quantize.weight.config import XNOR, DiffQ, DoReFa, PowerOfTwo, Uniform
from quantize.weight.prepare import prepare

# channels in, channels out, kernel, keyword arguments
CONVOLUTIONS = [
    (1, 1, 1, {}),
    (1, 16, 3, {}),
    (3, 16, 3, {"padding": 1}),
    (3, 17, 5, {"stride": 2, "padding": 2}),
    (16, 16, 3, {"padding": "same"}),
    (17, 3, 3, {"dilation": 2, "padding": 1}),
    (63, 65, 1, {"bias": False}),
    (65, 63, 3, {"padding": 1, "bias": False}),
    (96, 96, 1, {"groups": 3}),
    (16, 16, 3, {"groups": 16, "padding": 1}),
    (16, 32, 3, {"groups": 16, "stride": 2}),
    (96, 65, 3, {"padding": "valid"}),
    (4, 6, (3, 1), {"groups": 2, "stride": (2, 1), "padding": (0, 1), "dilation": (1, 3)}),
    (3, 5, 3, {"padding": 1, "padding_mode": "reflect"}),
    (3, 5, 3, {"padding": 2, "padding_mode": "circular"}),
    (3, 5, (5, 3), {"padding": (2, 1), "padding_mode": "replicate", "stride": 2}),
]
CONFIGS = [Uniform(8), Uniform(4), Uniform(3), Uniform(2), PowerOfTwo(4), PowerOfTwo(3, plus=False), PowerOfTwo(8)]


def both(layer, config, *batches):
    """(prepared, packed) in eval mode; the activation quantizers start from `batches`."""
    prepared = prepare(nn.Sequential(layer), config)
    for batch in batches:
        prepared(batch)
    prepared.eval()
    return prepared[0], convert(prepared)[0]


def assert_same(prepared, packed, x, **kwargs):
    """The decoded weight is bit-equal; convolutions may sum in another order where the memory format differs."""
    with torch.no_grad():
        assert torch.equal(packed.weight, prepared.weight)
        expected, got = prepared(x, **kwargs), packed(x, **kwargs)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(got, expected, rtol=1e-6 if x.dtype == torch.float32 else 2e-3, atol=1e-6 * scale)


@pytest.mark.parametrize("inputs, outputs, kernel, kwargs", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_conv2d(inputs, outputs, kernel, kwargs, config):
    prepared, packed = both(nn.Conv2d(inputs, outputs, kernel, **kwargs), config)
    assert type(packed) is PackedConv2d and packed.codes.dtype == torch.uint8 and packed.scales.dtype == torch.float32
    assert_same(prepared, packed, torch.randn(2, inputs, 8, 9))
    assert_same(prepared, packed, torch.randn(2, inputs, 8, 9).to(memory_format=torch.channels_last))
    assert_same(prepared, packed, torch.randn(inputs, 7, 7))
    if kwargs.get("padding_mode", "zeros") == "zeros":
        assert_same(prepared, packed, torch.randn(0, inputs, 8, 9))


LAYERS = [
    (lambda: nn.Linear(1, 1), (4, 1)),
    (lambda: nn.Linear(129, 17), (2, 3, 129)),
    (lambda: nn.Linear(64, 10, bias=False), (64,)),
    (lambda: nn.Conv1d(3, 5, 3, 2, 1), (2, 3, 9)),
    (lambda: nn.Conv1d(4, 4, 3, groups=4, padding=2, padding_mode="circular"), (2, 4, 9)),
    (lambda: nn.Conv3d(3, 5, (1, 3, 2), padding=1), (2, 3, 4, 5, 6)),
    (lambda: nn.Conv3d(4, 6, 3, groups=2, bias=False), (4, 5, 5, 5)),
    (lambda: nn.ConvTranspose1d(3, 5, 3, 2, 1, 1), (2, 3, 9)),
    (lambda: nn.ConvTranspose2d(3, 5, 3, 2, 1), (2, 3, 5, 6)),
    (lambda: nn.ConvTranspose2d(6, 4, (2, 3), groups=2, dilation=2, bias=False), (2, 6, 5, 5)),
    (lambda: nn.ConvTranspose2d(16, 16, 3, groups=16, stride=2, output_padding=1), (16, 5, 5)),
    (lambda: nn.ConvTranspose3d(3, 2, 2, 2), (1, 3, 3, 4, 5)),
]


@pytest.mark.parametrize("make, shape", LAYERS, ids=[str(make()) for make, _ in LAYERS])
@pytest.mark.parametrize("config", [Uniform(4), PowerOfTwo(4), Uniform(8, activation_bits=4)], ids=str)
def test_other_layers(make, shape, config):
    prepared, packed = both(make(), config, torch.randn(shape))
    assert type(packed) is PACKED[packed.plain]
    assert_same(prepared, packed, torch.randn(shape))


def test_transposed_output_size():
    prepared, packed = both(nn.ConvTranspose2d(3, 5, 3, 2, 1), Uniform(4))
    assert_same(prepared, packed, torch.randn(2, 3, 5, 5), output_size=[10, 9])
    with pytest.raises(ValueError, match="output_size"):
        packed(torch.randn(2, 3, 5, 5), output_size=[1])


@pytest.mark.parametrize("bits", range(2, 9))
def test_activation_grids_are_the_trained_ones(bits):
    batch = torch.randn(4, 3, 6, 6) + 0.3
    prepared, packed = both(nn.Conv2d(3, 8, 3), Uniform(8, activation_bits=bits), batch)
    quantizer = prepared.activation_quantizer
    assert packed.activation_bits == bits and packed.step == quantizer.step and packed.zero_point == quantizer.zero_point
    x = torch.cat([torch.randn(2, 3, 6, 6) * 3, quantizer.step.detach() * (torch.randint(-300, 300, (2, 3, 6, 6)) + 0.5)])
    with torch.no_grad():
        assert torch.equal(packed._quantized(x), quantizer(x))
    assert_same(prepared, packed, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_half_precision(dtype, activation_bits):
    x = torch.randn(2, 16, 6, 6)
    config = Uniform(4, activation_bits=activation_bits)
    prepared, packed = both(nn.Conv2d(16, 16, 3), config, x)
    halved = copy.deepcopy(packed).to(dtype)
    assert halved.scales.dtype == torch.float32 and torch.equal(halved.scales, packed.scales) and torch.equal(halved.codes, packed.codes)
    assert halved.weight.dtype == dtype and halved.dtype == dtype
    y = halved(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), packed(x), rtol=0.05, atol=0.05)
    back = halved.float()
    assert back.weight.dtype == torch.float32 and torch.equal(back(x), packed(x))
    low = prepare(nn.Sequential(nn.Conv2d(16, 16, 3).to(dtype)), config)
    low(x.to(dtype))
    packed = convert(low.eval())[0]
    assert_same(low[0], packed, x.to(dtype))


def test_double_input():
    _, packed = both(nn.Linear(8, 4), Uniform(4, activation_bits=8), torch.randn(4, 8))
    assert packed.double()(torch.randn(4, 8, dtype=torch.float64)).dtype == torch.float64


def test_what_modules_do():
    x = torch.randn(2, 3, 7, 7)
    _, packed = both(nn.Conv2d(3, 5, 3, padding=1), PowerOfTwo(4, activation_bits=8), x)
    expected = packed(x)
    for twin in (copy.deepcopy(packed), through_pickle(packed), through_torch_save(packed)):
        assert torch.equal(twin(x), expected) and str(twin) == str(packed)
    _, other = both(nn.Conv2d(3, 5, 3, padding=1), PowerOfTwo(4, activation_bits=8), x * 2)
    assert not torch.equal(other(x), expected)
    assert sorted(packed.state_dict()) == ["bias", "codes", "scales", "step", "zero_point"]
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(x), expected)
    assert list(packed.parameters()) == []
    assert torch.equal(packed.train()(x), expected)
    assert torch.equal(packed.to("cpu")(x), expected)
    assert "method=power_of_two, bits=4, activation_bits=8" in repr(packed) and "kernel_size=(3, 3)" in repr(packed)
    assert packed.to("meta").codes.device.type == "meta"


def test_weight_is_read_only():
    _, packed = both(nn.Linear(8, 4), Uniform(4))
    with pytest.raises((AttributeError, KeyError)):
        packed.weight = nn.Parameter(torch.zeros(4, 8))
    with pytest.raises((AttributeError, TypeError)):
        packed.weight = torch.zeros(4, 8)


def test_not_made_by_hand():
    with pytest.raises(TypeError, match="PackedLinear is made of a Linear by quantize.convert or quantize.load"):
        PackedLinear(3, 4)
    assert all(issubclass(cls, PackedLayer) for cls in PACKED.values())


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_gradient_reaches_the_input(activation_bits):
    x = torch.randn(2, 3, 7, 7)
    prepared, packed = both(nn.Conv2d(3, 5, 3), Uniform(4, activation_bits=activation_bits), x)
    grads = []
    for layer in (prepared, packed):
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_compiles_without_breaks():
    x = torch.randn(2, 3, 7, 7)
    _, packed = both(nn.Conv2d(3, 5, 3), Uniform(4, activation_bits=8), x)
    expected = packed(x)  # what this call keeps is not traced
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("config", [Uniform(4), Uniform(4, activation_bits=8), DiffQ(), XNOR()], ids=str)
def test_inputs_are_floats(config, dtype):
    for make, shape in (
        (lambda: nn.Conv2d(4, 8, 3), (2, 4, 6, 6)),
        (lambda: nn.Linear(4, 8), (2, 4)),
        (lambda: nn.Conv1d(4, 8, 3), (4, 9)),
    ):
        _, packed = both(make(), config, torch.randn(shape))
        for _ in range(2):
            with pytest.raises(TypeError, match=f"{type(packed).__name__}.*: input must be a floating-point Tensor; got {str(dtype)[6:]}"):
                packed(torch.ones(shape, dtype=dtype))
            packed(torch.randn(shape))
    _, packed = both(nn.ConvTranspose2d(4, 8, 3), Uniform(4))
    with pytest.raises(TypeError, match="PackedConvTranspose2d.*: input must be a floating-point Tensor; got int64"):
        packed(torch.ones(2, 4, 6, 6, dtype=torch.int64))
    with pytest.raises(TypeError, match="PackedConvTranspose2d.*: input must be a Tensor; got list"):
        packed([1.0])


@pytest.mark.parametrize("config", [Uniform(4), Uniform(4, activation_bits=8), DiffQ(), XNOR()], ids=str)
@pytest.mark.parametrize("make, shape", [(lambda: nn.Linear(64, 16), (3, 64)), (lambda: nn.Conv2d(8, 16, 3), (2, 8, 6, 6))])
def test_buffers_with_gaps(config, make, shape):
    x = torch.randn(shape)
    _, packed = both(make(), config, x)
    gaps = {k: torch.stack([v, 0 * v], -1)[..., 0] for k, v in packed.state_dict().items()}
    twin = copy.deepcopy(packed)
    twin.load_state_dict(gaps, assign=True)
    assert not twin.codes.is_contiguous() and torch.equal(twin(x), packed(x))
    if config.method != "diffq":
        twin.scales = torch.full((1,), 0.5).expand(16)
        packed.scales = torch.full((16,), 0.5)
        assert torch.equal(twin(x), packed(x)) and twin(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [Uniform(8), Uniform(8, activation_bits=8)], ids=str)
def test_transformer_layers_call_them(config, dtype):
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(2, 4, 8)
    prepared = prepare(layer, config)
    prepared(x)
    packed = convert(prepared.eval())
    with torch.no_grad():
        want, got = packed(x), copy.deepcopy(packed).to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    # A dozen roundings to the dtype, and a code or two that falls to the other side: 1 / 255 of a range in one of many elements.
    tolerance = 0 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
    assert float((got.float() - want).norm()) <= tolerance * float(want.norm())


def test_encoders_with_nothing_packed_keep_their_fused_path():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    packed = convert(prepare(nn.Sequential(encoder, nn.Linear(8, 4)).eval(), {"1": Uniform(4)}))
    assert packed[0].use_nested_tensor
    assert not any(layer._forward_pre_hooks for layer in packed[0].layers)


@pytest.mark.parametrize("bits", [(2, 4), (1, 2), (4, 8), (2, 1)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 17, 20, 33])
def test_one_pixel_of_one_tap(channels, bits, each_isa):
    """Whose row of weights is multiplied as it lies: not by what is filled up to whole bytes, which is no zero in DoReFa's codes."""
    layer = nn.Conv2d(channels, 5, 1)
    model = prepare(nn.Sequential(nn.AdaptiveAvgPool2d(1), layer), DoReFa(*bits)).eval()
    x = torch.rand(3, channels, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(convert(model)(x), model(x))
