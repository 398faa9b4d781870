"""Cross-entropy on trained tokens only, in chunks: the logits of a batch never exist.

The caller picks the hidden states whose next token is trained. For a chunk of them the logits, the loss and the
gradient with respect to the hidden states come out of one pass; only that gradient is kept, and the head's own where
it is trained (fp32, the size of its matrix; the losses must then all weigh the same).
The head's matrix, dense or packed, is multiplied in blocks of the vocabulary, unpacked just before and never whole.

    z = m * (h W^T)                    m: the model's logit multiplier (Granite divides, Cohere multiplies)
    z = c * tanh(z / c)                c: the model's final softcap (Gemma), if it has one
    loss_i = logsumexp(z_i) - z_i[target_i]

Source: ours; the idea of not materialising logits is Wijmans et al. 2024, "Cut Your Losses", arXiv:2411.09009.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafit.kernels.layer import entropy
from lorafit.model.buffers import give, take
from lorafit.model.head import Head

CHUNK_BYTES = 1 << 28  # that the logits of a chunk may take, in the compute dtype
BLOCK_WEIGHTS = 1 << 23  # of the head unpacked at a time: 17 MB in bf16 stay in the cache


def token_losses(hidden_NH: Tensor, targets_N: Tensor, head: Head) -> Tensor:
    """Loss of each token in nats, (N,) fp32, differentiable in hidden_NH. targets_N: (N,) int64 token ids."""
    return _ChunkedCrossEntropy.apply(hidden_NH, targets_N, head, head.weight.master)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, targets_N: Tensor, head: Head, master: Tensor | None) -> Tensor:
        wanted = hidden_NH.requires_grad
        of_head_VH = None if master is None or not wanted else torch.zeros_like(master)
        most = max(1, min(head.chunk, CHUNK_BYTES // (head.weight.out_features * hidden_NH.element_size())))
        size = -(-len(targets_N) // max(1, -(-len(targets_N) // most)))  # equal chunks: each reads the whole head
        losses = hidden_NH.new_empty(len(targets_N), dtype=torch.float32)
        gradient_NH = torch.empty_like(hidden_NH) if wanted else None
        for start in range(0, len(targets_N), max(1, size)):
            part = slice(start, start + size)
            losses[part], gradient = _chunk(hidden_NH[part], targets_N[part], head, wanted, most, of_head_VH)
            if gradient_NH is not None and gradient is not None:
                gradient_NH[part] = gradient
        ctx.gradient_NH, ctx.of_head_VH = gradient_NH, of_head_VH
        return losses

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        of_head_VH, ctx.of_head_VH = ctx.of_head_VH, None
        if of_head_VH is not None and len(grad_N):
            if not bool((grad_N == grad_N[0]).all()):
                raise RuntimeError("a trained head needs losses that all weigh the same")
            of_head_VH.mul_(grad_N[0])
        return (ctx.gradient_NH * grad_N[:, None]).to(ctx.gradient_NH.dtype), None, None, of_head_VH


def _chunk(
    hidden_CH: Tensor, targets_C: Tensor, head: Head, wanted: bool, most: int, of_head_VH: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Losses (C,) and, if wanted, d loss_i / d hidden_i (C, H) of one chunk of at most `most` tokens.

    of_head_VH: the sum over tokens of d loss_i / d W is added to it.
    """
    weight = head.weight
    blocks = list(weight.blocks(BLOCK_WEIGHTS))
    logits_CV = take(len(hidden_CH), weight.out_features, hidden_CH, most)
    for start, stop in blocks:
        torch.mm(hidden_CH, weight.block(start, stop, hidden_CH.dtype).T, out=logits_CV[:, start:stop])
    losses_C = entropy(logits_CV, targets_C, head.multiplier, head.softcap, wanted)
    if not wanted:
        give(logits_CV)
        return losses_C, None
    gradient_CH = hidden_CH.new_zeros(hidden_CH.shape, dtype=torch.float32)
    for start, stop in blocks:
        gradient_CH += logits_CV[:, start:stop] @ weight.block(start, stop, hidden_CH.dtype)
        if of_head_VH is not None:
            of_head_VH[start:stop] += logits_CV[:, start:stop].T @ hidden_CH
    give(logits_CV)
    return losses_C, gradient_CH.to(hidden_CH.dtype)
