"""Merging: what each tensor of the base becomes when an adapter is added in, as pure functions.

    W' = W + delta(W)      for LoRA delta(W) = s B A, whatever W is; for DoRA, and for what is trained whole, of W too

A kind of adapter is known by what its layer has: an `adapter` with its factors, a `magnitude`, a `bias`, a whole
`matrix`, `rows` of some tokens.

Nothing is merged in place: the model with the adapter on it stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.adapter.attach import put_adapter
from lorafit.adapter.combine import LowRank
from lorafit.errors import AdapterError
from lorafit.frozen.linear import FrozenEmbedding

Change = Callable[[Tensor], Tensor]
"""A base tensor, fp32 -> what the adapter adds to it, fp32, of the same shape."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def changes(model: nn.Module) -> dict[str, Change]:
    """What is trained beside `model` adds to each tensor of the base that it changes, by the tensor's name.

    A stack of experts is one tensor (E, O, I), named as the layer; or (E, I, O), where its base says `transposed`. A
    tied head is named where it does not stay what the embedding becomes. Raises AdapterError for a kind of layer that
    cannot be merged.
    """
    found: dict[str, Change] = {}
    for path, layer in _beside(model):
        if isinstance(getattr(layer, "bias", None), nn.Parameter):
            found[f"{path}.bias"] = _in_place_of(layer.bias)
        if hasattr(layer, "matrix"):  # trained whole
            found[f"{path}.weight"] = _in_place_of(layer.matrix)
        elif hasattr(layer, "rows") and hasattr(layer, "ids"):  # of some tokens
            if not getattr(layer, "tied", False):
                found[f"{path}.weight"] = _rows(layer)
        elif hasattr(layer, "adapter"):
            found[_tensor(path, layer)] = _change(layer)
        elif f"{path}.bias" not in found:
            raise AdapterError(path, f"is a {type(layer).__name__}, which is not merged", "export it to peft")
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        _settle_tie(model, found)
    return found


def low_rank(model: nn.Module) -> dict[str, LowRank]:
    """What is a low-rank update and nothing else, as factors by layer, copies, the scale in B."""
    return {
        path: LowRank(*(part.clone() for part in _update(layer)))
        for path, layer in _beside(model)
        if hasattr(layer, "adapter") and not hasattr(layer, "magnitude") and not _embeds(layer)
    }


def _beside(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every layer that something is trained beside."""
    return ((path, m) for path, m in model.named_modules() if hasattr(m, "base") and hasattr(m, "enabled"))


def _tensor(path: str, layer: Any) -> str:
    return path if layer.adapter.A.ndim == 3 else f"{path}.weight"


def _embeds(layer: Any) -> bool:
    return isinstance(layer.base, (nn.Embedding, FrozenEmbedding))


def _update(layer: Any) -> LowRank:
    adapter = layer.adapter
    A, B = adapter.factors() if hasattr(adapter, "factors") else (adapter.A, adapter.B)
    return LowRank(A.detach(), B.detach() * adapter.scale)


def _change(layer: Any) -> Change:
    turned = _embeds(layer) or bool(getattr(layer.base, "transposed", False))

    def change(weight: Tensor) -> Tensor:
        update = _update(layer).dense()
        if hasattr(layer, "magnitude"):  # DoRA: m (W + s B A) / |W + s B A| by rows, arXiv:2402.09353, equation 5
            moved = weight + update
            return moved * (layer.magnitude.detach() / moved.norm(dim=1)).unsqueeze(1) - weight
        return update.mT if turned else update

    return change


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
    layers = {f"{path}.weight": layer for path, layer in _beside(model)}
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
