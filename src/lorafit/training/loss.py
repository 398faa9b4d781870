"""Cross-entropy on trained tokens only, in chunks: the logits of a batch never exist.

The caller picks the hidden states whose next token is trained. For a chunk of them the logits, the loss and the
gradient with respect to the hidden states come out of one pass, since the head is frozen; only that gradient is kept.

    z = m * (h W^T)                    m: the model's logit multiplier (Granite divides, Cohere multiplies)
    z = c * tanh(z / c)                c: the model's final softcap (Gemma), if it has one
    loss_i = logsumexp(z_i) - z_i[target_i]

Source: ours; the idea of not materialising logits is Wijmans et al. 2024, "Cut Your Losses", arXiv:2411.09009.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafit.model.head import Head

CHUNK_ELEMENTS = 1 << 24  # logits alive at once: 64 MB in fp32


def token_losses(hidden_NH: Tensor, targets_N: Tensor, head: Head) -> Tensor:
    """Loss of each token in nats, (N,) fp32, differentiable in hidden_NH. targets_N: (N,) int64 token ids."""
    return _ChunkedCrossEntropy.apply(hidden_NH, targets_N, head)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, targets_N: Tensor, head: Head) -> Tensor:
        wanted = hidden_NH.requires_grad
        size = max(1, CHUNK_ELEMENTS // head.weight.out_features)
        losses = hidden_NH.new_empty(len(targets_N), dtype=torch.float32)
        gradient_NH = torch.empty_like(hidden_NH) if wanted else None
        for start in range(0, len(targets_N), size):
            part = slice(start, start + size)
            losses[part], gradient = _chunk(hidden_NH[part], targets_N[part], head, wanted)
            if gradient_NH is not None and gradient is not None:
                gradient_NH[part] = gradient
        ctx.gradient_NH = gradient_NH
        return losses

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        return (ctx.gradient_NH * grad_N[:, None]).to(ctx.gradient_NH.dtype), None, None


def _chunk(hidden_CH: Tensor, targets_C: Tensor, head: Head, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Losses (C,) and, if wanted, d loss_i / d hidden_i (C, H) of one chunk."""
    logits_CV = head.weight(hidden_CH).float()
    if head.multiplier != 1.0:
        logits_CV *= head.multiplier
    if head.softcap is not None:
        logits_CV = torch.tanh_(logits_CV.div_(head.softcap)).mul_(head.softcap)
    normalizer_C = torch.logsumexp(logits_CV, dim=-1)
    losses_C = normalizer_C - logits_CV.gather(1, targets_C[:, None])[:, 0]
    if not wanted:
        return losses_C, None
    slope_CV = None if head.softcap is None else 1 - (logits_CV / head.softcap) ** 2  # of the tanh
    grad_CV = logits_CV.sub_(normalizer_C[:, None]).exp_()  # softmax
    grad_CV[torch.arange(len(targets_C)), targets_C] -= 1
    if slope_CV is not None:
        grad_CV *= slope_CV
    if head.multiplier != 1.0:
        grad_CV *= head.multiplier
    return losses_C, head.weight.backward_input(grad_CV.to(hidden_CH.dtype))
