"""Leading singular pairs."""

from __future__ import annotations

import pytest
import torch

from lorafit.adapter.variants import svd
from lorafit.adapter.variants.svd import leading_pair


def spectrum(rows: int, columns: int) -> torch.Tensor:
    """A matrix whose singular values fall like those of trained weights, as 1 / sqrt(n)."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, min(rows, columns))).Q for n in (rows, columns))
    return U * torch.arange(1, min(rows, columns) + 1).rsqrt() @ V.T


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24), (7, 7)])
def test_the_product_is_the_best_of_its_rank(rows, columns):
    """Eckart and Young: the error is the norm of the other singular values; A and B share each value evenly."""
    matrix = torch.randn(rows, columns)
    A, B = leading_pair(matrix, 5, torch.Generator())
    values = torch.linalg.svdvals(matrix)
    assert torch.allclose((matrix - B @ A).norm(), values[5:].norm(), rtol=1e-4)
    assert torch.allclose(A.norm(dim=1), values[:5].sqrt(), rtol=1e-4)
    assert torch.allclose(B.norm(dim=0), values[:5].sqrt(), rtol=1e-4)


def test_the_approximation_is_nearly_the_best(monkeypatch):
    """Large matrices: within 0.1 % of the best error, the same for the same generator; `exact` does without it."""
    matrix = spectrum(300, 200)
    best = torch.linalg.svdvals(matrix)[16:].norm()
    monkeypatch.setattr(svd, "EXACT", 100)
    A, B = leading_pair(matrix, 16, torch.Generator().manual_seed(1))
    assert best <= (matrix - B @ A).norm() * 1.0001
    assert (matrix - B @ A).norm() < 1.001 * best
    again = leading_pair(matrix, 16, torch.Generator().manual_seed(1))
    assert torch.equal(A, again[0])
    assert torch.equal(B, again[1])
    A, B = leading_pair(matrix, 16, torch.Generator(), exact=True)
    assert torch.allclose((matrix - B @ A).norm(), best, rtol=1e-4)
