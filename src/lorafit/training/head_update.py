"""What is trained of the head, inside the chunked loss: what it adds to the logits, and its gradients, in place.

    LoRA     z += (h A^T s) B^T         dA = s (dz B)^T h,  dB = dz^T (h A^T s)
    rows     z[:, ids] = h R^T          dR = dz[:, ids]^T h, and the frozen head gets no gradient through them
    whole    z = h W^T                  dW = dz^T h

Gradients are summed over chunks in fp32. A token's weight in the sum is not known yet when its chunk is computed, so
all must weigh the same, as in a training step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorafit.adapter.lora import Adapted, LoraLinear
from lorafit.adapter.variants.vocabulary import TokenHead, WholeLinear
from lorafit.frozen.dense import DenseWeight
from lorafit.frozen.weight import FrozenWeight
from lorafit.kernels.product import product
from lorafit.model.head import Head

BLOCK = 4096  # rows of a whole matrix whose gradient is computed at a time


class HeadUpdate:
    """Nothing: a frozen head. `weight` is what the logits come from, `width` their number, `gradients` are those of
    `parameters`."""

    def __init__(self, weight: FrozenWeight, parameters: list[nn.Parameter]) -> None:
        self.weight, self.parameters, self.width = weight, parameters, weight.out_features
        self.gradients: list[Tensor] = []

    def begin(self) -> None:
        """Gradients to zero."""
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]

    def add(self, hidden_CH: Tensor, logits_CV: Tensor) -> None:
        """Change the frozen head's logits to the trained one's."""

    def backward(self, dz_CV: Tensor, hidden_CH: Tensor, gradient_CH: Tensor) -> None:
        """Take up the gradients of a chunk; gradient_CH, of the hidden states, gets what does not come from W."""


class LowRankUpdate(HeadUpdate):
    """LoRA on the head."""

    def __init__(self, weight: FrozenWeight, layer: LoraLinear, dtype: torch.dtype) -> None:
        adapter = layer.adapter
        super().__init__(weight, [adapter.A, adapter.B])
        self.scale = adapter.scale
        self.A, self.B = (adapter.A.detach() * adapter.scale).to(dtype), adapter.B.detach().to(dtype)

    def add(self, hidden_CH: Tensor, logits_CV: Tensor) -> None:
        logits_CV.addmm_(product(hidden_CH, self.A), self.B.T)

    def backward(self, dz_CV: Tensor, hidden_CH: Tensor, gradient_CH: Tensor) -> None:
        low_CR, d_low_CR = product(hidden_CH, self.A), product(dz_CV, self.B.T)
        self.gradients[0].add_(product(d_low_CR.T, hidden_CH.T).float(), alpha=self.scale)
        self.gradients[1].add_(product(low_CR.T, dz_CV.T).T)
        gradient_CH += d_low_CR @ self.A


class RowsUpdate(HeadUpdate):
    """Trained rows of some tokens."""

    def __init__(self, weight: FrozenWeight, layer: TokenHead, dtype: torch.dtype) -> None:
        super().__init__(weight, [layer.rows] if layer.enabled else [])
        self.index, rows = layer.replaced()
        self.rows, self.width = rows.detach().to(dtype), layer.width

    def add(self, hidden_CH: Tensor, logits_CV: Tensor) -> None:
        logits_CV[:, self.index] = hidden_CH @ self.rows.T

    def backward(self, dz_CV: Tensor, hidden_CH: Tensor, gradient_CH: Tensor) -> None:
        own = dz_CV[:, self.index]
        if self.gradients:
            self.gradients[0].add_(own.T @ hidden_CH)
        gradient_CH += own @ self.rows
        dz_CV[:, self.index] = 0


class WholeUpdate(HeadUpdate):
    """A head that is trained whole, beside the base's or as the base's own."""

    def __init__(self, weight: FrozenWeight, matrix: nn.Parameter) -> None:
        super().__init__(weight, [matrix])

    def backward(self, dz_CV: Tensor, hidden_CH: Tensor, gradient_CH: Tensor) -> None:
        for start in range(0, dz_CV.shape[1], BLOCK):
            rows = slice(start, start + BLOCK)
            self.gradients[0][rows] += product(hidden_CH.T, dz_CV[:, rows].T).T


def update_of(head: Head, dtype: torch.dtype) -> HeadUpdate:
    """What is trained of `head`, ready for products in `dtype`."""
    layer: Adapted | None = head.adapted
    if isinstance(layer, LoraLinear):
        return LowRankUpdate(head.weight, layer, dtype)
    if isinstance(layer, TokenHead):
        return RowsUpdate(head.weight, layer, dtype)
    if isinstance(layer, WholeLinear):
        return WholeUpdate(DenseWeight(layer.matrix.detach()), layer.matrix)
    if head.weight.master is not None:  # full fine-tuning
        return WholeUpdate(head.weight, head.weight.master)
    return HeadUpdate(head.weight, [])
