"""Packed blocks to fp32 in plain torch: the slow, obvious twin of every native kernel.

Each function takes blocks (n, bytes) and writes their values into out (n, elements): integer codes first, then one
multiplication by the scale, then one addition, in that order and never fused, so that the bits are those of ggml's
own reference. Layouts: ggml's `block_q4_0` and its kin; d, m and dmin are half floats, little endian.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorafit.kernels import BLOCK_TYPES

CHUNK = 1 << 18  # weights at a time: 1 MB of fp32 stays in the cache between the passes


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
    fifth = blocks[:, 2:6, None] >> torch.arange(8, dtype=torch.uint8) & 1
    _nibbles(blocks[:, 6:], out)
    out.add_(fifth.flatten(1), alpha=16).sub_(16).mul_(_half(blocks, 0))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    """d, 32 signed bytes: d q."""
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_half(blocks, 0))


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    """d, dmin, eight 6-bit scales s and minima m, 128 bytes of nibbles: (d s) q - dmin m, by sub-blocks of 32."""
    low, mixed = blocks[:, 4:12] & 63, blocks[:, 12:16]
    top = blocks[:, 4:12] >> 6 << 4
    scale = torch.cat([low[:, :4], (mixed & 15) | top[:, :4]], 1)
    minimum = torch.cat([low[:, 4:], (mixed >> 4) | top[:, 4:]], 1)
    pairs = out.view(-1, 4, 64)  # 32 bytes hold the low nibbles of one sub-block and the high ones of the next
    _nibbles(blocks[:, 16:].reshape(-1, 4, 32), pairs)
    subs = out.view(-1, 8, 32)
    subs.mul_((_half(blocks, 0) * scale)[:, :, None]).sub_((_half(blocks, 2) * minimum)[:, :, None])


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    """128 bytes of low nibbles, 64 of two high bits, 16 signed scales s, d: (d s) (q - 32), by sub-blocks of 16."""
    halves = out.view(-1, 2, 128)
    _nibbles(blocks[:, :128].reshape(-1, 2, 64), halves)
    pairs = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    halves.add_(pairs.flatten(2), alpha=16).sub_(32)
    scale = blocks[:, 192:208].view(torch.int8)
    out.view(-1, 16, 16).mul_((_half(blocks, 208) * scale)[:, :, None])


_UNPACKERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}
