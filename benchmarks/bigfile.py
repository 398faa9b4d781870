"""A GGUF file of a large Llama's shape with random weights, written tensor by tensor.

The bytes of blocks are random; their half-float scales are set so that a weight is about 0.02, as in real models, and
everything stays finite. `q4_k_m` mixes Q4_K and Q6_K as llama.cpp's quantisation of that name does.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from lorafit.kernels import BLOCK_TYPES

SLAB = 1 << 26  # bytes made at once
ALIGNMENT = 32
# Scales in the order of `BlockType.halves`. Q4_K is d s q - m b with 6-bit s and b: m is d times the middle q.
SCALES = {"Q4_0": (4e-3,), "Q4_K": (8e-5, 6e-4), "Q6_K": (1.5e-5,)}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; the default is Llama-3.1-8B's."""

    layers: int = 32
    hidden: int = 4096
    mlp: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    context: int = 131072

    @property
    def kv_width(self) -> int:
        return self.hidden // self.heads * self.kv_heads


def write(path: Path, shape: Shape, matrices: str = "q4_k_m", seed: int = 0) -> Path:
    """Write the file and return its path; matrices: `q4_k_m` or `q4_0`."""
    chance = np.random.default_rng(seed)
    found = list(tensors(shape, matrices))
    with path.open("wb") as file:
        file.write(header(shape, found))
        for _, kind, rows, columns in found:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            for part in blocks(chance, kind, rows, columns):
                file.write(part.data)
    return path


def tensors(shape: Shape, matrices: str) -> Iterator[tuple[str, str, int, int]]:
    """(name, format, rows, columns) in the file's order; a norm has one row."""
    low, high = ("Q4_0", "Q4_0") if matrices == "q4_0" else ("Q4_K", "Q6_K")
    hidden, mlp, kv = shape.hidden, shape.mlp, shape.kv_width
    yield "token_embd.weight", low, shape.vocabulary, hidden
    yield "output.weight", high, shape.vocabulary, hidden
    yield "output_norm.weight", "F32", 1, hidden
    eighth = shape.layers // 8
    for n in range(shape.layers):
        better = n < eighth or n >= 7 * eighth or (n - eighth) % 3 == 2  # llama.cpp's choice of layers
        value = high if better else low
        yield f"blk.{n}.attn_norm.weight", "F32", 1, hidden
        yield f"blk.{n}.attn_q.weight", low, hidden, hidden
        yield f"blk.{n}.attn_k.weight", low, kv, hidden
        yield f"blk.{n}.attn_v.weight", value, kv, hidden
        yield f"blk.{n}.attn_output.weight", low, hidden, hidden
        yield f"blk.{n}.ffn_norm.weight", "F32", 1, hidden
        yield f"blk.{n}.ffn_gate.weight", low, mlp, hidden
        yield f"blk.{n}.ffn_up.weight", low, mlp, hidden
        yield f"blk.{n}.ffn_down.weight", value, hidden, mlp


def blocks(chance: np.random.Generator, kind: str, rows: int, columns: int) -> Iterator[np.ndarray]:
    """A tensor's bytes in slabs: ones for a norm, else random blocks with their scales."""
    if kind == "F32":
        yield np.ones(rows * columns, "<f4")
        return
    block = BLOCK_TYPES[kind]
    left = rows * columns // block.elements
    while left:
        count = min(left, SLAB // block.bytes)
        found = np.frombuffer(chance.bytes(count * block.bytes), np.uint8).reshape(count, -1).copy()
        for place, scale in zip(block.halves, SCALES[kind], strict=True):
            found[:, place : place + 2] = np.frombuffer(np.array(scale, "<f2").tobytes(), np.uint8)
        yield found
        left -= count


def header(shape: Shape, found: list[tuple[str, str, int, int]]) -> bytes:
    """Everything before the tensors' bytes."""
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": shape.layers,
        "llama.context_length": shape.context,
        "llama.embedding_length": shape.hidden,
        "llama.feed_forward_length": shape.mlp,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500000.0,
        **tokenizer(shape.vocabulary),
    }
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(found), len(metadata))]
    parts += [_text(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for name, kind, rows, columns in found:
        block = BLOCK_TYPES[kind]
        dimensions = (columns,) if kind == "F32" else (columns, rows)
        parts.append(_text(name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        parts.append(struct.pack("<IQ", block.code, offset))
        offset += rows * columns // block.elements * block.bytes
        offset += -offset % ALIGNMENT
    head = b"".join(parts)
    return head + b"\0" * (-len(head) % ALIGNMENT)


def tokenizer(vocabulary: int) -> dict[str, Any]:
    """A byte is a token; two begin and end a text; the rest is never used."""
    tokens = ["<|begin|>", "<|end|>", *sorted(ByteLevel.alphabet())]
    tokens += [f"<|unused {n}|>" for n in range(vocabulary - len(tokens))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _value(value: Any) -> bytes:
    """A value with its type before it, as GGUF numbers them."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
