"""The output matrix, and what a family does to its logits."""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.frozen.weight import FrozenWeight


@dataclass(frozen=True)
class Head:
    """logits = softcap(multiplier * h W^T); W (V, H) frozen. Granite scales its logits, Gemma may cap them."""

    weight: FrozenWeight
    multiplier: float = 1.0
    softcap: float | None = None
