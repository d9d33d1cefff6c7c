"""The nearest positive semidefinite matrix with the same diagonal."""

import pytest
import torch
from small_sensitivity import sensitivity

from quantize import Sensitivity
from quantize.mixed_precision.projection import nearest_positive


def indefinite(size, seed=0):
    """A positive semidefinite matrix of strong diagonal, and noise that makes it indefinite; its scales span six decades."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size // 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-4, 2, size, dtype=torch.float64)[torch.randperm(size, generator=generator)].sqrt()
    matrix = (factor @ factor.T / size + 0.3 * (noise + noise.T) / size**0.5) * scale.outer(scale)
    matrix.diagonal().copy_(matrix.diagonal().abs() + 1e-3 * scale.square())
    return matrix


def correlation(matrix):
    root = matrix.diagonal().sqrt()
    return matrix / root.outer(root)


@pytest.mark.parametrize("size", [2, 7, 30])
def test_projected(size):
    s = Sensitivity([f"l{i}" for i in range(size)], [(4, None)], indefinite(size), *[torch.ones(size, 1)] * 2, method="clado")
    before = torch.linalg.eigvalsh(correlation(s.matrix))[0]
    assert before < -1e-3 or size == 2
    p = s.projected()
    assert torch.equal(p.matrix.diagonal(), s.matrix.diagonal()) and torch.equal(p.matrix, p.matrix.T) and p.method == "clado"
    for matrix in (p.matrix, correlation(p.matrix)):
        eigenvalues = torch.linalg.eigvalsh(matrix)
        assert eigenvalues[0] >= -1e-10 * eigenvalues[-1]
    again = p.projected().matrix
    torch.testing.assert_close(correlation(again), correlation(p.matrix), rtol=0, atol=1e-9)


def test_it_is_the_nearest():
    """Optimality: A - X = -Z + a diagonal with Z positive semidefinite and ZX = 0, in units of the diagonal."""
    matrix = indefinite(30)
    start, found = correlation(matrix), correlation(nearest_positive(matrix))
    values, vectors = torch.linalg.eigh(found)
    null = vectors[:, values < 1e-6]
    assert 3 <= null.shape[1] < 30
    # Z lies in the null space of X and agrees with X - A off the diagonal: solve for it, and see that it is positive.
    count = null.shape[1]
    basis = [(i, j) for i in range(count) for j in range(i, count)]
    columns = []
    for i, j in basis:
        z = null[:, i].outer(null[:, j])
        columns.append((z + z.T)[~torch.eye(30).bool()])
    system, target = torch.stack(columns, 1), (found - start)[~torch.eye(30).bool()]
    solution = torch.linalg.lstsq(system, target[:, None]).solution[:, 0]
    assert (system @ solution - target).abs().max() < 1e-6 * target.abs().max()
    z = torch.zeros(count, count, dtype=torch.float64)
    for (i, j), value in zip(basis, solution, strict=True):
        z[i, j] += value
        z[j, i] += value
    assert torch.linalg.eigvalsh(z)[0] > -1e-6 * z.abs().max()
    # And none of many others that are allowed is nearer.
    distance = (found - start).norm()
    for seed in range(5):
        other = correlation(nearest_positive(indefinite(30, seed + 1)))
        for part in (1e-3, 1e-2, 0.1):
            assert (found + part * (other - found) - start).norm() > distance


def test_positive_matrices_stay():
    factor = torch.randn(12, 5, dtype=torch.float64)
    matrix = factor @ factor.T
    torch.testing.assert_close(nearest_positive(matrix), matrix, rtol=1e-12, atol=1e-12)
    assert torch.equal(nearest_positive(torch.zeros(3, 3, dtype=torch.float64)), torch.zeros(3, 3, dtype=torch.float64))


def test_zeros_and_extremes():
    matrix = indefinite(6)
    matrix[2, 2] = 0
    found = nearest_positive(matrix)
    assert not found[2].any() and not found[:, 2].any()
    rest = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(found[rest][:, rest], nearest_positive(matrix[rest][:, rest]), rtol=1e-8, atol=0)
    for scale in (1e-300, 1e300):
        torch.testing.assert_close(nearest_positive(indefinite(6) * scale) / scale, nearest_positive(indefinite(6)), rtol=1e-8, atol=0)
    with pytest.raises(ValueError, match="projected: matrix must have no negative diagonal entries, .* got -1"):
        sensitivity(torch.diag(torch.tensor([1.0, 1, -1, 1, 1, 1]))).projected()
