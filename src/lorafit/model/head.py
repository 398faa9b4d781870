"""The output matrix, what a family does to its logits, what is trained of it, and the model without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lorafit.adapter.lora import Adapted
from lorafit.adapter.variants.vocabulary import TokenHead
from lorafit.frozen.weight import FrozenWeight


@dataclass(frozen=True)
class Head:
    """logits = softcap(multiplier * h W^T); W (V, H) frozen. Granite scales its logits, Gemma may cap them."""

    weight: FrozenWeight
    multiplier: float = 1.0
    softcap: float | None = None
    chunk: int = 512
    """Tokens whose logits are alive at once: so many that unpacking W is a few per cent of its product."""
    model: nn.Module | None = None
    """Whose head it is, for what may be trained there; None: nothing is."""

    @property
    def adapted(self) -> Adapted | None:
        """The adapted layer that the model has for its head now, if it counts."""
        layer = getattr(self.model, "lm_head", None)
        counts = isinstance(layer, TokenHead) or (isinstance(layer, Adapted) and layer.enabled)
        return layer if counts else None


def decoder_of(model: nn.Module) -> Any:
    """The model that gives the last hidden states: it has `layers` and `norm`."""
    found: Any = model.get_decoder()  # type: ignore[operator]
    return found if hasattr(found, "layers") else found.model  # Llama 4's names itself
