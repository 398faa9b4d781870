"""A weight that is a plain matrix in bf16, fp16 or fp32; in full fine-tuning, fp32 and trained.

A trained matrix is its own master copy: products take it rounded to their dtype, block by block in the scratch buffer,
as they take a packed one, so that no second copy of the model exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.frozen.weight import FrozenWeight

_NAMES = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}


class DenseWeight(FrozenWeight):
    """W (O, I) as one tensor, which may lie in a mapped file; products run in the input's dtype."""

    def __init__(self, weight_OI: Tensor, source_format: str | None = None, mapped: bool = False) -> None:
        super().__init__()
        self.mapped = mapped  # whether the tensor lies in a mapped file
        self.out_features, self.in_features = weight_OI.shape
        self.format = _NAMES[str(weight_OI.dtype)]
        self.source_format = source_format or self.format.upper()
        self.matrix = nn.Parameter(weight_OI, requires_grad=False)

    @property
    def master(self) -> nn.Parameter | None:
        return self.matrix if self.matrix.requires_grad else None

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def rows(self, start: int, stop: int, out: Tensor) -> Tensor:
        return out.copy_(self.matrix[start:stop])

    def block(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.matrix[start:stop] if self.matrix.dtype == dtype else super().block(start, stop, dtype)

    def embed(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.matrix).to(dtype)
