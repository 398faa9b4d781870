"""The operators of `ops.py` on CUDA tensors: Triton for GGUF blocks and int8, bitsandbytes' kernels for NF4.

Unpacked bits are those on the CPU. A product here is that of unpacked rows in x's dtype, as in training; cuBLAS sums in
fp32. triton and bitsandbytes are imported when the first weight needs them. Run on CPU tensors by `make proof-triton`,
with Triton's interpreter and bitsandbytes' CPU kernels; not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from lorafit.errors import ConfigError
from lorafit.kernels.nf4 import BLOCK, DYNAMIC_CODE, NESTED

PIECE = 1 << 26  # weights at a time where a product unpacks them, and below bitsandbytes' 32-bit counts
REMEDY = "pip install 'lorafit[cuda]'"


def unpack(
    data: Tensor, scales: Tensor | None, nested: Tensor | None, offset: float, format: str, columns: int,
    first_row: int, order: Tensor | None, start: int, out: Tensor,
) -> None:  # fmt: skip
    """Rows start, start + 1, ... into out, fp32 or bf16: the arguments are those of `ops.Stored`.

    Raises IndexError where `order`, or the weight, ends before; ConfigError where a package is missing. Numbers in
    `order` are not looked at, which would wait for the GPU: one outside of a weight gives NaN, or CUDA's own
    assertion with NF4.
    """
    for part in (data, scales, nested, out):
        assert part is None or part.is_contiguous(), "tensors must be contiguous"
    assert out.dtype in (torch.float32, torch.bfloat16), f"out is {out.dtype}, not fp32 or bf16"
    assert out.shape[1:] == (columns,), f"out is {tuple(out.shape)}, rows have {columns} weights"
    rows = len(data if order is None else order)
    if not 0 <= start <= rows - len(out):
        raise IndexError(f"rows {start} to {start + len(out)} are outside of the weight's {rows}")
    if order is not None:
        order, start = order[start : start + len(out)].long().contiguous(), 0
    if format != "NF4":
        try:
            from lorafit.kernels import triton_unpack
        except ImportError as error:
            raise ConfigError("cuda", f"{format} weights on a GPU need triton: {error}", REMEDY) from error
        return triton_unpack.unpack(data, scales, format, columns, order, start, out)
    assert scales is not None, "NF4 has scales"
    for begin, end in _pieces(len(out), columns):
        chosen = slice(start + begin, start + end) if order is None else order[begin:end]
        _unpack_nf4(data[chosen], nf4_scales(scales, nested, offset, first_row, chosen), out[begin:end])


def matvec(
    x: Tensor, data: Tensor, scales: Tensor | None, nested: Tensor | None, offset: float, format: str, columns: int,
    first_row: int, order: Tensor | None,
) -> Tensor:  # fmt: skip
    """x W^T (N, O) in x's dtype, fp32 or bf16, which W is unpacked to, some rows at a time."""
    rows = len(data if order is None else order)
    y = x.new_empty(len(x), rows)
    for start, stop in _pieces(rows, columns):
        part = x.new_empty(stop - start, columns)
        unpack(data, scales, nested, offset, format, columns, first_row, order, start, part)
        torch.mm(x, part.T, out=y[:, start:stop])
    return y


def nf4_scales(scales: Tensor, nested: Tensor | None, offset: float, first_row: int, rows: slice | Tensor) -> Tensor:
    """fp32 scales (rows, I / 64) of these rows; `first_row` is row 0's place in the matrix that `nested` counts in.

    bitsandbytes' QuantState counts nested blocks from its own first scale, so rows from the middle of one need this.
    """
    chosen = scales[rows]
    if nested is None:
        return chosen
    numbers = torch.arange(rows.start, rows.stop, device=scales.device) if isinstance(rows, slice) else rows
    per_row = scales.shape[1]
    flat = (first_row + numbers)[:, None] * per_row + torch.arange(per_row, device=scales.device)
    return _dynamic_code(scales.device)[chosen.int()] * nested[flat // NESTED] + offset


def _unpack_nf4(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    try:
        from bitsandbytes.functional import QuantState, dequantize_4bit
    except ImportError as error:
        raise ConfigError("cuda", f"NF4 weights on a GPU need bitsandbytes: {error}", REMEDY) from error
    state = QuantState(absmax.flatten(), shape=out.shape, blocksize=BLOCK, quant_type="nf4", dtype=out.dtype)
    values = dequantize_4bit(codes.reshape(-1, 1), state, out=out if out.is_cuda else None)  # on the CPU it takes none
    if values is not out:
        out.copy_(values)


@cache
def _dynamic_code(device: torch.device) -> Tensor:
    return DYNAMIC_CODE.to(device)


def _pieces(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, PIECE // columns)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))
