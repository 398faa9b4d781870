"""Packed blocks to fp32 in plain torch: the slow, obvious twin of every native kernel.

Each function takes blocks (n, bytes) and writes their values into out (n, elements): integer codes first (IQ4 and
MXFP4 look them up), then one multiplication by the scale, then one addition, in that order and never fused, so that the
bits are those of ggml's own reference. Layouts: ggml's `block_q4_0` and its kin; d, m and dmin are half floats, little
endian. MXFP4's values are those of the Open Compute Project's Microscaling Formats (MX) 1.0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorafit.kernels import BLOCK_TYPES

CHUNK = 1 << 18  # weights at a time: 1 MB of fp32 stays in the cache between the passes
IQ4_VALUES = torch.tensor([-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])  # by code
MXFP4_VALUES = torch.tensor([0.0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])  # E2M1's, twice


def unpack(data: Tensor, type_name: str) -> Tensor:
    """The values of packed rows: data (rows, bytes per row) uint8 -> (rows, in_features) fp32.

    type_name: a key of BLOCK_TYPES. Bits equal those of gguf-py's `dequantize`.
    """
    block = BLOCK_TYPES[type_name]
    rows, row_bytes = data.shape
    assert row_bytes % block.bytes == 0, f"{type_name} cannot fill {row_bytes} bytes"
    out = torch.empty(rows, row_bytes // block.bytes * block.elements)
    blocks, values = data.reshape(-1, block.bytes), out.view(-1, block.elements)
    step = CHUNK // block.elements
    for start in range(0, len(blocks), step):
        _UNPACKERS[type_name](blocks[start : start + step], values[start : start + step])
    return out


def _half(blocks: Tensor, at: int) -> Tensor:
    """The half float at byte `at` of each block, as fp32 (n, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, out: Tensor) -> None:
    """Low halves of packed (..., k) into out[..., :k], high halves into out[..., k:]."""
    count = packed.shape[-1]
    out[..., :count].copy_(packed & 15)
    out[..., count:].copy_(packed >> 4)


def _fields(packed: Tensor, width: int) -> Tensor:
    """Bit fields of packed (..., k) as (..., 8 / width, k): the lowest `width` bits of all k bytes first.

    With packed (..., k, 1) a byte's fields are neighbours instead.
    """
    return packed[..., None, :] >> torch.arange(0, 8, width, dtype=torch.uint8)[:, None] & (1 << width) - 1


def _f32(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.float32))


def _f16(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.float16))


def _bf16(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.bfloat16))


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    """d, 16 bytes of nibbles: d (q - 8)."""
    _nibbles(blocks[:, 2:], out)
    out.sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    """d, m, 16 bytes of nibbles: d q + m."""
    _nibbles(blocks[:, 4:], out)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    """d, 32 fifth bits, 16 bytes of nibbles: d (q - 16)."""
    _nibbles(blocks[:, 6:], out)
    out.add_(_fields(blocks[:, 2:6, None], 1).flatten(1), alpha=16).sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    """d, m, 32 fifth bits, 16 bytes of nibbles: d q + m."""
    _nibbles(blocks[:, 8:], out)
    out.add_(_fields(blocks[:, 4:8, None], 1).flatten(1), alpha=16).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    """d, 32 signed bytes: d q."""
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_half(blocks, 0))


def _q2_k(blocks: Tensor, out: Tensor) -> None:
    """16 bytes of 4-bit scales s and minima m, 64 of two bits, d, dmin: (d s) q - dmin m, by sub-blocks of 16."""
    out.copy_(_fields(blocks[:, 16:80].reshape(-1, 2, 32), 2).flatten(1))
    scale, minimum = blocks[:, :16] & 15, blocks[:, :16] >> 4
    subs = out.view(-1, 16, 16)
    subs.mul_((_half(blocks, 80) * scale)[:, :, None]).sub_((_half(blocks, 82) * minimum)[:, :, None])


def _q3_k(blocks: Tensor, out: Tensor) -> None:
    """32 bytes of third bits, 64 of two low bits, 16 6-bit scales s, d: (d (s - 32)) (q - 4), by sub-blocks of 16."""
    out.copy_(_fields(blocks[:, 32:96].reshape(-1, 2, 32), 2).flatten(1))
    out.add_(_fields(blocks[:, :32], 1).flatten(1), alpha=4).sub_(4)
    low, high = _fields(blocks[:, 96:104], 4).flatten(1), _fields(blocks[:, 104:108], 2).flatten(1)
    scale = (low | high << 4).view(torch.int8) - 32
    out.view(-1, 16, 16).mul_((_half(blocks, 108) * scale)[:, :, None])


def _six_bits(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima (n, 8) of Q4_K and Q5_K: d times the scales, dmin times the minima, from bytes 0 to 15."""
    low, mixed = blocks[:, 4:12] & 63, blocks[:, 12:16]
    top = blocks[:, 4:12] >> 6 << 4
    scale = torch.cat([low[:, :4], (mixed & 15) | top[:, :4]], 1)
    minimum = torch.cat([low[:, 4:], (mixed >> 4) | top[:, 4:]], 1)
    return _half(blocks, 0) * scale, _half(blocks, 2) * minimum


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    """d, dmin, eight 6-bit scales s and minima m, 128 bytes of nibbles: (d s) q - dmin m, by sub-blocks of 32."""
    pairs = out.view(-1, 4, 64)  # 32 bytes hold the low nibbles of one sub-block and the high ones of the next
    _nibbles(blocks[:, 16:].reshape(-1, 4, 32), pairs)
    scale, minimum = _six_bits(blocks)
    out.view(-1, 8, 32).mul_(scale[:, :, None]).sub_(minimum[:, :, None])


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit b of byte l is for element l of sub-block b."""
    _nibbles(blocks[:, 48:].reshape(-1, 4, 32), out.view(-1, 4, 64))
    out.add_(_fields(blocks[:, 16:48], 1).flatten(1), alpha=16)
    scale, minimum = _six_bits(blocks)
    out.view(-1, 8, 32).mul_(scale[:, :, None]).sub_(minimum[:, :, None])


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    """128 bytes of low nibbles, 64 of two high bits, 16 signed scales s, d: (d s) (q - 32), by sub-blocks of 16."""
    _nibbles(blocks[:, :128].reshape(-1, 2, 64), out.view(-1, 2, 128))
    out.add_(_fields(blocks[:, 128:192].reshape(-1, 2, 32), 2).flatten(1), alpha=16).sub_(32)
    scale = blocks[:, 192:208].view(torch.int8)
    out.view(-1, 16, 16).mul_((_half(blocks, 208) * scale)[:, :, None])


def _iq4_nl(blocks: Tensor, out: Tensor) -> None:
    """d, 16 bytes of nibbles: d v, v = IQ4_VALUES[q]."""
    _nibbles(blocks[:, 2:], out)
    out.copy_(IQ4_VALUES[out.int()]).mul_(_half(blocks, 0))


def _iq4_xs(blocks: Tensor, out: Tensor) -> None:
    """d, eight 6-bit scales s (2 bytes of high bits, 4 of low), 128 bytes of nibbles: (d (s - 32)) v, by 32."""
    subs = out.view(-1, 8, 32)
    _nibbles(blocks[:, 8:].reshape(-1, 8, 16), subs)
    low, high = _fields(blocks[:, 4:8, None], 4).flatten(1), _fields(blocks[:, 2:4, None], 2).flatten(1)
    scale = (low | high << 4).view(torch.int8) - 32
    subs.copy_(IQ4_VALUES[subs.int()]).mul_((_half(blocks, 0) * scale)[:, :, None])


def _mxfp4(blocks: Tensor, out: Tensor) -> None:
    """An exponent e, 16 bytes of nibbles: 2^(e - 128) v, v = MXFP4_VALUES[q]. As ggml reads it, 255 is no NaN."""
    _nibbles(blocks[:, 1:], out)
    exponent = blocks[:, :1].int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), exponent - 1 << 23)
    out.copy_(MXFP4_VALUES[out.int()]).mul_(bits.view(torch.float32))


_UNPACKERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
