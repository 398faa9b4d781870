"""Layers over a frozen weight: the linear layer and the embedding, for any format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorafit.frozen.weight import FrozenWeight


class _FrozenProduct(torch.autograd.Function):
    """y = x W^T. Neither W nor x is saved: the gradient of x needs W alone, and W has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight) -> Tensor:
        ctx.weight = weight
        return weight(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.weight.backward_input(grad), None


class FrozenLinear(nn.Module):
    """y = x W^T + bias with everything frozen. x (..., in_features) -> (..., out_features)."""

    def __init__(self, weight: FrozenWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = _FrozenProduct.apply(x, self.weight) if torch.is_grad_enabled() else self.weight(x)
        return y if self.bias is None else y + self.bias


class FrozenEmbedding(nn.Module):
    """Rows of a frozen weight by token id, times `scale` (Gemma's sqrt(hidden), rounded to the dtype as Gemma does).

    ids (...) int64 -> (..., in_features) in `dtype`.
    """

    def __init__(self, weight: FrozenWeight, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__()
        self.weight, self.dtype = weight, dtype
        self.scale = torch.tensor(scale, dtype=dtype).item()

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight.embed(ids, self.dtype)
        return rows if self.scale == 1.0 else rows * self.scale
