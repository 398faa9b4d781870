"""Layers over a frozen weight: the linear layer and the embedding, for any format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorafit.frozen.weight import FrozenWeight


class _Product(torch.autograd.Function):
    """y = x W^T. W is never saved, and x only where W is trained: `master` is then what its gradient is of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight, master: Tensor | None) -> Tensor:
        ctx.weight, ctx.x = weight, None if master is None else x
        return weight(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        dx = ctx.weight.backward_input(grad) if ctx.needs_input_grad[0] else None
        if ctx.x is None:
            return dx, None, None
        return dx, None, (grad.flatten(0, -2).T @ ctx.x.flatten(0, -2)).float()


class FrozenLinear(nn.Module):
    """y = x W^T + bias, frozen unless the weight has a master. x (..., in_features) -> (..., out_features)."""

    def __init__(self, weight: FrozenWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def product(self, x: Tensor) -> Tensor:
        """x W^T, without the bias."""
        y: Tensor = _Product.apply(x, self.weight, self.weight.master) if torch.is_grad_enabled() else self.weight(x)
        return y


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
