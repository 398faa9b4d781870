"""Attention over packed documents, as a function that transformers calls by name.

Several rows ("documents") lie one after another in one sequence, their positions restarting at 0. Each document
attends to itself alone, so that its outputs are what they would be alone: attention is computed document by document,
and no mask over the whole pack ever exists. Without `documents` each batch row is one causal document. A single query
over more keys is a step of decoding.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

NAME = "lorafit_documents"


def document_attention(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    documents: tuple[int, ...] | None = None,
    visible_BS: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document -> ((B, T, H, D), None).

    documents: bounds of the documents in the sequence, (0, end_1, ..., T); None for one document per batch row.
    sliding_window: a token sees itself and the window - 1 tokens before it. S > T only when decoding with a cache:
    T = 1, which sees the keys in its window; visible_BS (bool): which of the cache's columns a row has filled, all if
    None. Source: ours; the layout is transformers' attention API.
    """
    length = query_BHTD.shape[2]
    if length < key_BKSD.shape[2]:
        return _newest(query_BHTD, key_BKSD, value_BKSD, scaling, sliding_window, visible_BS).transpose(1, 2), None
    shared = query_BHTD.shape[1] // key_BKSD.shape[1]
    if documents is None or len(documents) == 2:
        out = _causal(query_BHTD, key_BKSD, value_BKSD, scaling, sliding_window, shared)
        return out.transpose(1, 2), None
    assert documents[-1] == length == key_BKSD.shape[2], "documents must cover the packed sequence"
    parts = [
        _causal(
            query_BHTD[:, :, start:end],
            key_BKSD[:, :, start:end],
            value_BKSD[:, :, start:end],
            scaling,
            sliding_window,
            shared,
        )
        for start, end in pairwise(documents)
    ]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1), None


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, shared: int) -> Tensor:
    """One document (or a batch of equally long ones): (B, H, T, D)."""
    length, keys = q.shape[2], k.shape[2]
    mask = None
    if length > 1 and window is not None and window < length:
        mask = _window_mask(length, window, str(q.device))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and length > 1 and length == keys, scale=scale,
        enable_gqa=shared > 1,
    )  # fmt: skip


def _newest(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, visible: Tensor | None) -> Tensor:
    """The newest token of each row over the keys so far: (B, H, 1, D). The heads that share keys are computed as the
    queries of one head, which in bf16 is five times as fast as enable_gqa."""
    if window is not None:
        k, v = k[:, :, -window:], v[:, :, -window:]
    mask = None if visible is None else visible[:, None, None, -k.shape[2] :]
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).reshape(q.shape)


@lru_cache(maxsize=64)
def _window_mask(length: int, window: int, device: str) -> Tensor:
    """(T, T) bool: True where query i may see key j, that is 0 <= i - j < window."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def register() -> str:
    """Make the function known to transformers; its name is what `attn_implementation` takes. Safe to repeat."""
    AttentionInterface.register(NAME, document_attention)
    return NAME
