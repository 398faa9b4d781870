"""Adapters of one base put together: pure functions on the updates of one layer.

    an update  D = B A  (O, I), its scale in B, either as its two factors (`LowRank`) or as the matrix; of a stack of
               experts (E, O, I), and then everything is done expert by expert

    added         sum of w_i D_i; Ilharco et al. 2022, arXiv:2212.04089
    concatenated  the same as factors, exact, of the ranks' sum: [w_1 B_1, w_2 B_2] [A_1; A_2]
    truncated     the nearest matrix of a lower rank, by singular values; Eckart and Young 1936
    ties          small values out; a sign elected for each place; the mean of those that agree with it;
                  Yadav et al. 2023, arXiv:2306.01708
    dropped       DARE: values dropped at random, the rest divided by the share that is kept;
                  Yu et al. 2023, arXiv:2311.03099

PEFT's `add_weighted_adapter` gives the same for cat, svd, ties_svd and, but for its random numbers, dare_linear_svd and
dare_ties_svd. Its linear, ties and dare_linear add A to A and B to B, whose product is not the sum of the updates: they
are not offered here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT = 1024  # rows or columns up to which singular values are computed whole; 1.5 s at 1024 x 4096 on one core
OVERSAMPLES, PASSES = 32, 4  # of the randomised factorisation


class LowRank(NamedTuple):
    """An update as its factors: B A, fp32."""

    A: Tensor
    """(r, I), or (E, r, I)"""
    B: Tensor
    """(O, r), or (E, O, r)"""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.A.shape[-2]

    def dense(self) -> Tensor:
        """The update itself (O, I)."""
        return self.B @ self.A


def scaled(update: LowRank, factor: float) -> LowRank:
    """The update times a number."""
    return LowRank(update.A, update.B * factor)


def concatenated(updates: Sequence[LowRank]) -> LowRank:
    """The sum of updates, exactly, as factors of the ranks' sum."""
    return LowRank(
        torch.cat([update.A for update in updates], dim=-2), torch.cat([update.B for update in updates], dim=-1)
    )


def padded(update: LowRank, rank: int) -> LowRank:
    """The same update with zeros up to `rank`, which must not be less than it has."""
    more = rank - update.rank
    assert more >= 0, f"rank {update.rank} does not fit into {rank}"
    return LowRank(F.pad(update.A, (0, 0, 0, more)), F.pad(update.B, (0, more)))


def added(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of updates (O, I)."""
    total = updates[0] * weights[0]
    for update, weight in zip(updates[1:], weights[1:], strict=True):
        total += update * weight
    return total


def ties(updates: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES: the share `density` of each update's largest values is kept; at each place the sign whose values weigh
    more is elected; the weighted values of that sign are averaged over those that have it.

    As in PEFT the election is by the unweighted sum, and a sum of 0 elects the positive sign.
    """
    kept = torch.stack([_largest(update, density) for update in updates])
    elected = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agrees = kept.sign() == elected
    weighted = kept * torch.tensor(weights, dtype=kept.dtype).view(-1, *[1] * (kept.ndim - 1))
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _largest(update: Tensor, density: float) -> Tensor:
    """The update with all but its int(density * numel) largest values (by magnitude) set to 0."""
    flat = update.flatten()
    places = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, places, flat[places]).view_as(update)


def dropped(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE: each value stays with probability `density`, divided by it, so that the expected update is the same."""
    return update * (torch.rand(update.shape, generator=generator) < density) / density


def generator(seed: int, place: str) -> torch.Generator:
    """Random numbers of one place (a layer of an adapter), the same whatever was drawn before."""
    digest = hashlib.sha256(f"{seed}:{place}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def truncated(update: Tensor | LowRank, rank: int, exact: bool | None = None) -> tuple[LowRank, float]:
    """(the nearest update of this rank, the share of the squared norm that it keeps, from 0 to 1).

    rank is cut to the matrix's sides. exact: all singular values, or those of a random projection, whose kept share is
    a few thousandths lower at worst (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4); by size if None. Factors need
    neither: their singular values are those of a small matrix. The singular values go half to A and half to B.
    """
    if isinstance(update, LowRank):
        left, upper = torch.linalg.qr(update.B)
        right, lower = torch.linalg.qr(update.A.mT)
        (A, B), share = truncated(upper @ lower.mT, rank, exact=True)
        return LowRank(A @ right.mT, left @ B), share
    total = float(update.square().sum(dtype=torch.float64))
    side = min(update.shape[-2:])
    rank = min(rank, side)
    if exact is None:
        exact = side <= max(EXACT, rank + OVERSAMPLES)
    U, S, V = _singular(update) if exact else _projected(update, rank + OVERSAMPLES)
    U, S, V = U[..., :rank], S[..., :rank], V[..., :rank, :]
    share = float(S.square().sum(dtype=torch.float64)) / total if total else 1.0
    root = S.sqrt()
    return LowRank(root[..., None] * V, U * root[..., None, :]), min(share, 1.0)


def _singular(matrix_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, V = torch.linalg.svd(matrix_OI, full_matrices=False)
    return U, S, V


def _projected(matrix_OI: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values of the matrix within the range that random columns of it span."""
    start = torch.randn(matrix_OI.shape[-1], columns, generator=generator(0, f"{tuple(matrix_OI.shape)}"))
    basis = torch.linalg.qr(matrix_OI @ start).Q
    for _ in range(PASSES):
        basis = torch.linalg.qr(matrix_OI @ torch.linalg.qr(matrix_OI.mT @ basis).Q).Q
    U, S, V = _singular(basis.mT @ matrix_OI)
    return basis @ U, S, V
