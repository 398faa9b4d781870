"""Reading and writing safetensors files: one file, or a Hugging Face folder of shards.

    8 bytes: length of the header;  header: {"name": {"dtype", "shape", "data_offsets"}, ...};  then the data

The header is checked here before the safetensors library sees it, so that every fault names file and tensor: its
length, duplicate keys, types, sizes, and that the tensors fill the data exactly, without holes or overlap. Tensors
are views of the mapped file. Source: the format's description in the safetensors repository.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, uint8

from lorafit import machine
from lorafit.errors import Faults, LorafitError, ModelError
from lorafit.formats import place

MAX_HEADER = 32 << 20  # bytes; a quarter of a million tensors fit
MAX_DIMENSIONS, MAX_COUNT = 8, 1 << 63
FLOATS = ("F32", "F16", "BF16")
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}  # of integers, quantised weights are made
NAMES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.uint8": "U8",
         "torch.int8": "I8"}  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Shards:
    """The tensors of one or several safetensors files, by name; nothing is read before it is asked for."""

    def __init__(self, files: Mapping[Path, Mapping[str, Any]], error: type[LorafitError]) -> None:
        self._error = error
        self._file = {name: path for path, header in files.items() for name in header}
        found = [item for header in files.values() for item in header.items()]
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(entry["shape"]) for name, entry in found}
        self.dtypes: dict[str, str] = {name: entry["dtype"] for name, entry in found}
        self._open = cache(partial(safe_open, framework="pt"))
        self._mapped = cache(machine.mapped)

    def load(self, name: str) -> Tensor:
        """The tensor, in the file's dtype. Raises the error class given when the file is no longer what it was."""
        path = self._file[name]
        try:
            return self._open(path).get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise self._error(place(path, name), f"cannot be read: {error}", "download it again") from None

    def drop(self, name: str, values: Tensor) -> None:
        """Give back the pages of what `load` gave under this name, where it lies in the mapped file unchanged."""
        machine.drop(values.data_ptr(), values.nbytes, self._mapped(self._file[name]))


def open_file(path: Path, error: type[LorafitError] = ModelError, dtypes: Collection[str] = FLOATS) -> Shards:
    """One file. Raises `error`, naming file and tensor, for anything that is not a valid file of these dtypes."""
    return Shards({path: read_header(path, error, dtypes)}, error)


def open_folder(folder: Path, error: type[LorafitError] = ModelError) -> Shards:
    """A Hugging Face folder's weights: model.safetensors, or the shards that its index names, exactly.

    Besides floats there may be U8 and I8, of which quantised weights are made; what they mean is the caller's to check.
    Raises `error`, or Faults where files and index disagree in several places.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            pickled = any(path.suffix in (".bin", ".pt", ".pth") for path in folder.iterdir())
            what = "holds pickled weights only, which are not read" if pickled else f"holds no {SINGLE}"
            raise error(str(folder), what, "give a folder with safetensors weights")
        return open_file(folder / SINGLE, error, BYTES)
    shard_of = _read_index(index, error)
    named = set(shard_of.values())
    on_disk = {path.name for path in folder.glob("model*.safetensors")}
    faults = [error(place(index, name), "is not in the folder", "download it") for name in sorted(named - on_disk)]
    faults += [error(str(folder / name), f"is not named by {INDEX}", "remove it") for name in sorted(on_disk - named)]
    if faults:
        raise Faults(faults)
    files = {folder / name: read_header(folder / name, error, BYTES) for name in sorted(named)}
    for path, header in files.items():
        claimed = {name for name, shard in shard_of.items() if shard == path.name}
        for name in sorted(claimed ^ header.keys()):
            what = f"{INDEX} and {path.name} disagree on whether it holds this tensor"
            faults.append(error(place(path, name), what, "download the folder again"))
    if faults:
        raise Faults(faults)
    return Shards(files, error)


def read_header(path: Path, error: type[LorafitError], dtypes: Collection[str] = FLOATS) -> dict[str, dict[str, Any]]:
    """dtype, shape and data_offsets by tensor name, checked; dtypes: those allowed, of BYTES. Raises `error`."""
    remedy = "the file is damaged; download it again"
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                what = f"is no safetensors file: its header would take {length} of {size} bytes"
                raise error(str(path), what, remedy)
            text = file.read(length)
    except OSError as fault:
        raise error(str(path), f"cannot be read: {fault.strerror}", "check the path") from None
    header = _parse(text, str(path), error)
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise error(f"{path}: __metadata__", "is not a table of strings", remedy)
    spans = sorted((*_span(place(path, name), entry, error, dtypes), name) for name, entry in header.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise error(place(path, name), f"begins at byte {start} of the data, not at {end}", remedy)
        end = stop
    if end != size - 8 - length:
        raise error(str(path), f"holds {size - 8 - length} bytes of data, and its tensors take {end}", remedy)
    return header


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write and sync a file that is the same, byte for byte, for the same tensors; none is copied in memory.

    In the library's own order, wide dtypes first and then by name, with one metadata key. Raises OSError.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names, end = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)), 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": NAMES[str(tensors[name].dtype)], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    with path.open("wb") as file:  # the library's own writing would leave mode 0600
        file.write((len(text) + -len(text) % 8).to_bytes(8, "little") + text + b" " * (-len(text) % 8))
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().view(-1).view(uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def stream_safetensors(
    path: Path, plan: Mapping[str, tuple[tuple[int, ...], str]], load: Callable[[str], Tensor]
) -> None:
    """Write and sync a file whose tensors are made one at a time: no more than one is in memory.

    plan: (shape, dtype) by name; wide dtypes are written first, else in this order. load: gives the tensor of a name.
    Raises OSError, and what `load` raises.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names, end = sorted(plan, key=lambda name: -BYTES[plan[name][1]]), 0
    for name in names:
        shape, dtype = plan[name]
        start, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = load(name)
            assert (tuple(tensor.shape), NAMES[str(tensor.dtype)]) == plan[name], f"{name} is not as announced"
            file.write(tensor.contiguous().view(-1).view(uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _parse(text: bytes, file: str, error: type[LorafitError]) -> dict[str, Any]:
    """A JSON object without duplicate keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"{twice[:80]!a} is there twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as fault:
        raise error(file, f"its JSON does not read: {fault}", "the file is damaged; download it again") from None
    if not isinstance(value, dict):
        raise error(file, f"its JSON is a {type(value).__name__}, not an object", "download it again")
    return value


def _span(where: str, entry: Any, error: type[LorafitError], dtypes: Collection[str]) -> tuple[int, int]:
    """Where a tensor's data begins and ends, which must be what its shape and dtype take."""
    remedy = "the file is damaged; download it again"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise error(where, "does not have dtype, shape and data_offsets", remedy)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise error(where, f"has dtype {str(dtype)[:40]!a}, which is not read", f"use weights in {', '.join(dtypes)}")
    for name, values in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(values, list) or len(values) > MAX_DIMENSIONS or not all(map(_is_count, values)):
            raise error(where, f"{name} is no list of at most {MAX_DIMENSIONS} counts", remedy)
    needed = math.prod(shape) * BYTES[dtype]
    if len(offsets) != 2 or offsets[1] - offsets[0] != needed:
        raise error(where, f"has data_offsets {offsets}, and its shape {shape} takes {needed} bytes", remedy)
    return offsets[0], offsets[1]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_COUNT


def _read_index(index: Path, error: type[LorafitError]) -> dict[str, str]:
    """Shard by tensor name; shards are plain file names in the same folder."""
    try:
        content = index.read_bytes() if index.stat().st_size <= MAX_HEADER else b""
    except OSError as fault:
        raise error(str(index), f"cannot be read: {fault.strerror}", "check the path") from None
    shard_of = _parse(content, str(index), error).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise error(f"{index}: weight_map", "is not a table of tensors and files", "download it again")
    for name, shard in shard_of.items():
        plain = isinstance(shard, str) and shard.startswith("model") and shard.endswith(".safetensors")
        if not plain or any(mark in shard for mark in "/\\\0"):
            raise error(
                place(index, name), f"{str(shard)[:80]!a} is not the plain name of a shard", "download it again"
            )
    return shard_of
