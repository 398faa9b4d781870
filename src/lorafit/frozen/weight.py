"""The contract that every format of a frozen weight keeps, and the products that follow from it.

A frozen weight is one matrix W (out_features O, in_features I) that is read and never trained. The model needs four
things of it: y = x W^T, its transpose for the backward pass, single rows (embedding), and blocks of rows in a dtype to
multiply with. Formats hold plain tensors, one row per output feature, so that slicing, permuting and sharding rows are
ordinary tensor operations.

A packed weight is unpacked into a scratch buffer just before each product, in the forward and again in the backward
pass: nothing of W is saved or kept. A block of rows in the cache costs a few per cent of its product with a few hundred
tokens. All formats multiply in the same blocks, so that a product's bits depend on W's values alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lorafit.kernels.scratch import scratch

BLOCK_WEIGHTS = 1 << 26  # unpacked at once: 134 MB in bf16, more than any layer of an 8B model


class FrozenWeight(nn.Module, ABC):
    """One frozen matrix W of shape (O, I). `format` names how it is stored, `source_format` how its file had it."""

    out_features: int
    in_features: int
    format: str
    source_format: str

    @property
    def master(self) -> nn.Parameter | None:
        """The fp32 matrix (O, I) that the optimizer changes where this weight is trained, else None."""
        return None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its tensors are."""

    @abstractmethod
    def rows(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Write rows start..stop into out (stop - start, I), fp32 or bf16; return out."""

    @abstractmethod
    def embed(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """ids (...) int64 -> the rows of W, (..., I), in dtype."""

    def block(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start..stop in dtype, to be read at once: a view of W, or the scratch buffer that is used again."""
        return self.rows(start, stop, scratch(stop - start, self.in_features, dtype, self.device))

    def blocks(self, weights: int | None = None, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
        """(start, stop) of all blocks of rows with at most this many weights each; BLOCK_WEIGHTS if not told.

        first, last: of these rows alone.
        """
        step, end = max(1, (weights or BLOCK_WEIGHTS) // self.in_features), self.out_features if last is None else last
        return ((start, min(start + step, end)) for start in range(first, end, step))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> x W^T (..., O), in x's dtype."""
        return self.product(x, 0, self.out_features)

    def product(self, x: Tensor, first: int, last: int) -> Tensor:
        """x (..., I) -> x W^T (..., last - first) with these rows of W alone, in x's dtype."""
        parts = [x @ self.block(start, stop, x.dtype).T for start, stop in self.blocks(first=first, last=last)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def backward_input(self, grad: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """grad (..., O) -> grad W (..., I): the gradient of the input, in grad's dtype, blocks summed in fp32.

        first, last: the rows of W that grad's columns belong to; all, if not told.
        """
        parts = (
            grad[..., start - first : stop - first] @ self.block(start, stop, grad.dtype)
            for start, stop in self.blocks(first=first, last=last)
        )
        total = next(parts)
        for part in parts:
            total = total.float().add_(part)
        return total.to(grad.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of this weight's tensors."""
        return sum(t.nbytes for t in (*self.parameters(), *self.buffers()))

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole matrix (O, I), unpacked; for export and tests, never in a step."""
        out = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.device)
        return self.rows(0, self.out_features, out)
