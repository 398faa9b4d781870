"""Custom operators on packed weights; and here, the block formats that they and the file reader agree on.

A packed row is a whole number of blocks: `elements` neighbouring weights share their scales and fill `bytes` bytes.
A float is a block of one. Source: ggml's type table, as GGUF files number it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockType:
    """How ggml stores `elements` weights in `bytes` bytes; `code` is its number in a GGUF file."""

    name: str
    code: int
    elements: int
    bytes: int
    halves: tuple[int, ...] = ()
    """Where in a block its half-float scales begin, in bytes."""
    exponents: tuple[int, ...] = ()
    """Where its E8M0 scales lie, a byte of an exponent each. Every byte but halves and these may hold anything."""


BLOCK_TYPES = {
    block.name: block
    for block in (
        BlockType("F32", 0, 1, 4),
        BlockType("F16", 1, 1, 2),
        BlockType("BF16", 30, 1, 2),
        BlockType("Q4_0", 2, 32, 18, halves=(0,)),
        BlockType("Q4_1", 3, 32, 20, halves=(0, 2)),
        BlockType("Q5_0", 6, 32, 22, halves=(0,)),
        BlockType("Q5_1", 7, 32, 24, halves=(0, 2)),
        BlockType("Q8_0", 8, 32, 34, halves=(0,)),
        BlockType("Q2_K", 10, 256, 84, halves=(80, 82)),
        BlockType("Q3_K", 11, 256, 110, halves=(108,)),
        BlockType("Q4_K", 12, 256, 144, halves=(0, 2)),
        BlockType("Q5_K", 13, 256, 176, halves=(0, 2)),
        BlockType("Q6_K", 14, 256, 210, halves=(208,)),
        BlockType("IQ4_NL", 20, 32, 18, halves=(0,)),
        BlockType("IQ4_XS", 23, 256, 136, halves=(0,)),
        BlockType("MXFP4", 39, 32, 17, exponents=(0,)),
    )
}
