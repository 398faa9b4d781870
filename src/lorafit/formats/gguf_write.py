"""Writing GGUF files through gguf-py, one tensor in memory at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, quants

VALUE_TYPES = {kind.name.lower(): kind for kind in GGUFValueType}  # by the names that `GgufFile.types` has


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, tuple[Any, str]],
    tensors: Mapping[str, tuple[tuple[int, ...], str]],
    load: Callable[[str], np.ndarray],
) -> None:
    """Write and sync a file.

    metadata: (value, type) by key, in order; types are those of `GgufFile.types`, such as `uint32` or `array of
    string`. `general.architecture` is written first and need not be among them. tensors: (shape as torch has it, type)
    by name, in order. load: a tensor's values, float32 of its shape, or its bytes (uint8) as they stand in a file.
    Raises OSError, and what `load` raises.
    """
    writer = GGUFWriter(path, architecture)
    for key, (value, kind) in metadata.items():
        if key != "general.architecture":
            element = VALUE_TYPES[kind.removeprefix("array of ")]
            if kind.startswith("array of "):
                if not value:
                    continue  # gguf-py writes no empty arrays
                writer.add_key_value(key, list(value), GGUFValueType.ARRAY, element)
            else:
                writer.add_key_value(key, value, element)
    for name, (shape, kind) in tensors.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes(shape, kind), GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (_, kind) in tensors.items():
        values = load(name)
        data = values if values.dtype == np.uint8 else quants.quantize(values, GGMLQuantizationType[kind])
        writer.write_tensor_data(np.ascontiguousarray(data))
    writer.flush()
    writer.close()
    with path.open("rb") as file:
        os.fsync(file.fileno())


def nbytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor of this shape in a format."""
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return math.prod(shape) // elements * size


def fits(shape: tuple[int, ...], kind: str) -> bool:
    """Whether a tensor's rows divide into the format's blocks."""
    return shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0


def rounded(values: np.ndarray, kind: str) -> np.ndarray:
    """What float32 values become in a format: written and read back, in their shape."""
    number = GGMLQuantizationType[kind]
    return quants.dequantize(quants.quantize(np.ascontiguousarray(values), number), number).reshape(values.shape)
