"""group_quantize and group_dequantize, bit for bit against the twin, for every ISA of the machine."""

import functools

import group_twin as twin
import pytest
import torch

ops = torch.ops.quantize
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = [1, 2, 4, 8]
EVERY = [1, 7, 64, 256, 300, 0, -1]  # group sizes; 0: a sample, -1: the tensor
SIZES = {  # elements of a sample, and in which groups: tiles of 16, 32, 128 and 256 elements have their edges here
    1: EVERY, 7: [7, 0], 64: [1, 64, -1], 128: [64, 0], 129: [0], 151: EVERY, 255: [0], 256: [256, -1], 257: EVERY, 300: [256, 300],
    1000: EVERY, 3072: [256, 300, 0],
}  # fmt: skip
SEED, OFFSET = 0x0123456789ABCDEF, 0x8765432100000007


def seed_of(seed=SEED, offset=OFFSET):
    return torch.tensor([seed, offset - 2**64 if offset >= 2**63 else offset])


def assert_bits_equal(got, expected, what):
    """Every bit, NaN's payload aside; names the first place that differs."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), what
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    same = got.contiguous().view(word) == expected.contiguous().view(word)
    if got.is_floating_point():
        same |= got.isnan() & expected.isnan()
    if not same.all():
        place = tuple((~same).nonzero()[0].tolist())
        pytest.fail(f"{what}: {(~same).sum()} of {same.numel()} differ, first at {place}: got {got[place]}, expected {expected[place]}")


def check(x, bits, group_size, what):
    """Both ops on x, [N, ...], against the twin; returns what came back."""
    codes, ranges = ops.group_quantize(x, bits, group_size, seed_of())
    rows = twin.memory_order(x)
    if group_size == -1:
        rows = rows.reshape(1, -1)
    expected = packed_by_twin(rows, bits, group_size if group_size > 0 else rows.shape[1])
    assert_bits_equal(ranges, expected[1], f"{what}: ranges")
    assert_bits_equal(codes, expected[0], f"{what}: codes")
    back = ops.group_dequantize(codes, ranges, None, bits, group_size, x.shape, strides_of(x), x.dtype, seed_of())
    assert_bits_equal(twin.memory_order(back).reshape(rows.shape), expected[2], f"{what}: decoded")
    assert back.stride() == tuple(strides_of(x)), what
    return back


def strides_of(x):
    from quantize import _C

    return _C.packed_strides(list(x.shape), list(x.stride()))


_twins = {}


def packed_by_twin(rows, bits, group_size):
    """The ISAs share the twin's work: keyed by what the tensor holds."""
    key = (rows.dtype, rows.shape, bits, group_size, rows.contiguous().view(torch.uint8).numpy().tobytes())
    if key not in _twins:
        _twins[key] = twin.pack(rows, bits, group_size, SEED, OFFSET)
    return _twins[key]


@functools.cache
def sample_rows(samples, elements, dtype):
    """Rows of different size, sign and offset, one of them constant."""
    generator = torch.Generator().manual_seed(samples * 10007 + elements)
    x = torch.randn(samples, elements, generator=generator) * torch.tensor([1.0, 300.0, 1e-3])[:samples, None]
    x += torch.tensor([0.0, -1000.0, 0.5])[:samples, None]
    if elements > 20:
        x[0, : elements // 2].clamp_(min=0)  # as after a ReLU
    x[-1] = x[-1, 0]
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_equals_the_twin(each_isa, bits, dtype):
    for elements, group_sizes in SIZES.items():
        for group_size in group_sizes:
            check(sample_rows(3, elements, dtype), bits, group_size, f"{elements} elements in groups of {group_size}")


@pytest.mark.parametrize(
    ("counter", "key", "rounds", "words"),
    [
        ([0] * 4, [0] * 2, 7, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, 7, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], 7, "4dfccaba 190a87f0 c47362ba b6b5242a"),
        ([0] * 4, [0] * 2, 10, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], 10, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_twins_philox_gives_the_known_answers(counter, key, rounds, words):
    # Random123's kat_vectors. That the kernels draw the twin's numbers is what every other test here shows.
    assert " ".join(f"{int(w):08x}" for w in twin.philox4x32(counter, key, rounds)) == words


HUGE, TINY = 3.0e38, 1e-38
NASTY = {
    "zeros": [0.0, -0.0, 0.0],
    "negative zeros": [-0.0, -0.0],
    "negative zeros first": [-0.0, 0.0],
    "a constant": [0.1, 0.1, 0.1],
    "a negative constant": [-7.3, -7.3],
    "tiny": [TINY, 2 * TINY, 3.3 * TINY],
    "subnormal": [1e-44, 5e-42, -3e-40, 0.0],
    "huge": [0.5 * HUGE, -0.5 * HUGE, 1.0],
    "huge of one sign": [HUGE, 0.9 * HUGE, 3.38e38],
    "a huge constant": [-HUGE, -HUGE],
    "huge and tiny": [HUGE, TINY, 0.0],
    "an offset that hides the spread": [1e6, 1e6 + 0.25, 1e6 + 0.5],
    "powers": [2.0**i for i in range(-30, 31)],
}
NASTY_HALF = {
    "largest": [65504.0, -65504.0, 0.0, 1.0],
    "largest of one sign": [65504.0, 65472.0, 65440.0],
    "subnormal half": [2.0**-24, 2.0**-23, 3 * 2.0**-24, 0.0],
    "across 2^-14": [2.0**-14, 2.0**-15, 2.0**-13 + 2.0**-23],
}
NASTY_CASES = [(name, values, dtype) for name, values in NASTY.items() for dtype in (torch.float32, torch.bfloat16)]
NASTY_CASES += [(name, values, torch.float16) for name, values in {**NASTY_HALF, "zeros": [0.0, -0.0], "powers": [0.5, 2.0, 8.0]}.items()]


@pytest.mark.parametrize(("name", "values", "dtype"), NASTY_CASES, ids=[f"{n}-{d}".replace("torch.", "") for n, _, d in NASTY_CASES])
def test_extremes_equal_the_twin_and_stay_finite(each_isa, name, values, dtype):
    for elements in (len(values), 300):
        x = torch.tensor(values).to(dtype).repeat(-(-elements // len(values)))[:elements][None]
        for bits in BITS:
            back = check(x, bits, 256, f"{name}, {elements} elements, {bits} bits")
            assert back.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_range_beyond_fp32_is_finite_and_its_groups_loss_alone(each_isa, dtype):
    x = torch.ones(1, 192)
    x[0, 64:66] = torch.tensor([HUGE, -HUGE])
    for bits in BITS:
        back = check(x.to(dtype), bits, 64, f"{bits} bits")
        assert (back[0, :64] == 1).all()
        assert (back[0, 128:] == 1).all()
        assert back.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_stays_in_its_group(each_isa, dtype):
    x = sample_rows(3, 1000, dtype).clone()
    for row, place, poison in [(0, 63, torch.nan), (1, 0, torch.inf), (1, 512, -torch.inf), (2, 64, torch.nan), (2, 999, torch.inf)]:
        x[row, place] = poison
    for group_size in (64, 256):
        padded = torch.nn.functional.pad(x, (0, 1024 - 1000)).view(3, -1, group_size)
        poisoned = ~padded.isfinite().all(2, keepdim=True).expand_as(padded).reshape(3, -1)[:, :1000]
        for bits in BITS:
            back = check(x, bits, group_size, f"groups of {group_size}, {bits} bits")
            assert torch.equal(back.isnan(), poisoned)
            assert torch.equal(back.isfinite(), ~poisoned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_exact_levels_come_back_exactly(each_isa, bits, dtype):
    # min + scale*{0..B}, min and scale with few enough bits for the metadata and the levels for the type.
    top = 2**bits - 1
    for low, scale in [(0.0, 1.0), (-3.0, 0.5), (-128.0, 2.0**-1), (2.0**-10, 2.0**-10), (0.0, 0.15625 if bits < 8 else 0.25)]:
        for elements in (top + 1, 64, 151, 300, 1000):
            levels = torch.randint(top + 1, (2, elements), generator=torch.Generator().manual_seed(elements))
            levels[:, 0], levels[:, -1] = 0, top
            x = (low + scale * levels.float()).to(dtype)
            assert_bits_equal(check(x, bits, 0, f"{low} + {scale} * level"), x, f"{low} + {scale} * level")


MEMORY = {
    "channels_last": lambda: torch.randn(3, 5, 7, 9).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    "permuted within the sample": lambda: torch.randn(3, 4, 5, 6).permute(0, 3, 1, 2),
    "samples not outermost": lambda: torch.randn(4, 60).t(),
    "every other column": lambda: torch.randn(3, 300)[:, ::2],
    "every other sample": lambda: torch.randn(6, 150)[::2],
    "one sample of a transposed batch": lambda: torch.randn(7, 9, 1).permute(2, 1, 0),
    "expanded": lambda: torch.randn(3, 1).expand(3, 200),
    "expanded samples": lambda: torch.randn(1, 200).expand(3, 200),
    "unit dimensions with odd strides": lambda: torch.randn(3, 1, 40, 1).as_strided((3, 1, 40, 1), (40, 7, 1, 99)),
    "offset in storage": lambda: torch.randn(1001)[1:].view(4, 250),
    "three dimensions reversed": lambda: torch.randn(5, 6, 7).permute(2, 1, 0),
    "one dimension": lambda: torch.randn(300),
    "no dimension": lambda: torch.randn(()),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_formats(each_isa, name):
    x = MEMORY[name]()
    for bits, group_size in [(2, 64), (8, 256), (1, 0), (4, -1)]:
        back = check(x, bits, group_size, name)
        assert back.shape == x.shape
        # Bits apart: what comes back is x to within a step of the whole tensor's range, at x's own places.
        assert (back - x).abs().max() <= 1.05 * (x.max() - x.min()) / (2**bits - 1) + 1e-2
    dense = x.is_contiguous() or name in ("channels_last", "channels_last_3d", "permuted within the sample")
    assert (back.stride() == x.stride()) == dense or x.shape[0] == 1 or x.dim() == 4


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize("group_size", [256, 0, -1])
def test_empty(each_isa, shape, group_size):
    x = torch.empty(shape)
    codes, ranges = ops.group_quantize(x, 2, group_size, seed_of())
    assert codes.shape == (0,)
    assert ranges.shape == (0, 2)
    assert ops.group_dequantize(codes, ranges, None, 2, group_size, shape, x.stride(), x.dtype, seed_of()).shape == shape
    assert ops.group_variance(x, group_size).shape == (1 if group_size == -1 else shape[0], 4)


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"),
    [(1, 0, torch.float32), (2, 65537, torch.float32), (4, 0, torch.float16), (8, -1, torch.bfloat16)],
)
def test_long_groups_are_made_of_pieces(each_isa, bits, group_size, dtype):
    # Above 65,536 elements a group's pieces are worked on apart. Both ways give the bits of the twin, whose groups have no pieces.
    x = torch.randn(1, 65536 + 301, generator=torch.Generator().manual_seed(1)).to(dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        check(x, bits, group_size, f"{threads} threads")


@pytest.mark.parametrize("place", [0, 65535, 65536, 65836])
def test_a_long_group_is_poisoned_as_a_whole(each_isa, place):
    x = torch.ones(2, 65837)
    x[0, place] = torch.nan
    back = check(x, 2, 0, f"NaN at {place}")
    assert back[0].isnan().all()
    assert (back[1] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [7, 64, 256, 0])
def test_mixed_bits_equal_the_twin(each_isa, group_size, dtype):
    bits = [1, 8, 2, 4, 1]
    for elements in (1, 7, 129, 1000):
        x = torch.randn(5, elements, generator=torch.Generator().manual_seed(2)).to(dtype)
        own = torch.tensor(bits, dtype=torch.uint8)
        codes, ranges = ops.group_quantize_mixed(x, own, sum(bits), group_size, seed_of())
        expected = packed_by_twin_mixed(x, bits, group_size or elements)
        what = f"{elements} elements"
        assert codes.numel() >= expected[0].numel()
        assert_bits_equal(codes[: expected[0].numel()], expected[0], f"{what}: codes")
        assert_bits_equal(ranges, expected[1], f"{what}: ranges")
        back = ops.group_dequantize(codes, ranges, own, 0, group_size, x.shape, x.stride(), dtype, seed_of())
        assert_bits_equal(back, expected[2], f"{what}: decoded")


def packed_by_twin_mixed(x, bits, group_size):
    return twin.pack(x, bits, group_size, SEED, OFFSET)


def test_mixed_codes_take_the_bytes_of_the_budget():
    x = torch.randn(16, 1024)
    own = torch.tensor([1, 2, 4, 1] * 4, dtype=torch.uint8)
    codes, _ = ops.group_quantize_mixed(x, own, 32, 256, seed_of())
    assert codes.numel() == 32 * 1024 // 8


def test_seed_and_offset_are_both_used_to_the_last_bit():
    x = torch.randn(1, 2048)
    drawn = [ops.group_quantize(x, 2, 256, torch.tensor(s))[0] for s in ([0, 0], [1, 0], [0, 1], [1 << 40, 0], [0, 1 << 40], [-1, -1])]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert not torch.equal(a, b)
    assert torch.equal(drawn[0], ops.group_quantize(x, 2, 256, torch.tensor([0, 0]))[0])


def test_groups_of_a_tensor_draw_different_noise():
    x = torch.full((4, 256), 0.5)
    x[:, 0], x[:, 1] = 0.0, 1.0
    back = ops.group_quantize(x, 1, 256, seed_of())[0].view(4, 32)
    assert len({bytes(row.tolist()) for row in back}) == 4


def call(op, on_device, **changes):
    """The op with sensible arguments but for `changes`."""
    x = torch.randn(4, 32)
    codes, ranges = ops.group_quantize(x, 2, 16, seed_of())
    arguments = {
        "group_quantize": {"x": x, "bits": 2, "group_size": 16, "seed": seed_of()},
        "group_quantize_mixed": {
            "x": x,
            "sample_bits": torch.full((4,), 2, dtype=torch.uint8),
            "bit_budget": 8,
            "group_size": 16,
            "seed": seed_of(),
        },
        "group_dequantize": {
            "codes": codes,
            "ranges": ranges,
            "sample_bits": None,
            "bits": 2,
            "group_size": 16,
            "size": [4, 32],
            "stride": [32, 1],
            "dtype": x.dtype,
            "seed": seed_of(),
        },
        "group_variance": {"x": x, "group_size": 16},
        "allocate_bits": {"variance": torch.rand(4, 4), "bit_budget": 8, "max_bits": 8},
    }[op]
    arguments |= changes
    return getattr(ops, op)(**dict(zip(arguments, on_device(arguments.values()), strict=True)))


@pytest.mark.parametrize(
    ("op", "changes", "error", "message"),
    [
        ("group_quantize", {"bits": 3}, ValueError, "group_quantize: bits must be 1, 2, 4 or 8; got 3"),
        ("group_quantize", {"bits": 0}, ValueError, "bits must be"),
        ("group_quantize", {"bits": 16}, ValueError, "bits must be"),
        (
            "group_quantize",
            {"x": torch.ones(4, 32, dtype=torch.int32)},
            TypeError,
            "group_quantize: x must be float32, float16 or bfloat16; got Int",
        ),
        ("group_quantize", {"x": torch.ones(4, 32, dtype=torch.float64)}, TypeError, "x must be float32, float16 or bfloat16; got Double"),
        ("group_quantize", {"group_size": -2}, ValueError, "group_quantize: group_size must be positive"),
        ("group_quantize", {"seed": torch.zeros(1, dtype=torch.int64)}, ValueError, "group_quantize: seed must be an int64 CPU tensor"),
        ("group_quantize", {"seed": torch.zeros(2)}, ValueError, "seed must be an int64 CPU tensor"),
        ("group_quantize_mixed", {"sample_bits": torch.full((4,), 2)}, TypeError, "sample_bits must be Byte; got Long"),
        ("group_quantize_mixed", {"sample_bits": torch.full((3,), 2, dtype=torch.uint8)}, ValueError, "sample_bits must have 4 elements"),
        ("group_dequantize", {"codes": torch.zeros(31, dtype=torch.uint8)}, ValueError, "need 32 bytes of codes; there are 31"),
        ("group_dequantize", {"codes": torch.zeros(32)}, TypeError, "codes must be Byte"),
        ("group_dequantize", {"ranges": torch.zeros(7, 2, dtype=torch.int16)}, ValueError, "ranges must have 16 elements"),
        ("group_dequantize", {"ranges": torch.zeros(8, 2)}, TypeError, "ranges must be Short"),
        ("group_dequantize", {"dtype": torch.float64}, TypeError, "dtype must be float32"),
        ("group_dequantize", {"stride": [1, 4]}, ValueError, "stride must be dense"),
        ("group_dequantize", {"bits": 5}, ValueError, "bits must be"),
        ("group_variance", {"x": torch.ones(4, 32, dtype=torch.int64)}, TypeError, "group_variance: x must be float32"),
        ("group_variance", {"group_size": -5}, ValueError, "group_variance: group_size must be positive"),
        ("allocate_bits", {"variance": torch.rand(4, 3)}, ValueError, r"allocate_bits: variance must be \[N, 4\]"),
        ("allocate_bits", {"variance": torch.rand(4, 4).double()}, TypeError, "variance must be Float"),
        ("allocate_bits", {"bit_budget": 3}, ValueError, "bit_budget must give each of 4 samples a bit; got 3"),
        ("allocate_bits", {"max_bits": 6}, ValueError, "bits must be"),
    ],
)
def test_bad_input_is_named(op, changes, error, message, on_device):
    with pytest.raises(error, match=message):
        call(op, on_device, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_bits": torch.full((4,), 3, dtype=torch.uint8)}, "bits must be 1, 2, 4 or 8; got 3"),
        ({"bit_budget": 7}, "need 32 bytes of codes; there are 28"),
    ],
)
def test_bad_sample_bits_are_named(changes, message):
    """On the CPU: a GPU would have to be waited for."""
    with pytest.raises(ValueError, match=message):
        call("group_quantize_mixed", list, **changes)
