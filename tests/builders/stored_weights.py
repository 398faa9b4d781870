"""Weights of every stored format, with random values and scales that are finite and uneven."""

from __future__ import annotations

import numpy as np
import torch

from lorafit.kernels import BLOCK_TYPES, ops
from lorafit.kernels.ops import Stored

FORMATS = (*BLOCK_TYPES, ops.NF4, ops.INT8)


def random_weight(format_: str, rows: int, columns: int, seed: int = 0, *, ordered: bool = False) -> Stored:
    """A weight (rows, columns) of normal size; `ordered` puts its rows in a random order."""
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    matrix = torch.randn(rows, columns) * torch.rand(rows, 1)
    order = torch.randperm(rows) if ordered else None
    if format_ in (ops.NF4, ops.INT8):
        made = ops.quantise_nf4(matrix) if format_ == ops.NF4 else ops.quantise_int8(matrix)
        return Stored(format_, columns, made.data, made.scales, made.nested, made.offset, order=order)
    block = BLOCK_TYPES[format_]
    if block.elements == 1:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[format_]
        return Stored(format_, columns, matrix.to(dtype).view(torch.uint8), order=order)
    data = generator.integers(0, 256, (rows * columns // block.elements, block.bytes), dtype=np.uint8)
    for at in block.halves:
        scales = (generator.standard_normal(len(data)) * 0.02).astype("<f2")
        data[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    for at in block.exponents:
        data[:, at] = generator.integers(119, 124, len(data))
    return Stored(format_, columns, torch.from_numpy(data.reshape(rows, -1)), order=order)
