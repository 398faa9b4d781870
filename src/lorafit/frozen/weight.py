"""The contract that every format of a frozen weight keeps.

A frozen weight is one matrix W (out_features O, in_features I) that is read and never trained. The model needs four
things of it: y = x W^T, its transpose for the backward pass, single rows (embedding), and blocks of rows unpacked into
a buffer. Formats hold plain tensors, one row per output feature, so that slicing, permuting and sharding rows are
ordinary tensor operations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class FrozenWeight(nn.Module, ABC):
    """One frozen matrix W of shape (O, I). `format` names how it is stored, `source_format` how its file had it."""

    out_features: int
    in_features: int
    format: str
    source_format: str

    @abstractmethod
    def rows(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Write rows start..stop into out (stop - start, I), any float dtype; return out."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> x W^T (..., O), in x's dtype."""

    @abstractmethod
    def backward_input(self, grad: Tensor) -> Tensor:
        """grad (..., O) -> grad W (..., I): the gradient of the input, in grad's dtype."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """ids (...) int64 -> the rows of W, (..., I)."""

    @property
    def nbytes(self) -> int:
        """Bytes of this weight's tensors."""
        return sum(t.nbytes for t in (*self.parameters(), *self.buffers()))

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole matrix (O, I), unpacked; for export and tests, never in a step."""
        return self.rows(0, self.out_features, torch.empty(self.out_features, self.in_features, dtype=dtype))
