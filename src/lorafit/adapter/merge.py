"""Merging: what each tensor of the base becomes when an adapter is added in, as pure functions.

    W' = W + delta(W)      for LoRA delta(W) = s B A, whatever W is; for DoRA, and for what is trained whole, of W too

Nothing is merged in place: the model with the adapter on it stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.adapter.attach import adapted, adapted_layers, put_adapter
from lorafit.adapter.combine import LowRank
from lorafit.adapter.experts import LoraStack
from lorafit.adapter.lora import BiasLinear, LoraLinear
from lorafit.adapter.variants.dora import DoraLinear
from lorafit.adapter.variants.vocabulary import LoraEmbedding, TokenEmbedding, TokenHead, WholeEmbedding, WholeLinear

Change = Callable[[Tensor], Tensor]
"""A base tensor, fp32 -> what the adapter adds to it, fp32, of the same shape."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def changes(model: nn.Module) -> dict[str, Change]:
    """What is trained beside `model` adds to each tensor of the base that it changes, by the tensor's name. Of those in
    `grown`, the tensor is to have its new rows already, whatever they hold.

    A stack of experts is one tensor (E, O, I), named as the layer; or (E, I, O), where its base says `transposed`. A
    tied head is named where it does not stay what the embedding becomes.
    """
    found: dict[str, Change] = {}
    for path, layer in adapted(model).items():
        if isinstance(layer, BiasLinear) and layer.bias is not None:
            found[f"{path}.bias"] = _in_place_of(layer.bias)
        if isinstance(layer, (WholeEmbedding, WholeLinear)):
            found[f"{path}.weight"] = _in_place_of(layer.matrix)
        elif isinstance(layer, TokenEmbedding) or (isinstance(layer, TokenHead) and not layer.tied):
            found[f"{path}.weight"] = _rows(layer)
        elif hasattr(layer, "adapter"):
            found[path if isinstance(layer, LoraStack) else f"{path}.weight"] = _change(layer)
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        _settle_tie(model, found)
    return found


def grown(model: nn.Module) -> dict[str, int]:
    """The rows that embedding and head have with the tokens that the adapter adds, where the base has fewer."""
    layers = {f"{path}.weight": layer for path, layer in adapted(model).items()}
    rows = {
        name: max(layer.ids) + 1 for name, layer in layers.items() if isinstance(layer, (TokenEmbedding, TokenHead))
    }
    return {name: count for name, count in rows.items() if count > layers[name].own}  # type: ignore[operator]


def low_rank(model: nn.Module) -> dict[str, LowRank]:
    """What is a low-rank update and nothing else, as factors by layer, copies, the scale in B."""
    return {
        path: LowRank(*(part.clone() for part in _update(layer)))
        for path, layer in adapted_layers(model)
        if not isinstance(layer, DoraLinear)
    }


def _update(layer: Any) -> LowRank:
    A, B = layer.adapter.factors()
    return LowRank(A.detach(), B.detach() * layer.adapter.scale)


def _change(layer: Any) -> Change:
    if isinstance(layer, LoraLinear):
        return layer.delta
    turned = isinstance(layer, LoraEmbedding) or getattr(layer.base, "transposed", False)
    return lambda _: _update(layer).dense().mT if turned else _update(layer).dense()


def _in_place_of(tensor: Tensor) -> Change:
    return lambda weight: tensor.detach().float() - weight


def _rows(layer: Any) -> Change:
    def change(weight: Tensor) -> Tensor:
        update = torch.zeros_like(weight)
        ids = list(layer.ids)
        update[ids] = layer.rows.detach().float() - weight[ids]
        return update

    return change


def _settle_tie(model: nn.Module, found: dict[str, Change]) -> None:
    """Of a tied model: a head trained as one with the embedding follows it; LoRA on the embedding leaves the head."""
    layers = {f"{path}.weight": layer for path, layer in adapted(model).items()}
    embedding, head = layers.get(EMBEDDING), layers.get(HEAD)
    if head is not None and getattr(head, "matrix", 0) is getattr(embedding, "matrix", 1):
        found.pop(HEAD, None)
    elif embedding is not None and hasattr(embedding, "adapter") and HEAD not in found:
        found[HEAD] = torch.zeros_like


def put_factors(model: nn.Module, factors: Mapping[str, LowRank]) -> None:
    """An adapter of these factors, by layer, on a model without one; at scale 1."""
    for layer, update in factors.items():
        adapter = put_adapter(model, layer, update.rank, float(update.rank))
        with torch.no_grad():
            adapter.A.copy_(update.A)
            adapter.B.copy_(update.B)
