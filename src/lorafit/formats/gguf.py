"""A strict reader of GGUF model files, versions 2 and 3, little endian.

    magic, version, number of tensors, number of keys
    keys:     name, type, value                    llama.block_count = 30, tokenizer.ggml.tokens = [...]
    tensors:  name, dimensions, type, offset       where each one's packed rows lie in what follows
    data:     aligned, one tensor after the other

The file is mapped and never copied: a tensor's `data` is a view of the mapping. Nothing in a file is trusted: every
count and length is compared with the bytes that are left before anything loops over it or allocates by it, and every
fault is one ModelError with the file and the key or tensor. Source: the GGUF specification in ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from lorafit.errors import ModelError
from lorafit.formats import place
from lorafit.kernels import BLOCK_TYPES, BlockType

Scalar = TypeVar("Scalar", bool, int, float, str)

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, where the file does not say
MAX_ALIGNMENT = 1 << 16
MAX_KEY = 1 << 16  # bytes of a key's name
MAX_NAME = 64  # bytes of a tensor's name: ggml's GGML_MAX_NAME
MAX_DIMENSIONS = 4
SMALLEST_KEY = 8 + 4 + 1  # bytes: an empty name, a type, one byte of value
SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8  # bytes: an empty name, one dimension, a type, an offset

STRING, ARRAY, BOOL = 8, 9, 7
# Value types by number: name, and numpy's type where the size is fixed.
NUMBERS = {
    0: ("uint8", "<u1"),
    1: ("int8", "<i1"),
    2: ("uint16", "<u2"),
    3: ("int16", "<i2"),
    4: ("uint32", "<u4"),
    5: ("int32", "<i4"),
    6: ("float32", "<f4"),
    BOOL: ("bool", "<u1"),
    10: ("uint64", "<u8"),
    11: ("int64", "<i8"),
    12: ("float64", "<f8"),
}
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")

BLOCKS_BY_CODE = {block.code: block for block in BLOCK_TYPES.values()}
# Types that ggml has and we do not read yet, by number.
OTHER_TYPES = {
    **{9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0"},
    **{40: "NVFP4", 41: "Q1_0"},
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor as it lies in the file."""

    name: str
    shape: tuple[int, ...]
    """As torch has it: rows first, in_features last (the file stores them the other way round)."""
    type: BlockType
    data: np.ndarray
    """uint8 (rows, bytes per row), read-only, a view of the mapping; a 1-D tensor is one row."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(self.data.nbytes)


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file that passed every check."""

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    """bool, int, float, str, or a list of one of them, by key."""
    types: dict[str, str] = field(repr=False)
    """Each key's type in the file, such as `uint32` or `array of string`."""
    tensors: dict[str, GgufTensor] = field(repr=False)
    """In the order of the file."""

    def value(self, key: str, kind: type[Scalar], default: Scalar | None = None) -> Scalar:
        """The key's value, which must be of this kind (a bool is no int, an int is no float).

        Raises ModelError when it is of another kind, or absent where there is no default.
        """
        if key not in self.metadata:
            if default is None:
                raise ModelError(place(self.path, key), "is missing", "the file is incomplete; convert the model again")
            return default
        value = self.metadata[key]
        if type(value) is not kind:
            raise ModelError(place(self.path, key), f"has type {self.types[key]}, not {kind.__name__}")
        return value


def read_gguf(path: str | Path) -> GgufFile:
    """Map and check the file at `path`. Raises ModelError for anything that is not a whole, valid GGUF file."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(4)
            if head != MAGIC:
                raise ModelError(str(path), f"is no GGUF file: it begins with {head!r}", "give a .gguf file")
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelError(str(path), f"cannot be read: {error.strerror}", "check the path") from None
    return _Reader(path, mapping).file()


class _Reader:
    """Walks once over the mapped bytes; `self.at` is the next one, `self.place` what a fault is reported under."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path, self.bytes, self.size = path, mapping, len(mapping)
        self.at = len(MAGIC)
        self.enter()

    def file(self) -> GgufFile:
        version = self.number(U32, "version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = f"big-endian, version {swapped}" if swapped in (1, *VERSIONS) else f"version {version}"
            self.fail(f"is GGUF {kind}", "convert the model again to little-endian GGUF version 3")
        n_tensors, n_keys = self.number(U64, "number of tensors"), self.number(U64, "number of keys")
        self.need(n_keys * SMALLEST_KEY + n_tensors * SMALLEST_TENSOR, f"{n_keys} keys and {n_tensors} tensors")
        metadata, types = self.keys(n_keys)
        alignment = self.alignment(metadata, types)
        infos = self.tensor_infos(n_tensors, alignment)
        return GgufFile(self.path, metadata, types, self.tensors(infos, alignment))

    def enter(self, name: str = "") -> None:
        """Report later faults under this key or tensor."""
        self.place = place(self.path, name) if name else str(self.path)

    def fail(self, what: str, remedy: str = "the file is damaged; download or convert it again") -> NoReturn:
        raise ModelError(self.place, what, remedy)

    def need(self, count: int, what: str) -> None:
        """Refuse what cannot fit into the bytes left."""
        if count > self.size - self.at:
            self.fail(f"{what} cannot fit into the {self.size - self.at} bytes that are left")

    def number(self, kind: struct.Struct, what: str) -> int:
        self.need(kind.size, what)
        (value,) = kind.unpack_from(self.bytes, self.at)
        self.at += kind.size
        return int(value)

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings, in a loop kept tight: a tokenizer has a quarter of a million of them."""
        self.need(count * U64.size, f"{count} x string")
        data, at, size, read_length = self.bytes, self.at, self.size, U64.unpack_from
        found = []
        try:
            for _ in range(count):
                start = at + 8
                if start > size or (at := start + read_length(data, at)[0]) > size:
                    self.fail(f"{what} is longer than the file")
                found.append(str(data[start:at], "utf-8"))
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason} at byte {start + error.start}")
        self.at = at
        return found

    def name(self, what: str, longest: int) -> str:
        """A key's or tensor's name, which becomes the place of later faults."""
        start = self.at
        (name,) = self.strings(1, f"the name of {what}")
        if not 0 < self.at - start - U64.size <= longest:
            self.fail(f"the name of {what} has {self.at - start - U64.size} bytes, not 1 to {longest}")
        self.enter(name)
        return name

    def keys(self, count: int) -> tuple[dict[str, Any], dict[str, str]]:
        metadata: dict[str, Any] = {}
        types: dict[str, str] = {}
        for index in range(count):
            name = self.name(f"key {index + 1}", MAX_KEY)
            if name in metadata:
                self.fail("is there twice")
            metadata[name], types[name] = self.value()
            self.enter()
        return metadata, types

    def value(self) -> tuple[Any, str]:
        """A key's value and the name of its type."""
        code = self.number(U32, "the value's type")
        if code != ARRAY:
            values, type_name = self.array(code, 1)
            return values[0], type_name
        code = self.number(U32, "the elements' type")
        if code == ARRAY:
            self.fail("is an array of arrays, which no model needs")
        values, type_name = self.array(code, self.number(U64, "the array's length"))
        return values, f"array of {type_name}"

    def array(self, code: int, count: int) -> tuple[list[Any], str]:
        """`count` values of one type, as Python objects, and the type's name."""
        if code == STRING:
            return self.strings(count, "a string"), "string"
        if code not in NUMBERS:
            self.fail(f"has the unknown value type {code}")
        type_name, numpy_name = NUMBERS[code]
        dtype = np.dtype(numpy_name)
        self.need(count * dtype.itemsize, f"{count} x {type_name}")
        values = np.frombuffer(self.bytes, dtype, count, self.at)
        self.at += values.nbytes
        if code != BOOL:
            return values.tolist(), type_name
        if count and values.max() > 1:
            self.fail(f"holds the bool {values.max()}, which must be 0 or 1")
        return values.astype(bool).tolist(), type_name

    def alignment(self, metadata: dict[str, Any], types: dict[str, str]) -> int:
        key = "general.alignment"
        value = metadata.get(key, ALIGNMENT)
        self.enter(key)
        if types.get(key, "uint32") != "uint32":
            self.fail(f"has type {types[key]}, not uint32")
        if not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
            self.fail(f"is {value}, not a power of two from 8 to {MAX_ALIGNMENT}")
        self.enter()
        return int(value)

    def tensor_infos(self, count: int, alignment: int) -> dict[str, tuple[tuple[int, ...], BlockType, int]]:
        """Shape, type and offset by name; each is possible by itself."""
        infos: dict[str, tuple[tuple[int, ...], BlockType, int]] = {}
        for index in range(count):
            name = self.name(f"tensor {index + 1}", MAX_NAME)
            if name in infos:
                self.fail("is there twice")
            n_dimensions = self.number(U32, "the number of dimensions")
            if not 1 <= n_dimensions <= MAX_DIMENSIONS:
                self.fail(f"has {n_dimensions} dimensions, not 1 to {MAX_DIMENSIONS}")
            dimensions = [self.number(U64, "a dimension") for _ in range(n_dimensions)]
            block = self.block(self.number(U32, "the tensor's type"))
            offset = self.number(U64, "the offset")
            if 0 in dimensions:
                self.fail(f"has shape {dimensions[::-1]}")
            if dimensions[0] % block.elements:
                self.fail(f"has rows of {dimensions[0]}, which {block.name} blocks of {block.elements} do not divide")
            if offset % alignment:
                self.fail(f"has offset {offset}, which is not aligned to {alignment}")
            infos[name] = tuple(dimensions[::-1]), block, offset
            self.enter()
        return infos

    def block(self, code: int) -> BlockType:
        if code not in BLOCKS_BY_CODE:
            known = OTHER_TYPES.get(code)
            what = f"has type {known}, which is not supported yet" if known else f"has the unknown type {code}"
            self.fail(what, f"use a file with {', '.join(BLOCK_TYPES)}")
        return BLOCKS_BY_CODE[code]

    def tensors(
        self, infos: dict[str, tuple[tuple[int, ...], BlockType, int]], alignment: int
    ) -> dict[str, GgufTensor]:
        """Views of the data, once the extents are known to lie in the file, side by side."""
        data = np.frombuffer(self.bytes, np.uint8)
        base = end = -(-self.at // alignment) * alignment
        previous, found = "", {}
        for name, (shape, block, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
            self.enter(name)
            rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block.elements * block.bytes
            start = base + offset
            if start < end:
                self.fail(f"overlaps {previous!r}")
            end = start + rows * row_bytes
            if end > self.size:
                self.fail(f"needs bytes {start} to {end} of a file of {self.size}", "the download was cut; repeat it")
            found[name] = GgufTensor(name, shape, block, data[start:end].reshape(rows, row_bytes))
            previous = name
        self.enter()
        if self.size - end >= alignment:
            self.fail(f"goes on for {self.size - end} bytes after the last tensor")
        return {name: found[name] for name in infos}
