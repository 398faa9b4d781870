"""Cross-entropy on trained tokens only, in chunks: the logits of a batch never exist.

The caller picks the hidden states whose next token is trained. For a chunk of them the logits, the loss and the
gradient with respect to the hidden states come out of one pass; only that gradient is kept, and those of what is
trained of the head (head_update.py).
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
from lorafit.kernels.product import product
from lorafit.model.buffers import give, take
from lorafit.model.head import Head
from lorafit.training.head_update import HeadUpdate, update_of

CHUNK_BYTES = 1 << 28  # that the logits of a chunk may take, in the compute dtype
BLOCK_WEIGHTS = 1 << 23  # of the head unpacked at a time: 17 MB in bf16 stay in the cache


def token_losses(hidden_NH: Tensor, targets_N: Tensor, head: Head) -> Tensor:
    """Loss of each token in nats, (N,) fp32, differentiable in hidden_NH and in what is trained of the head.

    targets_N: (N,) int64 token ids. Raises RuntimeError when losses are weighed differently and the head is trained.
    """
    update = update_of(head, hidden_NH.dtype)
    return _ChunkedCrossEntropy.apply(hidden_NH, targets_N, head, update, *update.parameters)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, targets_N: Tensor, head: Head, update: HeadUpdate, *parameters: Tensor
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        if wanted:
            update.begin()
        most = max(1, min(head.chunk, CHUNK_BYTES // (update.width * hidden_NH.element_size())))
        size = -(-len(targets_N) // max(1, -(-len(targets_N) // most)))  # equal chunks: each reads the whole head
        losses = hidden_NH.new_empty(len(targets_N), dtype=torch.float32)
        gradient_NH = torch.empty_like(hidden_NH) if wanted else None
        for start in range(0, len(targets_N), max(1, size)):
            part = slice(start, start + size)
            losses[part], gradient = _chunk(hidden_NH[part], targets_N[part], head, update, wanted, most)
            if gradient_NH is not None and gradient is not None:
                gradient_NH[part] = gradient
        ctx.gradient_NH, ctx.update = gradient_NH, update
        return losses

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        own, ctx.update.gradients = ctx.update.gradients, []
        if own and len(grad_N):
            if not bool((grad_N == grad_N[0]).all()):
                raise RuntimeError("a trained head needs losses that all weigh the same")
            own = [gradient.mul_(grad_N[0]) for gradient in own]
        return (ctx.gradient_NH * grad_N[:, None]).to(ctx.gradient_NH.dtype), None, None, None, *own


def _chunk(
    hidden_CH: Tensor, targets_C: Tensor, head: Head, update: HeadUpdate, wanted: bool, most: int
) -> tuple[Tensor, Tensor | None]:
    """Losses (C,) and, if wanted, d loss_i / d hidden_i (C, H) of one chunk of at most `most` tokens."""
    weight = update.weight
    blocks = list(weight.blocks(BLOCK_WEIGHTS))
    logits_CV = take(len(hidden_CH), update.width, hidden_CH, most)
    for start, stop in blocks:
        product(hidden_CH, weight.block(start, stop, hidden_CH.dtype), out=logits_CV[:, start:stop])
    update.add(hidden_CH, logits_CV)
    losses_C = entropy(logits_CV, targets_C, head.multiplier, head.softcap, wanted)
    if not wanted:
        give(logits_CV)
        return losses_C, None
    gradient_CH = hidden_CH.new_zeros(hidden_CH.shape, dtype=torch.float32)
    update.backward(logits_CV, hidden_CH, gradient_CH)
    for start, stop in blocks:
        gradient_CH += product(logits_CV[:, start:stop], weight.block(start, stop, hidden_CH.dtype).T)
    give(logits_CV)
    return losses_C, gradient_CH.to(hidden_CH.dtype)
