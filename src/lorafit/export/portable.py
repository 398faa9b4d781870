"""One scale and one rank for all layers, plain layer names: the part of PEFT's layout that every program reads alike.

vLLM knows one alpha / r, SGLang ignores use_rslora, llama.cpp's converter ignores alpha_pattern. So scales go into B,
alpha is the rank, lower ranks are filled up with zeros, and so are layers of the same name that have no update, which
lets target_modules be plain names.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lorafit.adapter.attach import linear_layers
from lorafit.adapter.combine import LowRank, padded
from lorafit.export.opened import Opened


def portable(opened: Opened, updates: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The updates with one rank, at scale 1, for every layer whose name one of them has."""
    rank = max(update.rank for update in updates.values())
    names = {layer.rsplit(".", 1)[-1] for layer in updates}
    found: dict[str, LowRank] = {}
    found |= {layer: padded(update, rank) for layer, update in updates.items() if update.A.ndim == 3}  # experts
    for layer, module in linear_layers(opened.model).items():
        if layer in updates:
            found[layer] = padded(updates[layer], rank)
        elif layer.rsplit(".", 1)[-1] in names:
            sizes: tuple[int, int] = (int(module.in_features), int(module.out_features))  # type: ignore[arg-type]
            found[layer] = LowRank(torch.zeros(rank, sizes[0]), torch.zeros(sizes[1], rank))
    return found
