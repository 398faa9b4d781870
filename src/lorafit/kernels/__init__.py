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


BLOCK_TYPES = {
    block.name: block
    for block in (
        BlockType("F32", 0, 1, 4),
        BlockType("F16", 1, 1, 2),
        BlockType("BF16", 30, 1, 2),
        BlockType("Q4_0", 2, 32, 18),
        BlockType("Q4_1", 3, 32, 20),
        BlockType("Q5_0", 6, 32, 22),
        BlockType("Q8_0", 8, 32, 34),
        BlockType("Q4_K", 12, 256, 144),
        BlockType("Q6_K", 14, 256, 210),
    )
}
