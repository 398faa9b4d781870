"""The largest singular values of a matrix with their vectors, also as a LoRA pair."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 1024  # shorter side up to which the whole decomposition is computed, in at most a second
ITERATIONS, MORE = 4, 16  # of the approximation of larger ones: passes over the matrix, vectors beyond the rank


def leading_pair(
    matrix_OI: Tensor, rank: int, generator: torch.Generator, exact: bool = False
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(A (r, I), B (O, r)), fp32, whose product B A is the best approximation of that rank, shared out evenly:
    B = U sqrt(S), A = sqrt(S) V^T. exact: whatever the matrix's size; the rest as in `leading`."""
    U, S, V = leading(matrix_OI, rank, generator, max(matrix_OI.shape) if exact else EXACT)
    root = S.sqrt()
    return root[:, None] * V, U * root


def leading(
    matrix_OI: Tensor, rank: int, generator: torch.Generator, exact_up_to: int = EXACT
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(U (O, r), S (r,), V^T (r, I)), fp32: the largest singular values, in order, and their vectors.

    matrix_OI: (O, I), fp32. Matrices whose shorter side is above `exact_up_to` are decomposed by subspace iteration
    from random vectors of `generator`, which finds singular values that stand out and a mixture of those that are
    nearly equal.
    Source: Halko, Martinsson & Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    if min(matrix_OI.shape) <= exact_up_to:
        U, S, V = torch.linalg.svd(matrix_OI, full_matrices=False)
    else:
        vectors = torch.randn(matrix_OI.shape[1], rank + MORE, generator=generator)
        Q = torch.linalg.qr(matrix_OI @ vectors).Q
        for _ in range(ITERATIONS):
            Q = torch.linalg.qr(matrix_OI @ torch.linalg.qr(matrix_OI.T @ Q).Q).Q
        U, S, V = torch.linalg.svd(Q.T @ matrix_OI, full_matrices=False)
        U = Q @ U
    return U[:, :rank], S[:rank], V[:rank]
