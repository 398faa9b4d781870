"""Frozen weights that stay as they are stored: GGUF blocks in the mapped file, NF4, int8.

The tensors are the file's own bytes or what quantising gave; a value exists only in the scratch buffer, just before a
product, or in a register, when few tokens are decoded. Sources: ggml's block formats; Dettmers et al. 2023, "QLoRA",
arXiv:2305.14314, for NF4 and double quantization, in 4.127 bits per weight; int8 with a scale per row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.frozen.weight import FrozenWeight
from lorafit.kernels import ops
from lorafit.kernels.ops import Stored

FEW = 8  # tokens up to which multiplying in registers beats unpacking to memory


class PackedWeight(FrozenWeight):
    """W (O, I) in the format of `stored`; its tensors become the module's, none of them trainable."""

    data: Tensor
    scales: Tensor | None
    nested: Tensor | None
    order: Tensor | None

    def __init__(self, stored: Stored, source_format: str | None = None) -> None:
        super().__init__()
        self.out_features = len(stored.data if stored.order is None else stored.order)
        self.in_features = stored.columns
        self.format = stored.format
        self.source_format = source_format or stored.format
        self.offset, self.first_row = stored.offset, stored.first_row
        self._stored: Stored | None = None
        self.data = nn.Parameter(stored.data, requires_grad=False)
        self._scales_dtype = torch.uint8 if stored.scales is None else stored.scales.dtype
        for name in ("scales", "nested"):
            part = getattr(stored, name)
            self.register_parameter(name, None if part is None else nn.Parameter(_as_bytes(part), requires_grad=False))
        self.register_buffer("order", stored.order, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def _apply(self, *arguments: Any, **named: Any) -> Any:
        self._stored = None  # what moves a module's tensors comes through here
        return super()._apply(*arguments, **named)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stored": None}  # a copy's tensors lie elsewhere

    @property
    def stored(self) -> Stored:
        """The tensors as the operators take them."""
        if self._stored is None or self._stored.data is not self.data:
            self._stored = self._view()
        return self._stored

    def _view(self) -> Stored:
        scales = None if self.scales is None else self.scales.view(self._scales_dtype)
        if self.format == ops.INT8 and scales is not None:
            scales = scales.view(-1)
        nested = None if self.nested is None else self.nested.view(torch.float32).view(-1)
        return Stored(
            self.format, self.in_features, self.data, scales, nested, self.offset, self.first_row, self.order
        )  # fmt: skip

    def part(self, start: int, stop: int) -> PackedWeight:
        """Rows start..stop as a weight of its own over the same memory: one shard."""
        return PackedWeight(self._slice(start, stop), self.source_format)

    def _slice(self, start: int, stop: int) -> Stored:
        """Rows start..stop as they are stored."""
        stored = self.stored
        if stored.order is not None:
            return replace(stored, order=stored.order[start:stop])
        scales = None if stored.scales is None else stored.scales[start:stop]
        return replace(stored, data=stored.data[start:stop], scales=scales, first_row=stored.first_row + start)

    def rows(self, start: int, stop: int, out: Tensor) -> Tensor:
        return ops.unpack(self.stored, start, out[: stop - start])

    def product(self, x: Tensor, first: int, last: int) -> Tensor:
        if x.numel() <= FEW * self.in_features:
            rows = self.stored if last - first == self.out_features else self._slice(first, last)
            y = ops.matvec(rows, x.reshape(-1, self.in_features))
            return y.view(*x.shape[:-1], last - first)
        return super().product(x, first, last)

    def embed(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty(ids.numel(), self.in_features, dtype=dtype, device=self.device)
        return ops.unpack_rows(self.stored, ids.reshape(-1), out).view(*ids.shape, self.in_features)


def _as_bytes(part: Tensor) -> Tensor:
    """Scales as bytes, a row for each of theirs: casting a model to another dtype must not round them."""
    return part if part.dtype == torch.uint8 else part.view(len(part), *part.shape[1:] or (1,)).view(torch.uint8)


def quantise(matrix_OI: Tensor, format: str) -> PackedWeight | None:
    """A matrix in `nf4` (double-quantised) or `int8`; None where its rows do not divide into the format's blocks.

    matrix_OI: (O, I) in any float dtype. Raises ValueError when it holds NaN or infinity.
    """
    if format == "int8":
        return PackedWeight(ops.quantise_int8(matrix_OI))
    assert format == "nf4", f"no format {format}"
    return PackedWeight(ops.quantise_nf4(matrix_OI)) if matrix_OI.shape[1] % 64 == 0 else None
