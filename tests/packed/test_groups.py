"""Groups with bits of their own: the stream of codes, its ops, packed layers, files, and hostile ones."""

import copy
import json
import struct

import pytest
import torch
from copies import through_pickle, through_torch_save
from packed_models import Attention, PaddedConv, Residual, Tied, packed_of, warm
from test_hostile_files import build, layer, refused, split, write
from torch import nn
from torch.library import opcheck

from quantize.packed import kernels, stream
from quantize.packed.contents import packed_weights
from quantize.packed.convert import convert
from quantize.packed.file import load, save
from quantize.packed.inspect_file import inspect_file
from quantize.packed.modules import PackedLayer
from quantize.packed.size_report import size_report
from quantize.packed.summary import summary
from quantize.weight.config import DiffQ, Uniform
from quantize.weight.prepare import prepare, prepared_weights, weight_bits

ops = torch.ops.quantize
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
# codes, of a group
SIZES = [(1, 1), (7, 3), (24, 8), (61, 8), (61, 1), (40, 40), (513, 100)]


def spread(model):
    """Logits for all sorts of bits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("logits"):
                parameter.uniform_(-4, 4)
    return model


def diffq_of(model, config, *batch):
    """(prepared, packed), of bits all sorts."""
    prepared = spread(prepare(warm(model), config))
    if batch:
        with torch.no_grad():
            prepared(*batch)
    return prepared, convert(prepared)


def random_codes(numel, size, low=1, high=16):
    bits = torch.randint(low, high + 1, (stream.group_count(numel, size),)).to(torch.uint8)
    each = bits.long().repeat_interleave(size)[:numel]
    return torch.randint(0, 65536, (numel,)).int() >> (16 - each).int(), bits, each


def bit_list(packed):
    return [int(byte) >> bit & 1 for byte in packed for bit in range(8)]


@pytest.mark.parametrize(("numel", "size"), SIZES)
def test_stream_is_dense_and_little_endian(numel, size):
    codes, bits, each = random_codes(numel, size)
    packed, nibbles = stream.pack(codes, bits, size), stream.pack_bits(bits)
    wanted = [int(code) >> bit & 1 for code, width in zip(codes, each, strict=True) for bit in range(width)]
    assert stream.stream_bits(bits, numel, size) == len(wanted)
    assert bit_list(packed) == wanted + [0] * (-len(wanted) % 8)
    assert [int(byte) >> shift & 15 for byte in nibbles for shift in (0, 4)] == [*(bits - 1).tolist(), *[0] * (len(bits) % 2)]
    assert torch.equal(stream.unpack_bits(nibbles, len(bits)), bits)
    stream.check(packed, nibbles, numel, size, int(bits.max()))


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize(("numel", "size"), SIZES)
def test_exact_inverses(numel, size, bits):
    codes, groups, _ = random_codes(numel, size, bits, bits)
    codes[0], codes[-1] = 2**bits - 1, 2**bits - 1
    found = stream.unpack(stream.pack(codes, groups, size), stream.pack_bits(groups), numel, size, bits)
    assert found.dtype == (torch.uint8 if bits <= 8 else torch.int16) and torch.equal(found.int() & 0xFFFF, codes)


def test_pack_refuses_what_has_no_bits():
    eight = torch.full((2,), 8, dtype=torch.uint8)
    for wrong in (256, -1):
        with pytest.raises(ValueError, match=rf"codes of 8 bits must be 0 to 255; got {wrong} at \[3\]"):
            stream.pack(torch.tensor([0, 255, 1, wrong], dtype=torch.int32), eight, 2)
    for wrong in (0, 17):
        with pytest.raises(ValueError, match="bits of groups must be 1 to 16"):
            stream.pack(torch.zeros(4, dtype=torch.int32), torch.tensor([8, wrong], dtype=torch.uint8), 2)


def decode_twin(codes, each, scales, span):
    low, extent = (scales[:, part].repeat_interleave(span)[: len(codes)] for part in range(2))
    return low + codes.float() * (extent / (2.0**each - 1))


@pytest.mark.parametrize("span", [1, 8, 9, 27, 100, 513])
@pytest.mark.parametrize("high", [8, 16])
@pytest.mark.parametrize(("numel", "size"), [*SIZES, (20_001, 8), (20_001, 5000)])
def test_decode_groups(numel, size, high, span):
    codes, bits, each = random_codes(numel, size, 1, high)
    span = min(span, numel)
    scales = torch.randn(-(-numel // span), 2)
    scales[0] = 0
    values = codes.to(torch.uint8) if high == 8 else torch.where(codes > 32767, codes - 65536, codes).short()
    want, found = decode_twin(codes, each, scales, span), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(ops.decode_groups(values, stream.pack_bits(bits), scales, size, span))
    assert torch.equal(found[0], want) and torch.equal(found[1], want)


def test_opcheck():
    codes, bits, _ = random_codes(61, 8)
    packed, nibbles = stream.pack(codes, bits, 8), stream.pack_bits(bits)
    opcheck(ops.unpack_groups.default, (packed, nibbles, 8, 61, 16))
    values = ops.unpack_groups(packed, nibbles, 8, 61, 16)
    opcheck(ops.decode_groups.default, (values, nibbles, torch.randn(7, 2), 8, 9))


def test_a_short_stream_reads_as_zeros():
    nibbles = torch.full((2,), 0xFF, dtype=torch.uint8)
    assert ops.unpack_groups(torch.tensor([255, 1, 7], dtype=torch.uint8), nibbles, 2, 8, 16).tolist() == [511, 7, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("op", "place", "value", "message"),
    [
        ("unpack_groups", 4, 4, "width must be 8 or 16; got 4"),
        ("unpack_groups", 3, -1, "numel must not be negative; got -1"),
        ("unpack_groups", 2, 0, "group_size must be positive; got 0"),
        ("unpack_groups", 1, torch.zeros(3, dtype=torch.uint8), r"group_bits must have 4 elements; got \[3\]"),
        ("decode_groups", 4, 0, "span must be positive; got 0"),
        ("decode_groups", 2, torch.zeros(6, 2), r"scales must be \[rows, 2\], a row for every 9 of 61 values; got \[6, 2\]"),
    ],
)
def test_bad_input_is_named(op, place, value, message):
    nibbles = torch.zeros(4, dtype=torch.uint8)
    arguments = {
        "unpack_groups": [torch.zeros(61, dtype=torch.uint8), nibbles, 8, 61, 8],
        "decode_groups": [torch.zeros(61, dtype=torch.uint8), nibbles, torch.zeros(7, 2), 8, 9],
    }[op]
    arguments[place] = value
    with pytest.raises(ValueError, match=f"{op}: {message}"):
        getattr(ops, op)(*arguments)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)
        self.cell, self.fc = nn.GRUCell(12, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(self.cell(self.rnn(x)[0][:, -1]))


MODELS = {
    "residual": (Residual, IMAGE),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), IMAGE),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 5, 3, 2, 1, 1), nn.BatchNorm2d(5)), IMAGE),
    "transposed, groups": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), IMAGE),
    "one dimension": (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 3, 2)), IMAGE),
    "three dimensions": (lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 4, (1, 3, 3)), nn.BatchNorm3d(4)), IMAGE),
    "attention": (Attention, TOKENS),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), TOKENS),
    "own forward": (lambda: nn.Sequential(PaddedConv(3, 4, 2), nn.Conv2d(4, 4, 1)), IMAGE),
    "tied": (Tied, torch.arange(6)),
    "recurrent": (Recurrent, TOKENS),
}
CONFIGS = {
    "groups of 8": DiffQ(),
    "of 3, one range": DiffQ(3, range="tensor"),
    "ranges of groups": DiffQ(8, 2, 8, 8, range="group"),
    "whole tensor": DiffQ(0, activation_bits=8),
    "single weights": DiffQ(1, 1, 16, 8),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, config, tmp_path):
    make, x = MODELS[name]
    prepared, packed = diffq_of(make(), CONFIGS[config], x)
    a, b = tmp_path / "a", tmp_path / "b"
    with torch.no_grad():
        torch.testing.assert_close(packed(x), prepared(x), rtol=1e-5, atol=1e-5)
        for weight in prepared_weights(prepared):
            module = packed.get_submodule(weight.layer)
            if getattr(module, "folded", None) is None:
                assert torch.equal(getattr(module, weight.tensor), getattr(weight.module, weight.tensor))
        save(packed, a)
        loaded = load(warm(make()), a)
        assert torch.equal(loaded(x), packed(x))
        save(loaded, b)
        assert a.read_bytes() == b.read_bytes()
        assert torch.equal(load(convert(prepare(warm(make()), CONFIGS[config])), a)(x) if "whole" not in config else packed(x), packed(x))
    header = 8 + struct.unpack("<Q", a.read_bytes()[:8])[0]
    assert a.stat().st_size == header + size_report(packed).bytes
    assert size_report(prepared).layers == size_report(packed).layers == size_report(loaded).layers
    totals = [(s.macs, s.bit_ops, s.bytes, [r.weight_bits for r in s.layers]) for s in (summary(m, x) for m in (prepared, packed))]
    assert totals[0] == totals[1] and str(summary(packed, x))


def test_payload_to_the_byte(tmp_path):
    prepared, packed = diffq_of(nn.Sequential(nn.Conv2d(5, 7, 3, bias=False)), DiffQ())
    bits = weight_bits(prepared)["0.weight"]
    assert len(bits) == 40 and bits.min() < 5 and bits.max() > 12
    total = int(8 * bits[:39].sum() + 3 * bits[39])  # 315 weights
    save(packed, tmp_path / "f")
    data = split((tmp_path / "f").read_bytes())[2]
    assert len(data) == -(-total // 8) + 8 * 7 + 20 == size_report(packed).bytes
    row = size_report(packed).layers[0]
    assert row.bits == total / 315 and summary(packed, torch.randn(1, 5, 3, 3)).layers[0].weight_bits == row.bits
    assert f" {8 * -(-total // 8) / 315:.2f} " in inspect_file(tmp_path / "f") and f" {row.bits:.2f} " in str(size_report(packed))
    assert kernels.reason(packed[0]) == "decoded at each use from 16-bit codes: groups have bits of their own"


def test_all_bits_survive(tmp_path):
    """Every number of bits from 1 to 16 in one weight, the widest codes at both ends of their grid."""
    prepared = prepare(nn.Sequential(nn.Linear(64, 16)), DiffQ(64, 1, 16, 8))
    with torch.no_grad():
        part = torch.linspace(0, 1, 16).clamp(1e-6, 1 - 1e-6)
        prepared[0].parametrizations.weight[0].logits.copy_(torch.logit(part))
    prepared.eval()
    assert weight_bits(prepared)["0.weight"].tolist() == list(range(1, 17))
    packed = convert(prepared)
    save(packed, tmp_path / "f")
    loaded = load(nn.Sequential(nn.Linear(64, 16)), tmp_path / "f")
    assert torch.equal(loaded[0].weight, prepared[0].weight) and loaded[0].bits == 16
    codes = kernels.table(loaded[0]).view(16, 64).int() & 0xFFFF
    assert codes.amax(1).tolist() == [2**bits - 1 for bits in range(1, 17)] and codes.amin(1).eq(0).all()


def test_constant_weights(tmp_path):
    model = nn.Linear(6, 4)
    nn.init.constant_(model.weight, 0.25)
    packed = convert(prepare(model, DiffQ()))
    save(packed, tmp_path / "f")
    assert load(nn.Linear(6, 4), tmp_path / "f").weight.eq(0.25).all()


FOLDED = {  # range of the codes, whether the batch norm goes
    "convolution": (lambda: nn.Conv2d(3, 6, 3), {"channel": True, "tensor": True, "group": False}),
    "groups": (lambda: nn.Conv2d(3, 6, 3, groups=3), {"channel": True, "tensor": True, "group": False}),
    "transposed": (lambda: nn.ConvTranspose2d(3, 6, 3), {"channel": True, "tensor": True, "group": False}),
    "transposed, groups": (lambda: nn.ConvTranspose2d(3, 6, 3, groups=3), {"channel": False, "tensor": False, "group": False}),
}


@pytest.mark.parametrize("case", FOLDED)
@pytest.mark.parametrize("span", ["channel", "tensor", "group"])
def test_batch_norms(case, span):
    make, folds = FOLDED[case]
    prepared, packed = diffq_of(nn.Sequential(make(), nn.BatchNorm2d(6)), DiffQ(range=span))
    assert type(packed[1]) is (nn.Identity if folds[span] else nn.BatchNorm2d)
    if folds[span]:
        assert packed[0].scales.shape == (6, 2) and packed[0].form.range == "channel"
    with torch.no_grad():
        torch.testing.assert_close(packed(IMAGE), prepared(IMAGE), rtol=1e-4, atol=1e-4)


def test_what_modules_do():
    prepared, packed = diffq_of(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1)), DiffQ(activation_bits=8), IMAGE)
    expected = packed(IMAGE)
    assert packed[0]._table[1].dtype == torch.int16
    for twin in (copy.deepcopy(packed), through_pickle(packed), through_torch_save(packed)):
        assert "_table" not in vars(twin[0]) and torch.equal(twin(IMAGE), expected)
    assert sorted(packed.state_dict()) == ["0.bias", "0.codes", "0.group_bits", "0.scales", "0.step", "0.zero_point"]
    other = copy.deepcopy(packed)
    other[0].codes ^= 1
    assert not torch.equal(other(IMAGE), expected)
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(IMAGE), expected)
    half = copy.deepcopy(packed).half()
    assert half[0].weight.dtype == torch.float16 and half[0].scales.dtype == torch.float32 and half[0].group_bits.dtype == torch.uint8
    torch.testing.assert_close(half(IMAGE.half()).float(), expected, rtol=0.05, atol=0.05)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IMAGE), expected) and torch.equal(packed(IMAGE), expected)
    leaf = IMAGE.clone().requires_grad_()
    packed(leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0 and "method=diffq, bits<=" in repr(packed)


def test_over_other_methods(tmp_path):
    """A file of one method goes over a model that was converted with another."""
    models = [packed_of(Residual(), Uniform(4))[1], diffq_of(Residual(), DiffQ())[1]]
    outputs = [model(IMAGE) for model in models]
    for i, model in enumerate(models):
        save(model, tmp_path / str(i))
    for i, model in enumerate(reversed(models)):
        assert torch.equal(load(model, tmp_path / str(i))(IMAGE), outputs[i])
        save(model, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / str(i)).read_bytes()


def test_ties_are_stored_once(tmp_path):
    prepared, packed = diffq_of(Tied(), DiffQ())
    assert packed.inner.codes is packed.head.codes and packed.inner.group_bits is packed.head.group_bits
    save(packed, tmp_path / "f")
    _, fields, data = split((tmp_path / "f").read_bytes())
    assert fields["layers"][1]["tied"] == {part: f"inner.{part}" for part in ("codes", "group_bits", "scales")}
    loaded = load(Tied(), tmp_path / "f")
    assert loaded.inner.codes is loaded.head.codes and len(data) == size_report(loaded).bytes


def test_recurrent_layers():
    prepared, packed = diffq_of(Recurrent(), Uniform(4))
    assert len(packed_weights(packed.rnn)) == 8 and list(packed_weights(packed.cell)) == ["weight_ih", "weight_hh"]
    assert type(packed.rnn) is nn.LSTM and all(
        weight is getattr(packed.rnn, name) for name, weight in zip(packed.rnn._flat_weights_names, packed.rnn._flat_weights, strict=True)
    )
    rows = [row for row in size_report(packed).layers if row.name == "rnn"]
    assert len(rows) == 9 and rows[0].reason == "decoded: LSTM reads a float weight in its own forward"
    assert "not prepared" in str(size_report(prepare(Recurrent(), {"fc": Uniform(4)})))
    with torch.no_grad():
        half = copy.deepcopy(packed).double()
        torch.testing.assert_close(half(TOKENS.double()).float(), packed(TOKENS))
        assert torch.equal(copy.deepcopy(packed)(TOKENS), packed(TOKENS))
    assert not any(isinstance(m, PackedLayer) for m in (packed.rnn, packed.cell))


def define():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 3))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """108 codes of 7 bits, the last group short, and 15 of 8; one nibble and four bits to spare."""
    torch.manual_seed(0)
    model = prepare(define(), {"0": DiffQ(8, 7, 7, 7), "1": DiffQ(5, 3, 3, 3)})
    path = tmp_path_factory.mktemp("good") / "f"
    save(convert(model), path)
    load(define(), path)
    return path.read_bytes()


NAN = struct.pack("<f", float("nan"))
HOSTILE = {
    "bits 17": (layer(0, bits=17), r"layers\[0\].bits must be an integer from 1 to 16; got 17"),
    "bits 0": (layer(0, bits=0), r"layers\[0\].bits must be an integer from 1 to 16; got 0"),
    "bits more": (layer(0, bits=8), "layer '0': bits must be the largest group's, 7; got 8"),
    "bits fewer": (layer(0, bits=6), r"layers\[0\].code_bytes must be 14 to 81, for 108 codes; got 95"),
    "bits gone": (layer(0, bits=...), r"layers\[0\].bits must be there"),
    "method": (layer(0, method="uniform"), r"layers\[0\].storage must be there|fields that version 1 has"),
    "storage": (layer(0, storage=8), r"layers\[0\] must have fields that version 1 has; got \['storage'\]"),
    "size gone": (layer(0, group_size=...), r"layers\[0\].group_size must be there"),
    "size negative": (layer(0, group_size=-8), r"layers\[0\].group_size must be an integer, 0 for the whole tensor; got -8"),
    "size true": (layer(0, group_size=True), r"layers\[0\].group_size must be"),
    "size beyond": (layer(0, group_size=2**60), r"layers\[0\].group_size must be"),
    "size huge": (layer(0, group_size=2**47), r"expected tensor '0.group_bits', uint8 \[1\]; found uint8 \[7\]"),
    "size one": (layer(0, group_size=1), r"expected tensor '0.group_bits', uint8 \[54\]; found uint8 \[7\]"),
    "size zero": (layer(0, group_size=0), r"expected tensor '0.group_bits', uint8 \[1\]; found uint8 \[7\]"),
    "range": (layer(0, range="row"), r"layers\[0\].range must be one of channel, tensor, group; got 'row'"),
    "range gone": (layer(0, range=...), r"layers\[0\].range must be there"),
    "range of tensor": (layer(0, range="tensor"), r"expected tensor '0.scales', float32 \[1, 2\]; found float32 \[4, 2\]"),
    "range of groups": (layer(0, range="group"), r"expected tensor '0.scales', float32 \[14, 2\]; found float32 \[4, 2\]"),
    "bytes": (layer(0, code_bytes=94), r"expected tensor '0.codes', uint8 \[94\]; found uint8 \[95\]"),
    "bytes few": (layer(0, code_bytes=13), r"layers\[0\].code_bytes must be 14 to 95, for 108 codes; got 13"),
    "bytes many": (layer(0, code_bytes=96), r"layers\[0\].code_bytes must be 14 to 95, for 108 codes; got 96"),
    "bytes huge": (layer(0, code_bytes=2**60), r"layers\[0\].code_bytes must be a positive integer"),
    "bytes text": (layer(0, code_bytes="95"), r"layers\[0\].code_bytes must be a positive integer"),
    "shape": (layer(0, shape=[4, 3, 9]), r"layer '0': expected weight of shape \[4, 3, 3, 3\]"),
    "a group's bits": (write("0.group_bits", b"\x65"), "layer '0': group_bits must add up to the 95 bytes of codes; they take 748 bits"),
    "larger bits": (write("0.group_bits", b"\xf6"), "layer '0': bits must be the largest group's, 16; got 7"),
    "a nibble to spare": (
        write("1.group_bits", b"\x12", 1),
        "layer '1': group_bits: the nibble after those of 3 groups must be zero; got 1",
    ),
    "padding": (write("0.codes", b"\xff", 94), "layer '0': codes: the padding after the last of 756 bits must be zero bits"),
    "scale": (write("0.scales", NAN, 20), r"layer '0': scales must be finite; got nan at \[2, 1\]"),
    "decoded": (layer(1, decoded="weight"), "layer '1': expected a weight that is packed, as in the model; found 'decoded'"),
    "tied to others": (layer(1, tied={"group_bits": "0.codes"}), "layer '1': expected tensor '0.codes', uint8"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(case, good, tmp_path):
    change, message = HOSTILE[case]
    header, fields, data = split(good)
    data = bytearray(data)
    change(header, fields, data)
    refused(tmp_path, build(header, fields, bytes(data)), message, define())


def test_rows_refuse_the_fields_of_groups(tmp_path):
    save(convert(prepare(define(), Uniform(4))), tmp_path / "f")
    header, fields, data = split((tmp_path / "f").read_bytes())
    assert "group" not in json.dumps(fields)
    for field, value in (("group_size", 8), ("range", "channel"), ("code_bytes", 64)):
        changed = copy.deepcopy(fields)
        changed["layers"][0][field] = value
        refused(tmp_path, build(header, changed, data), rf"layers\[0\] must have fields that version 1 has; got \['{field}'\]", define())
