"""How far training moved each layer: the size of its update, alone and beside its frozen weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lorafit.adapter.attach import adapted_layers
from lorafit.adapter.lora import LoraAdapter
from lorafit.frozen.weight import FrozenWeight


@torch.no_grad()
def movement(model: nn.Module) -> list[dict[str, Any]]:
    """Of each adapted layer its path, `norm` |alpha/r B A| and `relative`, that over |W|; Frobenius norms.

    relative is None where the base layer is no frozen weight of ours. Empty where no layer has an adapter.
    """
    found = []
    for path, layer in adapted_layers(model):
        weight, norm = getattr(layer.base, "weight", None), update_norm(layer.adapter)
        whole = weight_norm(weight) if isinstance(weight, FrozenWeight) else 0.0
        found.append({"layer": path, "norm": norm, "relative": norm / whole if whole else None})
    return found


def update_norm(adapter: LoraAdapter) -> float:
    """|alpha/r B A| without forming the product: |B A|^2 = sum((B^T B) * (A A^T)), r x r."""
    a, b = adapter.A.double(), adapter.B.double()
    return adapter.scale * math.sqrt(max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum())))


def weight_norm(weight: FrozenWeight) -> float:
    """|W| of a frozen weight, unpacked block by block."""
    squares = 0.0
    for start, stop in weight.blocks(1 << 22):
        rows = torch.empty(stop - start, weight.in_features, device=weight.device)
        squares += float(weight.rows(start, stop, rows).square().sum(dtype=torch.float64))
    return math.sqrt(squares)
