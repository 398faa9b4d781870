"""The output matrix, what a family does to its logits, and the model without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lorafit.frozen.weight import FrozenWeight


@dataclass(frozen=True)
class Head:
    """logits = softcap(multiplier * h W^T); W (V, H) frozen. Granite scales its logits, Gemma may cap them."""

    weight: FrozenWeight
    multiplier: float = 1.0
    softcap: float | None = None
    chunk: int = 512
    """Tokens whose logits are alive at once: so many that unpacking W is a few per cent of its product."""


def decoder_of(model: nn.Module) -> Any:
    """The model that gives the last hidden states: it has `layers` and `norm`."""
    found: Any = model.get_decoder()  # type: ignore[operator]
    return found if hasattr(found, "layers") else found.model  # Llama 4's names itself
