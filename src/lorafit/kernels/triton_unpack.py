# mypy: allow-untyped-defs
"""Packed rows to fp32 or bf16 on a GPU: one Triton kernel, and for each format how to find the value of one weight.

The bits are those of `unpack.py`, whose layouts these are: an integer code, one multiplication by the scale, one
addition. A compiler that fuses the last two rounds once instead of twice, so every launch says that it must not
(OPTIONS; Triton 3.6 did not listen on RTX 50, hence 3.7). All loads are of single bytes: blocks of 18 or 210 bytes
begin at any even address. Run in Triton's interpreter and compiled for NVIDIA's architectures by `make proof-triton`;
not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafit.kernels import BLOCK_TYPES
from lorafit.kernels.unpack import IQ4_VALUES, MXFP4_VALUES

TILE = 1024  # neighbouring weights of a row in one program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def _packed(values: list[int]) -> int:
    """Eight signed bytes as one integer, the first lowest."""
    return int.from_bytes(bytes(value & 255 for value in values), "little")


IQ4_LOW, IQ4_HIGH = (tl.constexpr(_packed(half.int().tolist())) for half in IQ4_VALUES.split(8))
MXFP4_LOW, MXFP4_HIGH = (tl.constexpr(_packed(half.int().tolist())) for half in MXFP4_VALUES.split(8))


@triton.jit(do_not_specialize=["start", "rows"])
def _unpack(data, scales, order, out, start, rows, columns, row_bytes, VALUE: tl.constexpr, ELEMENTS: tl.constexpr,
            BYTES: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """A tile of one row of out. A row that `order` names and the weight (`rows`) has not is NaN: nothing can raise."""
    place = tl.program_id(0).to(tl.int64)
    wanted = start + place if order is None else tl.load(order + place)
    row = tl.minimum(tl.maximum(wanted, 0), rows - 1)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = tl.minimum(column, columns - 1)  # so that no load needs a mask
    value = VALUE(data + row * row_bytes + inside // ELEMENTS * BYTES, inside % ELEMENTS)
    if scales is not None:
        value *= tl.load(scales + row)
    value = tl.where(row == wanted, value, float("nan"))
    if out.dtype.element_ty == tl.bfloat16:
        value = _bfloat16(value)
    tl.store(out + place * columns + column, value, mask=column < columns)


@triton.jit
def _bfloat16(value):
    """To nearest, ties to even, by integers: the interpreter's own cast cuts off, and older GPUs have none."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = tl.where(value == value, bits + 0x7FFF + (bits >> 16 & 1) >> 16, 0x7FC0)
    return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _byte(at):
    return tl.load(at).to(tl.int32)


@triton.jit
def _bits(at, shift, WIDTH: tl.constexpr):
    """The bits shift, shift + 1, ... of a byte."""
    return _byte(at) >> shift & (1 << WIDTH) - 1


@triton.jit
def _signed(at):
    return tl.load(at).to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _half(at):
    return (_byte(at) | _byte(at + 1) << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _looked_up(code, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The signed byte of this number among sixteen."""
    low, high = tl.full(code.shape, LOW, tl.uint64), tl.full(code.shape, HIGH, tl.uint64)
    eight = tl.where(code < 8, low, high) >> ((code & 7) * 8).to(tl.uint64)
    return eight.to(tl.int8).to(tl.float32)


@triton.jit
def _f32(block, e):
    bits = _byte(block) | _byte(block + 1) << 8 | _byte(block + 2) << 16 | _byte(block + 3) << 24
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _f16(block, e):
    return _half(block)


@triton.jit
def _bf16(block, e):
    return (_byte(block) << 16 | _byte(block + 1) << 24).to(tl.float32, bitcast=True)


@triton.jit
def _int8(block, e):
    return _signed(block)


@triton.jit
def _q4_0(block, e):
    code = _bits(block + 2 + e % 16, e // 16 * 4, 4)
    return (code - 8).to(tl.float32) * _half(block)


@triton.jit
def _q4_1(block, e):
    code = _bits(block + 4 + e % 16, e // 16 * 4, 4)
    return code.to(tl.float32) * _half(block) + _half(block + 2)


@triton.jit
def _q5_0(block, e):
    code = _bits(block + 6 + e % 16, e // 16 * 4, 4) | _bits(block + 2 + e // 8, e % 8, 1) << 4
    return (code - 16).to(tl.float32) * _half(block)


@triton.jit
def _q5_1(block, e):
    code = _bits(block + 8 + e % 16, e // 16 * 4, 4) | _bits(block + 4 + e // 8, e % 8, 1) << 4
    return code.to(tl.float32) * _half(block) + _half(block + 2)


@triton.jit
def _q8_0(block, e):
    return _signed(block + 2 + e) * _half(block)


@triton.jit
def _q2_k(block, e):
    code = _bits(block + 16 + e // 128 * 32 + e % 32, e // 32 % 4 * 2, 2)
    both = _byte(block + e // 16)
    scale, minimum = (both & 15).to(tl.float32), (both >> 4).to(tl.float32)
    return code.to(tl.float32) * (_half(block + 80) * scale) - _half(block + 82) * minimum


@triton.jit
def _q3_k(block, e):
    code = _bits(block + 32 + e // 128 * 32 + e % 32, e // 32 % 4 * 2, 2) | _bits(block + e % 32, e // 32, 1) << 2
    sub = e // 16
    scale = _bits(block + 96 + sub % 8, sub // 8 * 4, 4) | _bits(block + 104 + sub % 4, sub // 4 * 2, 2) << 4
    return (code - 4).to(tl.float32) * (_half(block + 108) * (scale - 32).to(tl.float32))


@triton.jit
def _scaled_by_six_bits(block, code, sub):
    """Q4_K and Q5_K: d, dmin, and in bytes 4 to 15 eight scales and eight minima."""
    first, second, mixed = _byte(block + 4 + sub % 4), _byte(block + 8 + sub % 4), _byte(block + 12 + sub % 4)
    scale = tl.where(sub < 4, first & 63, mixed & 15 | first >> 6 << 4).to(tl.float32)
    minimum = tl.where(sub < 4, second & 63, mixed >> 4 | second >> 6 << 4).to(tl.float32)
    return code.to(tl.float32) * (_half(block) * scale) - _half(block + 2) * minimum


@triton.jit
def _q4_k(block, e):
    code = _bits(block + 16 + e // 64 * 32 + e % 32, e // 32 % 2 * 4, 4)
    return _scaled_by_six_bits(block, code, e // 32)


@triton.jit
def _q5_k(block, e):
    code = _bits(block + 48 + e // 64 * 32 + e % 32, e // 32 % 2 * 4, 4) | _bits(block + 16 + e % 32, e // 32, 1) << 4
    return _scaled_by_six_bits(block, code, e // 32)


@triton.jit
def _q6_k(block, e):
    low = _bits(block + e // 128 * 64 + e % 64, e // 64 % 2 * 4, 4)
    high = _bits(block + 128 + e // 128 * 32 + e % 32, e // 32 % 4 * 2, 2)
    return ((low | high << 4) - 32).to(tl.float32) * (_half(block + 208) * _signed(block + 192 + e // 16))


@triton.jit
def _iq4_nl(block, e):
    return _looked_up(_bits(block + 2 + e % 16, e // 16 * 4, 4), IQ4_LOW, IQ4_HIGH) * _half(block)


@triton.jit
def _iq4_xs(block, e):
    code = _bits(block + 8 + e // 32 * 16 + e % 16, e // 16 % 2 * 4, 4)
    sub = e // 32
    scale = _bits(block + 4 + sub // 2, sub % 2 * 4, 4) | _bits(block + 2 + sub // 4, sub % 4 * 2, 2) << 4
    return _looked_up(code, IQ4_LOW, IQ4_HIGH) * (_half(block) * (scale - 32).to(tl.float32))


@triton.jit
def _mxfp4(block, e):
    exponent = _byte(block)
    bits = tl.where(exponent < 2, 0x00200000 << tl.minimum(exponent, 1), exponent - 1 << 23)
    code = _bits(block + 1 + e % 16, e // 16 * 4, 4)
    return _looked_up(code, MXFP4_LOW, MXFP4_HIGH) * bits.to(tl.float32, bitcast=True)


FORMATS = {
    **{name: (globals()[f"_{name.lower()}"], block.elements, block.bytes) for name, block in BLOCK_TYPES.items()},
    "INT8": (_int8, 1, 1),
}


def unpack(
    data: Tensor, scales: Tensor | None, format: str, columns: int, order: Tensor | None, start: int, out: Tensor
) -> None:
    """Rows start, start + 1, ... of packed data (rows, bytes per row) uint8, or those of order, into out (n, columns).

    format: a key of FORMATS; scales: fp32 (rows,) for INT8, else None; order: None, or int64 (n,), the rows; out: fp32
    or bf16. All are contiguous.
    """
    value, elements, size = FORMATS[format]
    assert columns * size == data.shape[1] * elements, (
        f"{tuple(data.shape)} bytes are no {format} rows of {columns} weights"
    )
    grid = (len(out), triton.cdiv(columns, TILE))
    if out.numel():
        with torch.cuda.device_of(out):
            _unpack[grid](data, scales, order, out, start, len(data), columns, data.shape[1], value, elements, size,
                          TILE, **OPTIONS)  # fmt: skip
