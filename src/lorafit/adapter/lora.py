"""LoRA: a frozen linear layer plus a trained update of low rank.

    y = x W^T + (alpha / r) * dropout(x) A^T B^T

    x       (..., I)  input               W  (O, I)  frozen, in any format
    A       (r, I)    trained, random      B  (O, r)  trained, zero at the start: a new adapter changes nothing
    alpha/r           scale; fixed, so that r can change without a new learning rate

Only A and B learn: r * (I + O) numbers instead of I * O. They are kept in fp32 whatever the base's format, since an
update of 1e-5 is lost in a bf16 weight; the products run in x's dtype.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1; A's start
is Kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(I), 1/sqrt(I)), as in the paper's code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lorafit.adapter.dropout import PlacedDropout


class LoraAdapter(nn.Module):
    """x (..., I) -> the update (..., O). It knows nothing of the base: no format, no merged state, no name."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float, dropout: PlacedDropout) -> None:
        super().__init__()
        self.rank, self.alpha, self.scale = rank, float(alpha), alpha / rank
        self.A = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(x) @ self.A.to(x.dtype).T  # (..., r)
        return (h @ self.B.to(x.dtype).T) * self.scale  # (..., O)

    def start(self, generator: torch.Generator) -> None:
        """A to its random start, B to zero: the update is exactly 0."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.B)


class LoraLinear(nn.Module):
    """A linear layer of any kind and the adapter beside it. `enabled` False gives the base model's bits."""

    def __init__(self, base: nn.Module, adapter: LoraAdapter) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.adapter(x) if self.enabled else self.base(x)
