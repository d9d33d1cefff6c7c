"""sample_energy: what the backward reports to the allocation of bits."""

import pytest
import torch

ops = torch.ops.quantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(5),
        lambda: torch.randn(3, 1),
        lambda: torch.randn(3, 70),
        lambda: torch.randn(2, 5, 41, 43),
        lambda: torch.randn(2, 5, 41, 43).to(memory_format=torch.channels_last),
        lambda: torch.randn(40, 30).t(),
        lambda: torch.randn(3, 300)[:, ::2],
        lambda: torch.randn(3, 1).expand(3, 70),
        lambda: torch.empty(0, 7),
    ],
    ids=["vector", "column", "rows", "images", "channels_last", "transposed", "every other", "expanded", "empty"],
)
def test_sums_of_squares(each_isa, make, dtype):
    x = make().to(dtype)
    expected = x.double().square().reshape(len(x), -1).sum(1) if x.numel() else torch.zeros(len(x))
    got = ops.sample_energy(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected.float(), rtol=1e-6, atol=0)


def test_large_halves_do_not_overflow(each_isa):
    assert ops.sample_energy(torch.full((2, 100), 6e4, dtype=torch.float16)).isfinite().all()


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="sample_energy: x must be float32, float16 or bfloat16; got Int"):
        ops.sample_energy(torch.ones(3, 3, dtype=torch.int32))
