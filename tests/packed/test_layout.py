"""Codes in rows: sizes, order, exact inverses, and what unpack refuses."""

import math

import pytest
import torch

from quantize.packed.layout import (
    METHODS,
    from_rows,
    levels_table,
    pack,
    row_bytes,
    rows_and_k,
    storage_bits,
    to_rows,
    unpack,
)

CASES = [(name, bits) for name, method in METHODS.items() for bits in range(method.min_bits, method.max_bits + 1)]
SIZES = [(1, 1), (3, 7), (2, 15), (2, 16), (2, 17), (1, 31), (1, 33), (5, 129), (1, 151), (3, 257)]


def levels_of(method, bits):
    """Straight from the definition."""
    if method in ("xnor", "dorefa"):
        return [float(level) for level in range(1 - 2**bits, 2**bits, 2)]
    if method in ("uniform", "ternary"):
        top = 2 ** (bits - 1) - 1
        return [float(level) for level in range(-top, top + 1)]
    positive = [2.0**e for e in range(2 ** (bits - 1) - 1)]
    return sorted([0.0, *positive, *[-level for level in positive]])


def draw(method, bits, *shape):
    values = torch.tensor(levels_of(method, bits))
    return values[torch.randint(len(values), shape)]


@pytest.mark.parametrize("method, bits", CASES)
def test_tables_hold_exactly_the_levels(method, bits):
    table = levels_table(method, storage_bits(bits), bits)
    assert len(table) == 2 ** storage_bits(bits) and table.dtype == torch.float32
    assert sorted(table[~table.isnan()].tolist()) == levels_of(method, bits)
    if method not in ("xnor", "dorefa"):  # whose inputs' padding is zero
        assert table[0] == 0  # padding is a level, so that kernels may run over it


def test_codes_are_as_documented():
    # two's complement; sign and exponent + 1
    assert levels_table("uniform", 2).nan_to_num(9).tolist() == [0, 1, 9, -1]
    assert levels_table("power_of_two", 2).nan_to_num(9).tolist() == [0, 1, 9, -1]
    assert levels_table("power_of_two", 4).nan_to_num(9).tolist() == [0, 1, 2, 4, 8, 16, 32, 64, 9, -1, -2, -4, -8, -16, -32, -64]
    uniform = levels_table("uniform", 8)
    assert uniform[127] == 127 and uniform[129] == -127 and uniform[255] == -1 and math.isnan(uniform[128])
    assert levels_table("xnor", 1).tolist() == levels_table("dorefa", 1).tolist() == [1, -1]
    assert levels_table("dorefa", 2).tolist() == [1, 3, -3, -1]
    assert levels_table("power_of_two", 8)[[1, 127, 255]].tolist() == [1, 2.0**126, -(2.0**126)]


def test_little_endian_within_bytes():
    assert pack(torch.tensor([[1.0, -1, 0, 1, 1]]), "uniform", 2).tolist() == [[0b01001101, 0b00000001, 0, 0, 0, 0, 0, 0]]
    assert pack(torch.tensor([[1.0, -1, 64]]), "power_of_two", 4).tolist() == [[0x91, 0x07, 0, 0, 0, 0, 0, 0]]
    assert pack(torch.tensor([[1.0, -1, 127]]), "uniform", 8).tolist() == [[1, 255, 127, 0, 0, 0, 0, 0]]
    assert pack(torch.tensor([[1.0, -1, -1, 1, 1, 1, 1, 1, -1]]), "xnor", 1).tolist() == [[0b110, 1, 0, 0, 0, 0, 0, 0]]
    assert pack(torch.tensor([[1.0, -1, 65535, 515]]), "dorefa", 16).tolist() == [[0, 0, 255, 255, 255, 127, 1, 1]]


@pytest.mark.parametrize("method, bits", CASES)
@pytest.mark.parametrize("n, k", SIZES)
def test_exact_inverses(method, bits, n, k):
    width = storage_bits(bits)
    levels = draw(method, bits, n, k)
    rows = pack(levels, method, bits)
    assert rows.shape == (n, row_bytes(k, width)) and rows.shape[1] % 8 == 0 and rows.shape[1] < k * width / 8 + 8
    assert torch.equal(unpack(rows, k, method, bits), levels)
    assert torch.equal(torch.ops.quantize.decode_weight(rows, levels_table(method, width), torch.ones(len(rows)), width, k), levels)


def test_size_of_a_layer():
    rows = pack(to_rows(draw("power_of_two", 4, 256, 256, 3, 3)), "power_of_two", 4)
    assert rows.nbytes == 294_912
    assert pack(to_rows(draw("uniform", 2, 256, 256, 3, 3)), "uniform", 2).nbytes == 147_456
    assert pack(to_rows(draw("xnor", 1, 256, 256, 3, 3)), "xnor", 1).nbytes == 73_728
    assert pack(to_rows(draw("xnor", 1, 16, 16, 3, 3)), "xnor", 1).nbytes == 384


@pytest.mark.parametrize(
    "shape, transposed, groups",
    [
        ((5, 7), False, 1),
        ((5, 3, 4), False, 1),
        ((5, 3, 2, 4), False, 1),
        ((6, 1, 3, 3), False, 6),
        ((2, 3, 2, 3, 4), False, 1),
        ((5, 3, 4), True, 1),
        ((6, 2, 3, 2), True, 3),
        ((4, 1, 3, 3), True, 4),
        ((4, 3, 2, 3, 4), True, 2),
    ],
)
def test_rows_are_output_channels_tap_major(shape, transposed, groups):
    weight = torch.randn(shape)
    rows = to_rows(weight, transposed, groups)
    assert tuple(rows.shape) == rows_and_k(shape, transposed, groups)
    assert torch.equal(from_rows(rows, shape, transposed, groups), weight)
    kernel = shape[2:]
    inputs = shape[0] // groups if transposed else shape[1]
    for n in range(len(rows)):
        for at, value in enumerate(rows[n].tolist()):
            tap, c = divmod(at, inputs)
            where = [int(i) for i in torch.unravel_index(torch.tensor(tap), kernel)] if kernel else []
            index = (n // shape[1] * inputs + c, n % shape[1], *where) if transposed else (n, c, *where)
            assert weight[index] == value


def test_pack_refuses_what_is_no_level():
    for bad, method, bits in [(1.5, "uniform", 8), (4.0, "uniform", 3), (3.0, "power_of_two", 4), (128.0, "power_of_two", 4)]:
        levels = torch.zeros(2, 5)
        levels[1, 3] = bad
        with pytest.raises(ValueError, match=rf"levels must be those of {method} at {bits} bits; got {bad} at \[1, 3\]"):
            pack(levels, method, bits)
    with pytest.raises(ValueError, match="got nan"):
        pack(torch.full((1, 1), math.nan), "uniform", 4)


@pytest.mark.parametrize("method, bits", [(m, b) for m, b in CASES])
def test_unpack_refuses_every_impossible_code(method, bits):
    width = storage_bits(bits)
    table = levels_table(method, width, bits)
    codes = table.isnan().nonzero().flatten().tolist()
    for code in codes if width < 16 else codes[:: len(codes) // 5 + 1]:
        rows = torch.zeros(2, 8, dtype=torch.uint8)
        rows[1, 0] = code << width if width < 8 else 0
        rows[1, 1] = code if width == 8 else 0
        rows[1, 2], rows[1, 3] = (code & 255, code >> 8) if width == 16 else (0, 0)
        with pytest.raises(ValueError, match=rf"codes: {code} at \[1, 1\] is no code of {method} at {bits} bits"):
            unpack(rows, 3, method, bits)


def test_unpack_refuses_padding_and_shapes():
    rows = pack(torch.ones(3, 5), "uniform", 4)
    for byte, bit in [(2, 4), (3, 0), (7, 7)]:
        bad = rows.clone()
        bad[2, byte] |= 1 << bit
        with pytest.raises(ValueError, match="padding after a row's 5 codes must be zero bits; row 2"):
            unpack(bad, 5, "uniform", 4)
    with pytest.raises(ValueError, match=r"codes must be uint8 \[N, 8\]; got uint8 \[3, 4\]"):
        unpack(rows[:, :4], 5, "uniform", 4)
    with pytest.raises(ValueError, match="got int32"):
        unpack(rows.int(), 5, "uniform", 4)


def test_table_arguments():
    with pytest.raises(ValueError, match="method must be one of uniform"):
        levels_table("other", 4)
    with pytest.raises(ValueError, match="storage must be 1, 2, 4, 8 or 16"):
        levels_table("uniform", 3)
