"""LoftQ: an adapter on a 4-bit base starts as what quantising took away.

    s B A = the best of rank r of W - Q,    Q: W in NF4

The paper alternates between Q = quantise(W - s B A) and this line. We take one round, PEFT's default too: with more,
Q would be no quantisation of W but another model, which had to be kept beside the adapter. So the adapter is a plain
LoRA for the plain NF4 base. The model changes at the start: towards W.

Source: Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization", arXiv:2310.08659, algorithm 1 with T = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafit.adapter.lora import LoraAdapter
from lorafit.adapter.variants.svd import leading_pair


@torch.no_grad()
def start_loftq(adapter: LoraAdapter, original_OI: Tensor, stored_OI: Tensor, generator: torch.Generator) -> None:
    """A and B from the difference of the original matrix and its stored values, both (O, I) fp32."""
    A, B = leading_pair((original_OI - stored_OI) / adapter.scale, adapter.rank, generator)
    adapter.A.copy_(A)
    adapter.B.copy_(B)
