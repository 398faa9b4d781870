"""Merging: what each tensor of the base becomes when an adapter is added in, as pure functions.

    W' = W + delta(W)      for LoRA delta(W) = s B A, whatever W is; other kinds may depend on W

Nothing is merged in place: the model with the adapter on it stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.adapter.attach import adapted_layers, put_adapter
from lorafit.adapter.combine import LowRank

Change = Callable[[Tensor], Tensor]
"""A base tensor, fp32 -> what the adapter adds to it, fp32, of the same shape."""


def changes(model: nn.Module) -> dict[str, Change]:
    """What the adapter on `model` adds to each tensor of the base that it changes, by the tensor's name.

    A stack of experts is one tensor (E, O, I), named as the layer; or (E, I, O), where its base says `transposed`.
    """
    return {_tensor(path, layer): _change(layer) for path, layer in adapted_layers(model)}


def low_rank(model: nn.Module) -> dict[str, LowRank]:
    """The adapter on `model` as factors by layer, copies, the scale in B."""
    return {path: LowRank(*(part.clone() for part in _update(layer))) for path, layer in adapted_layers(model)}


def _tensor(path: str, layer: Any) -> str:
    return path if layer.adapter.A.ndim == 3 else f"{path}.weight"


def _update(layer: Any) -> LowRank:
    adapter = layer.adapter
    return LowRank(adapter.A.detach(), adapter.B.detach() * adapter.scale)


def _change(layer: Any) -> Change:
    turned = bool(getattr(layer.base, "transposed", False))

    def change(weight: Tensor) -> Tensor:
        update = _update(layer).dense()
        return update.mT if turned else update

    return change


def put_factors(model: nn.Module, factors: Mapping[str, LowRank]) -> None:
    """An adapter of these factors, by layer, on a model without one; at scale 1."""
    for layer, update in factors.items():
        adapter = put_adapter(model, layer, update.rank, float(update.rank))
        with torch.no_grad():
            adapter.A.copy_(update.A)
            adapter.B.copy_(update.B)
