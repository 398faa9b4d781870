"""How far training moved each layer: the size of its update, alone and beside its frozen weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.adapter.attach import adapted_layers
from lorafit.frozen.weight import FrozenWeight
from lorafit.model.paging import drop


@torch.no_grad()
def movement(model: nn.Module) -> list[dict[str, Any]]:
    """Of each adapted layer its path, `norm` |alpha/r B A| and `relative`, that over |W|; Frobenius norms, of all
    experts together where a layer has several. relative is None for a weight of zeros. Empty without adapters."""
    found = []
    for path, layer in adapted_layers(model):
        norm, whole = update_norm(layer.adapter), weight_norm(layer.base)
        drop(layer.base, getattr(model, "paged_from", None))
        found.append({"layer": path, "norm": norm, "relative": norm / whole if whole else None})
    return found


def update_norm(adapter: Any) -> float:
    """|alpha/r B A| without forming the product: |B A|^2 = sum((B^T B) * (A A^T)). A (.., r, I), B (.., O, r)."""
    a, b = (factor.double() for factor in adapter.factors())
    return float(adapter.scale) * math.sqrt(max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum())))


def weight_norm(base: nn.Module) -> float:
    """|W| of a layer: its frozen weights, unpacked block by block, or its `weight`."""
    frozen = [module for module in base.modules() if isinstance(module, FrozenWeight)]
    if not frozen:
        weight = getattr(base, "weight", None)
        return float(weight.double().norm()) if isinstance(weight, Tensor) else 0.0
    return math.sqrt(sum(map(_squares, frozen)))


def _squares(weight: FrozenWeight) -> float:
    total = 0.0
    for start, stop in weight.blocks(1 << 22):
        rows = torch.empty(stop - start, weight.in_features, device=weight.device)
        total += float(weight.rows(start, stop, rows).square().sum(dtype=torch.float64))
    return total
