"""The slow, obvious way to the parts of a layer and of the loss: what the native kernels are compared with, and what
runs where they are not. fp32 inside (fp64 for fp64); autograd gives the backward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def wide(x: Tensor) -> Tensor:
    """x in fp32, unless it is wider."""
    return x if x.dtype == torch.float64 else x.float()


def gradients(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """d sum(function(*inputs) * grad) / d inputs, in fp32."""
    with torch.enable_grad():
        leaves = [wide(x.detach()).requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, wide(grad))


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension. Source: Zhang & Sennrich 2019, arXiv:1910.07467, equation 4."""
    x = wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x_THD: Tensor, cos_TP: Tensor | None, sin_TP: Tensor | None) -> Tensor:
    """Rotary embedding of pairs (i, i + D / 2). Source: Su et al. 2021, arXiv:2104.09864; the pairs are GPT-NeoX's."""
    x = wide(x_THD)
    if cos_TP is None or sin_TP is None:
        return x
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos_TP[:, None], sin_TP[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def heads(x_THD: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Heads normed (with a weight), then rotated (with angles)."""
    return rotate(x_THD if weight is None else norm(x_THD, weight, eps), cos, sin)


def gate(gate_TI: Tensor, up_TI: Tensor, activation: str) -> Tensor:
    """act(gate) * up: SwiGLU and GeGLU. Source: Shazeer 2020, arXiv:2002.05202."""
    return ACTIVATIONS[activation](wide(gate_TI)) * wide(up_TI)


def attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    documents: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention within documents, all scores at once -> output (T, H, D), logsumexp of the scores (H, T)."""
    shared = q_THD.shape[1] // k_TKD.shape[1]
    q = wide(q_THD).transpose(0, 1)
    k, v = (wide(x).repeat_interleave(shared, dim=1).transpose(0, 1) for x in (k_TKD, v_TKD))
    outs, sums = [], []
    for start, end in pairwise(documents):
        scores = q[:, start:end] @ k[:, start:end].mT * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(end - start, device=q.device)[:, None] - torch.arange(end - start, device=q.device)
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        scores = scores.masked_fill(hidden, float("-inf"))
        all_scores = scores if sinks_H is None else torch.cat([scores, _column(sinks_H, scores)], dim=-1)
        sums.append(torch.logsumexp(all_scores, dim=-1))
        outs.append(torch.exp(scores - sums[-1][..., None]) @ v[:, start:end])
    return torch.cat(outs, dim=1).transpose(0, 1), torch.cat(sums, dim=1)


def _column(sinks_H: Tensor, scores_HTT: Tensor) -> Tensor:
    return sinks_H.to(scores_HTT.dtype)[:, None, None].expand(-1, scores_HTT.shape[1], 1)


def entropy(logits_NV: Tensor, targets_N: Tensor, multiplier: float, softcap: float | None) -> Tensor:
    """Cross-entropy (N,) of softcap * tanh(multiplier * logits / softcap)."""
    z = wide(logits_NV) * multiplier
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return torch.logsumexp(z, dim=-1) - z.gather(1, targets_N[:, None])[:, 0]
