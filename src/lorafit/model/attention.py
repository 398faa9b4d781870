"""Attention over packed documents, as a function that transformers calls by name.

Several rows ("documents") lie one after another in one sequence, their positions restarting at 0. Each document
attends to itself alone, so that its outputs are what they would be alone, and no mask over the whole pack ever exists
(kernels/attention.py). Without `documents` each batch row is one causal document. A single query
over more keys is a step of decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from lorafit.errors import ConfigError
from lorafit.kernels.attention import Rules, attend, attend_backward

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
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document -> ((B, T, H, D), None).

    documents: bounds of the documents in the sequence, (0, end_1, ..., T); None for one document per batch row.
    sliding_window: a token sees itself and the window - 1 tokens before it. S > T only when decoding with a cache:
    T = 1, which sees the keys in its window; visible_BS (bool): which of the cache's columns a row has filled, all if
    None. s_aux (H,): gpt-oss's sinks, a score for each head that takes a share of the softmax and no value. Values may
    be narrower than keys (multi-head latent attention). Layers of Llama 4 attend within chunks of a document.
    Source: ours; the layout is transformers' attention API.
    """
    batch, heads, length, dim = query_BHTD.shape
    chunk, width = _chunk(module), value_BKSD.shape[-1]
    if length < key_BKSD.shape[2]:
        columns = key_BKSD.shape[2]
        places_B = torch.full((batch,), columns - 1) if visible_BS is None else visible_BS.sum(1) - 1
        q = _tempered(module, query_BHTD, lambda: places_B[:, None])
        if chunk is not None:
            first_B1 = columns - 1 - places_B[:, None] % chunk
            begun_BS = torch.arange(columns) >= first_B1
            visible_BS = begun_BS if visible_BS is None else visible_BS & begun_BS
        newest = _newest(q, key_BKSD, value_BKSD, scaling, sliding_window, visible_BS, s_aux)
        return newest.transpose(1, 2), None
    bounds = documents or tuple(range(0, batch * length + 1, length))
    query_BHTD = _tempered(module, query_BHTD, lambda: _places(bounds).view(batch, length))
    if chunk is not None:  # a chunk is a document of its own
        bounds = (*(n for start, end in pairwise(bounds) for n in range(start, end, chunk)), bounds[-1])
    if width < dim:
        value_BKSD = F.pad(value_BKSD, (0, dim - width))
    q, k, v = (x.transpose(1, 2).contiguous().view(batch * length, -1, dim) for x in (query_BHTD, key_BKSD, value_BKSD))
    rules = Rules(dim**-0.5 if scaling is None else scaling, sliding_window)
    out: Tensor = _WithinDocuments.apply(q, k, v, bounds, rules, None if s_aux is None else s_aux.float())
    return out.view(batch, length, heads, dim)[..., :width], None


def _chunk(module: Any) -> int | None:
    """Tokens of the chunks that this layer attends within, counted from a document's beginning; None: all of it."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    chunked = bool(kinds) and kinds[module.layer_idx] == "chunked_attention"  # type: ignore[index]
    return int(config.attention_chunk_size) if chunked else None  # type: ignore[union-attr]


def _places(bounds: tuple[int, ...]) -> Tensor:
    """Each token's place in its document."""
    return torch.cat([torch.arange(end - start) for start, end in pairwise(bounds)])


def _tempered(module: Any, query_BHTD: Tensor, places: Callable[[], Tensor]) -> Tensor:
    """Queries as Llama 4's layers without rotation scale them, by their places (B, T) in the document: transformers has
    scaled them by their places in the sequence, since such a layer hears nothing of positions."""
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query_BHTD

    def scale(place: Tensor) -> Tensor:
        return torch.log1p(torch.floor((place.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    had_T, wanted_BT = scale(torch.arange(query_BHTD.shape[2])), scale(places())
    if bool((had_T == wanted_BT).all()):
        return query_BHTD
    return query_BHTD * (wanted_BT / had_T)[:, None, :, None].to(query_BHTD.dtype)


class _WithinDocuments(torch.autograd.Function):
    """Our kernels under autograd: q (T, H, D), k and v (T, K, D) -> (T, H, D).

    A sink s (H,) fp32 has the share exp(s - lse) of each token's softmax and a value of zero, so that its gradient is
    minus the sum over tokens of this share times dO . O.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: tuple[int, ...], rules: Rules, sinks: Tensor | None
    ) -> Tensor:
        out, rules = torch.empty_like(q), replace(rules, sinks_H=sinks)
        lse = attend(q, k, v, documents, rules, out)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.documents, ctx.rules = documents, rules
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        attend_backward(grad.contiguous(), q, k, v, out, lse, ctx.documents, ctx.rules, *grads)
        of_sinks = None
        if ctx.needs_input_grad[5]:
            shares_HT = torch.exp(ctx.rules.sinks_H[:, None] - lse)
            of_sinks = -(shares_HT * (grad.float() * out).sum(-1).T).sum(1)
        return (*grads, None, None, of_sinks)


def _newest(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, visible: Tensor | None,
    sinks_H: Tensor | None,
) -> Tensor:  # fmt: skip
    """The newest token of each row over the keys so far: (B, H, 1, D). The heads that share keys are computed as the
    queries of one head, which in bf16 is five times as fast as enable_gqa."""
    if window is not None:
        k, v = k[:, :, -window:], v[:, :, -window:]
    mask = None if visible is None else visible[:, None, None, -k.shape[2] :]
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    if sinks_H is None:
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
        return out.reshape(*q.shape[:3], v.shape[3])
    scores = (grouped @ k.transpose(2, 3)).float() * (q.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    sinks = sinks_H.float().view(1, k.shape[1], -1, 1).expand(*scores.shape[:3], 1)
    shares = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    return (shares.to(v.dtype) @ v).reshape(*q.shape[:3], v.shape[3])


def check_mask(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A model's forward pre-hook: no mask is ever applied here, and padding on the right needs none, since no token
    sees those after it. Raises ConfigError for any other mask."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if not isinstance(mask, Tensor):
        return
    if mask.dim() != 2 or bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any()):
        what = "hides other tokens than those at the end of a row, which would be ignored"
        raise ConfigError("attention_mask", what, "pad on the right, or give one row at a time")


def register() -> str:
    """Make the function known to transformers; its name is what `attn_implementation` takes. Safe to repeat."""
    AttentionInterface.register(NAME, document_attention)
    return NAME
