"""The operators on stored weights, as torch sees them: `torch.ops.lorafit.*`, with fakes; here on the CPU.

Autograd, planning under FakeTensor and compilation meet ordinary operators; inside, the native library works where it
was built, and the plain twins where it was not. Both give the same bits, but for `matvec`, whose sums differ in order.

A stored weight is a few plain tensors (see `Stored`): one row of bytes for each output feature, scales beside it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lorafit.kernels import BLOCK_TYPES, cuda, native
from lorafit.kernels import nf4 as twins
from lorafit.kernels.registry import LIBRARY, TYPES, address, is_plain
from lorafit.kernels.scratch import room
from lorafit.kernels.unpack import unpack as unpack_blocks

NF4, INT8 = "NF4", "INT8"
CODES = {**{name: block.code for name, block in BLOCK_TYPES.items()}, NF4: 1000, INT8: 1001}
PIECE = 1 << 20  # weights that the plain twins unpack at a time
QUANTISED = 1 << 20  # weights that are quantised at a time: 4 MB in fp32


@dataclass(frozen=True)
class Stored:
    """A weight (O, I) as it is stored: `format` is a key of CODES and says how to read the rest."""

    format: str
    columns: int
    """I, the weights in a row."""
    data: Tensor
    """uint8 (O, bytes per row): GGUF blocks, NF4 codes (I / 2), int8 codes (I)."""
    scales: Tensor | None = None
    """NF4: (O, I / 64), fp32 or 8-bit codes. INT8: fp32 (O,). GGUF blocks hold their own."""
    nested: Tensor | None = None
    """NF4 with double quantization: second-level scales, fp32, one per 256 of the whole matrix's 8-bit codes."""
    offset: float = 0.0
    """NF4 with double quantization: what is added to each decoded scale."""
    first_row: int = 0
    """NF4: where row 0 stands in the whole matrix, when these are some rows of it."""
    order: Tensor | None = None
    """int64 (rows,): the stored row of each row of the weight; None where they are the same."""

    @cached_property
    def weight(self) -> native.Weight:
        """The C structure that points to these tensors."""
        for part in (self.data, self.scales, self.nested):
            assert part is None or part.is_contiguous(), "stored tensors must be contiguous"
        return native.Weight(
            CODES[self.format], self.nested is not None, len(self.data), self.columns, self.data.shape[1],
            self.data.data_ptr(), address(self.scales), address(self.nested), twins.DYNAMIC_CODE.data_ptr(),
            self.offset, self.first_row,
        )  # fmt: skip


def unpack(stored: Stored, start: int, out: Tensor) -> Tensor:
    """Rows start, start + 1, ... into out (rows, I), fp32 or bf16, contiguous; out comes back.

    Raises IndexError, with nothing written, for rows that the weight does not have.
    """
    if is_plain(out):
        _unpack(stored, stored.order, start, out)
    else:
        torch.ops.lorafit.unpack(*_arguments(stored), start, out)
    return out


def values(stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole weight (O, I), unpacked."""
    rows = len(stored.data if stored.order is None else stored.order)
    return unpack(stored, 0, torch.empty(rows, stored.columns, dtype=dtype, device=stored.data.device))


def unpack_rows(stored: Stored, ids_N: Tensor, out: Tensor) -> Tensor:
    """The rows of these numbers, (N,) integers, into out (N, I); out comes back. Raises IndexError as `unpack` does."""
    order = ids_N if stored.order is None else stored.order.index_select(0, ids_N)
    torch.ops.lorafit.unpack(*_arguments(stored)[:-1], order, 0, out)
    return out


def matvec(stored: Stored, x_NI: Tensor) -> Tensor:
    """x W^T (N, O) in x's dtype, fp32 or bf16, for few rows N, without unpacking W to memory; sums in fp32."""
    if is_plain(x_NI):
        return _matvec(x_NI, stored, stored.order)
    result: Tensor = torch.ops.lorafit.matvec(x_NI, *_arguments(stored))
    return result


def first_bad_row(stored: Stored) -> int | None:
    """The first stored row with a scale (or a plain float weight) that is NaN or infinite; None if all are finite."""
    found = native.library()
    if found is not None:
        row = found.lorafit_first_bad_row(ctypes.byref(stored.weight), torch.get_num_threads())
        return None if row < 0 else int(row)
    for start in range(0, len(stored.data), _step(stored)):
        finite = torch.isfinite(_plain(stored, torch.arange(start, min(start + _step(stored), len(stored.data)))))
        if not finite.all():
            return start + int((~finite.all(dim=1)).nonzero()[0])
    return None


def quantise_nf4(matrix_OI: Tensor) -> Stored:
    """NF4 with double quantization of a float matrix. Raises ValueError when it holds NaN or infinity."""
    rows, columns = matrix_OI.shape
    assert columns % twins.BLOCK == 0, f"rows of {columns} are no whole blocks of {twins.BLOCK}"
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
    absmax, found = torch.empty(rows, columns // twins.BLOCK), native.library()
    for some in _pieces(rows, columns):
        matrix = _as_fp32(matrix_OI[some])
        if found is None:
            codes[some], absmax[some] = twins.quantise_nf4(matrix)
        elif found.lorafit_quantise_nf4(
            matrix.data_ptr(), len(matrix), columns, codes[some].data_ptr(), absmax[some].data_ptr(),
            torch.get_num_threads(),
        ):  # fmt: skip
            raise ValueError("holds NaN or infinity")
    return Stored(NF4, columns, codes, *twins.quantise_scales(absmax))


def quantise_int8(matrix_OI: Tensor) -> Stored:
    """int8 codes and a scale for each row of a float matrix. Raises ValueError when it holds NaN or infinity."""
    rows, columns = matrix_OI.shape
    codes, scales, found = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows), native.library()
    for some in _pieces(rows, columns):
        matrix = _as_fp32(matrix_OI[some])
        if found is None:
            codes[some], scales[some] = twins.quantise_int8(matrix)
        elif found.lorafit_quantise_int8(
            matrix.data_ptr(), len(matrix), columns, codes[some].data_ptr(), scales[some].data_ptr(),
            torch.get_num_threads(),
        ):  # fmt: skip
            raise ValueError("holds NaN or infinity")
    return Stored(INT8, columns, codes.view(torch.uint8), scales)


def _as_fp32(rows: Tensor) -> Tensor:
    """Always in the same memory: holes between the codes of many small matrices would be as large as they."""
    size = rows.numel() * 4
    return room("quantised", size, rows.device)[:size].view(torch.float32).view(rows.shape).copy_(rows)


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    """Rows to quantise at a time: a stack of experts in fp32 would be larger than all that it is quantised for."""
    step = max(1, QUANTISED // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


_STORED = "Tensor data, Tensor? scales, Tensor? nested, float offset, str format, int columns, int first_row"
LIBRARY.define(f"unpack({_STORED}, Tensor? order, int start, Tensor(a!) out) -> ()")
LIBRARY.define(f"matvec(Tensor x, {_STORED}, Tensor? order) -> Tensor")


def _arguments(stored: Stored) -> tuple[object, ...]:
    s = stored
    return (s.data, s.scales, s.nested, s.offset, s.format, s.columns, s.first_row, s.order)


def _stored(
    data: Tensor, scales: Tensor | None, nested: Tensor | None, offset: float, format_: str, columns: int, first: int
) -> Stored:  # fmt: skip
    return Stored(format_, columns, data, scales, nested, offset, first)


def _unpack_cpu(*arguments: object) -> None:
    *stored_parts, order, start, out = arguments
    _unpack(_stored(*stored_parts), order, start, out)  # type: ignore[arg-type]


def _unpack(stored: Stored, order: Tensor | None, start: int, out: Tensor) -> None:
    assert out.is_contiguous(), "out must be contiguous"
    assert out.dtype in TYPES, f"out is {out.dtype}, not fp32 or bf16"
    assert out.shape[1:] == (stored.columns,), f"out is {tuple(out.shape)}, rows have {stored.columns} weights"
    rows = len(stored.data if order is None else order)
    if not 0 <= start <= rows - len(out):
        raise IndexError(f"rows {start} to {start + len(out)} are outside of the weight's {rows}")
    if order is not None:
        order, start = order[start : start + len(out)].long().contiguous(), 0
    found = native.library()
    if found is not None:
        fault = found.lorafit_unpack(
            ctypes.byref(stored.weight), address(order), start, len(out), out.data_ptr(), TYPES[out.dtype],
            torch.get_num_threads(),
        )  # fmt: skip
        return _accept(fault, stored)
    wanted = torch.arange(start, start + len(out)) if order is None else order
    _accept(int(((wanted < 0) | (wanted >= len(stored.data))).any()), stored)
    step = _step(stored)
    for begin in range(0, len(out), step):
        out[begin : begin + step] = _plain(stored, wanted[begin : begin + step])


def _accept(fault: int, stored: Stored) -> None:
    """What the library's answer means."""
    assert fault != 2, f"{tuple(stored.data.shape)} bytes are no {stored.format} rows of {stored.columns} weights"
    if fault:
        raise IndexError(f"a row number is outside of the {len(stored.data)} stored rows")


def _matvec_cpu(x: Tensor, *arguments: object) -> Tensor:
    *stored_parts, order = arguments
    return _matvec(x, _stored(*stored_parts), order)  # type: ignore[arg-type]


def _matvec(x: Tensor, stored: Stored, order: Tensor | None) -> Tensor:
    assert x.dtype in TYPES, f"x is {x.dtype}, not fp32 or bf16"
    assert x.shape[1:] == (stored.columns,), f"x is {tuple(x.shape)}, rows have {stored.columns} weights"
    found = native.library()
    rows = len(stored.data if order is None else order)
    if found is None:
        matrix = torch.empty(rows, stored.columns)
        _unpack(stored, order, 0, matrix)
        return (x.float() @ matrix.T).to(x.dtype)
    y = x.new_empty(len(x), rows)
    inputs, order = x.float().contiguous(), None if order is None else order.long().contiguous()
    fault = found.lorafit_matvec(
        ctypes.byref(stored.weight), address(order), rows, inputs.data_ptr(), len(x), y.data_ptr(),
        TYPES[y.dtype], torch.get_num_threads(),
    )  # fmt: skip
    _accept(fault, stored)
    return y


def _matvec_fake(x: Tensor, data: Tensor, *arguments: object) -> Tensor:
    order = arguments[-1]
    return x.new_empty(len(x), len(order if isinstance(order, Tensor) else data))


LIBRARY.impl("unpack", _unpack_cpu, "CPU")
LIBRARY.impl("matvec", _matvec_cpu, "CPU")
LIBRARY.impl("unpack", cuda.unpack, "CUDA")
LIBRARY.impl("matvec", cuda.matvec, "CUDA")
torch.library.register_fake("lorafit::unpack", lambda *arguments: None, lib=LIBRARY)
torch.library.register_fake("lorafit::matvec", _matvec_fake, lib=LIBRARY)


def _plain(stored: Stored, rows: Tensor) -> Tensor:
    """The slow, obvious way to the values of some stored rows, fp32 (rows, I)."""
    data = stored.data[rows]
    if stored.format == INT8:
        assert stored.scales is not None, "int8 has scales"
        return twins.unpack_int8(data.view(torch.int8), stored.scales[rows])
    if stored.format != NF4:
        return unpack_blocks(data, stored.format)
    assert stored.scales is not None, "NF4 has scales"
    scales = stored.scales
    if stored.nested is not None:
        per_row = scales.shape[1]
        scales = twins.unpack_scales(scales, stored.nested, stored.offset, stored.first_row * per_row)
    return twins.unpack_nf4(data, scales[rows])


def _step(stored: Stored) -> int:
    return max(1, PIECE // stored.columns)
