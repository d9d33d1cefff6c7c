"""Unbiased, and with the variance that the formula says. On the machine's best ISA: that the others give the same bits is tested elsewhere.

A draw is a sample: x repeated along dimension 0 gives groups that differ in nothing but their number, and so in their noise. Each test is
seeded; the false-alarm rate it states is over seeds.
"""

import math

import group_twin as twin
import pytest
import torch

ops = torch.ops.quantize
SEED = torch.tensor([20240229, 3])
DRAWS, ELEMENTS = 4096, 256


def draws_of(x, bits, draws=DRAWS):
    """x, one group, packed and unpacked `draws` times: [draws, elements] in double."""
    repeated = x[None].expand(draws, -1)
    codes, ranges = ops.group_quantize(repeated, bits, 0, SEED)
    return ops.group_dequantize(codes, ranges, None, bits, 0, repeated.shape, [x.numel(), 1], x.dtype, SEED).double()


def exact_variance(rows, bits):
    """s^2 p(1-p) of each element of groups [groups, elements] in double, and s [groups, 1]."""
    low, scale = (t.double()[:, None] for t in twin.ranges_of(rows, bits)[1:])
    level = torch.where(scale > 0, (rows.double() - low) / scale, 0)
    p = level - level.floor()
    return scale**2 * p * (1 - p), scale


def spread(dtype, scale, offset=0.0):
    return (torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(5)) * scale + offset).to(dtype)


CASES = {
    "fp32": lambda: spread(torch.float32, 1.0),
    "fp32 far from zero": lambda: spread(torch.float32, 1.0, 1000.0),
    "fp32 after a ReLU": lambda: spread(torch.float32, 3.0).relu(),
    "fp32 tiny": lambda: spread(torch.float32, 1e-37),
    "fp32 subnormal": lambda: spread(torch.float32, 1e-42),
    "fp32 huge": lambda: spread(torch.float32, 1e37),
    "fp32 constant": lambda: torch.full((ELEMENTS,), 0.1),
    "fp32 negative constant": lambda: torch.full((ELEMENTS,), -1234.567),
    "fp32 outlier": lambda: torch.cat([torch.tensor([1e4]), spread(torch.float32, 1.0)[1:]]),
    "fp16": lambda: spread(torch.float16, 1.0),
    "fp16 extremes": lambda: torch.cat([torch.tensor([65504.0, -65504.0]).half(), spread(torch.float16, 2e4)[2:].clamp(-65504, 65504)]),
    "fp16 largest": lambda: torch.tensor([65504.0, 65472.0, 65440.0, 65280.0]).half().repeat(64),
    "fp16 subnormal": lambda: spread(torch.float16, 1e-6),
    "fp16 constant": lambda: torch.full((ELEMENTS,), 0.1).half(),
    "bf16": lambda: spread(torch.bfloat16, 1.0),
    "bf16 far from zero": lambda: spread(torch.bfloat16, 1.0, 100.0),
    "bf16 constant": lambda: torch.full((ELEMENTS,), 0.1).bfloat16(),
}


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("name", CASES)
def test_unbiased(name, bits):
    # Null: E[decoded] = x for each element. 4,096 draws of 256 elements. False alarms: below 1e-6 for the elements together (Bernstein's
    # inequality, so p near 0 or 1 is no matter) and 6e-7 for their sum (z = 5). The sum sees a common bias of 0.002 steps: that of an
    # 8-bit code in a 16-bit lane, or of rounding the range after the codes.
    x = CASES[name]()
    variance, scale = (t[0] for t in exact_variance(x[None], bits))
    top = float(x.abs().max())
    # Of the decoded type; float16's is never smaller than its subnormals'.
    spacing = {torch.float32: 0.0, torch.float16: max(2.0**-10 * top, 2.0**-24), torch.bfloat16: 2.0**-7 * top}[x.dtype]
    variance = variance + spacing**2 / 4
    arithmetic = scale * 2.0**-13 + top * 2.0**-23  # rounding to fixed point at 4 bits; the decoded fp32 value
    error = (draws_of(x, bits) - x.double()).mean(0)
    log = math.log(2 * ELEMENTS / 1e-6)
    bound = (2 * variance * log / DRAWS).sqrt() + (scale + spacing) * log / (3 * DRAWS) + arithmetic
    worst = int((error.abs() / bound).argmax())
    far = f"element {worst}: mean error {error[worst]:.3g}, bound {bound[worst]:.3g}, step {scale.item():.3g}"
    assert (error.abs() <= bound).all(), far
    deviation = math.sqrt(1.01 * float(variance.sum()) / DRAWS) / ELEMENTS
    assert abs(float(error.mean())) <= 5 * deviation + arithmetic


def test_unbiased_over_seeds():
    # Null: as above, with seeds and offsets instead of group numbers as the draws: 2,000 of them. False alarms: below 1e-6.
    x = spread(torch.float32, 1.0)
    variance, scale = (t[0] for t in exact_variance(x[None], 2))
    total, draws = torch.zeros(ELEMENTS).double(), 2000
    for draw in range(draws):
        seed = torch.tensor([draw, 0] if draw % 2 else [7, draw])
        codes, ranges = ops.group_quantize(x[None], 2, 256, seed)
        total += ops.group_dequantize(codes, ranges, None, 2, 256, [1, ELEMENTS], [ELEMENTS, 1], x.dtype, seed)[0].double() - x.double()
    log = math.log(2 * ELEMENTS / 1e-6)
    assert ((total / draws).abs() <= (2 * variance * log / draws).sqrt() + scale * log / (3 * draws) + scale * 2.0**-13).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["fp32", "fp32 far from zero", "fp32 after a ReLU", "fp32 constant", "fp32 outlier"])
def test_variance_is_s2_p_1_minus_p(name, bits):
    # Null: the sum over a group of squared errors has mean sum s^2 p(1-p). 4,096 draws; z = 5: false alarms 6e-7 a case.
    x = CASES[name]()
    squares = (draws_of(x, bits) - x.double()).square().sum(1)
    expected = float(exact_variance(x[None], bits)[0].sum())
    deviation = float(squares.std()) / math.sqrt(DRAWS)
    assert abs(float(squares.mean()) - expected) <= 5 * deviation + 1e-3 * expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [1, 7, 64, 256, 300, 0, -1])
def test_group_variance_is_the_exact_one(each_isa, group_size, dtype):
    for elements in (1, 7, 15, 16, 17, 129, 300, 1000):
        x = (torch.randn(3, elements) * torch.tensor([[1.0], [50.0], [1e-3]]) + torch.tensor([[0.0], [7.0], [0.0]])).to(dtype)
        got = ops.group_variance(x, group_size)
        rows = x.reshape(1, -1) if group_size == -1 else x
        size = group_size if group_size > 0 else rows.shape[1]
        whole = rows.shape[1] // size * size
        for column, bits in enumerate((1, 2, 4, 8)):
            parts = [exact_variance(rows[:, :whole].reshape(-1, size), bits)[0].view(len(rows), -1).sum(1)]
            if whole < rows.shape[1]:
                parts.append(exact_variance(rows[:, whole:], bits)[0].sum(1))
            # fp32 arithmetic leaves p wrong by 2^-23 of the level.
            torch.testing.assert_close(got[:, column].double(), sum(parts), rtol=2e-3, atol=1e-9)


def test_group_variance_of_levels_constants_and_poison(each_isa):
    x = torch.stack([torch.arange(256.0), torch.full((256,), 0.5), torch.ones(256)])
    x[2, 5] = torch.nan
    figures = ops.group_variance(x, 256)
    assert figures[0, 3] == 0
    assert (figures[0, :3] > 0).all()
    assert (figures[1] == 0).all()
    assert figures[2].isnan().all()


def test_group_variance_of_the_widest_and_the_narrowest_range(each_isa):
    # Where the scale leaves fp32's normal numbers there is no figure, and none is made up: zero, never NaN.
    x = torch.randn(3, 256)
    x[0, :2] = torch.tensor([-3e38, 3e38])
    x[1] *= 1e-38
    figures = ops.group_variance(x, 256)
    assert (figures[:2] == 0).all()
    assert (figures[2] > 0).all()


def test_a_draw_that_serves_twice_adds_little_to_the_variance_of_a_sum():
    # Elements 64 apart share a 16-bit draw, once with its bytes swapped. The excess of Var(sum) over sum Var is computed here over all
    # 65,536 draws: 0.6 % for evenly spread p. Null: Var(sum) of 40,000 groups of 128 is the value computed; the estimate's relative
    # deviation is sqrt(2/40,000) = 0.7 %, z = 5: false alarms 6e-7.
    x = torch.linspace(0, 1, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    variance, scale = (t[0] for t in exact_variance(x[None], 2))
    level = (x.double() - twin.ranges_of(x[None], 2)[1].double()) / scale
    p = level - level.floor()
    u = torch.arange(65536)
    swapped = (u << 8 | u >> 8) & 0xFFFF
    up, down = (p[:64, None] + u / 65536 >= 1).double(), (p[64:, None] + swapped / 65536 >= 1).double()
    pairs = (up * down).mean(1) - up.mean(1) * down.mean(1)
    excess = float(2 * pairs.sum() / (p * (1 - p)).sum())
    assert 0.003 < excess < 0.009
    sums = (draws_of(x, 2, 40_000) - x.double()).sum(1)
    assert float(sums.var()) / float(variance.sum()) == pytest.approx(1 + excess, abs=5 * math.sqrt(2 / 40_000))


def test_noise_of_neighbouring_elements_and_groups_is_uncorrelated():
    # Null: correlation 0 for every pair but those 64 apart. 4,096 draws of 128 elements: 8,000 pairs, z = 7: false alarms 2e-8.
    x = torch.linspace(0.01, 0.99, 128)
    error = draws_of(x, 2) - x.double()
    correlation = torch.corrcoef(error.T)
    correlation.fill_diagonal_(0)
    places = torch.arange(64)
    correlation[places, places + 64] = correlation[places + 64, places] = 0
    assert correlation.abs().nan_to_num().max() < 7 / math.sqrt(DRAWS)
    assert abs(float((error[1:] * error[:-1]).mean() / error.square().mean())) < 5 / math.sqrt(error.numel())
