"""The laws of lorafit.formats.safetensors: valid files are read as the library reads them, all others refused."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lorafit.errors import AdapterError, Faults, ModelError
from lorafit.formats.safetensors import (
    BYTES,
    INDEX,
    MAX_HEADER,
    open_file,
    open_folder,
    stream_safetensors,
    write_safetensors,
)

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.weight": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    "c": torch.tensor([0.25, 3.0, -0.0], dtype=torch.float16),
    "scalar": torch.tensor(7.0),
    "nothing": torch.zeros(0, 4),
}
INTEGERS = {
    "bytes": torch.tensor([[0], [128], [255]], dtype=torch.uint8),
    "signed": torch.tensor([-128, 0, 127], dtype=torch.int8),
}


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file by hand; header: an object or its text; length: what the file claims of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int = 0, stop: int = 8, shape: Any = (2,), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    """A header's entry for two floats."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop], **more}


EIGHT = bytes(8)
BIG = 1 << 62
# What is wrong: the file, and words of the error, the tensor among them.
MALFORMED = {
    "empty": (b"", "is no safetensors file: its header would take 0 of 0 bytes"),
    "seven bytes": (b"\0" * 7, "is no safetensors file"),
    "header past the end": (raw({}, length=3), "its header would take 3 of 10 bytes"),
    "header of 2^63 bytes": (raw({}, length=1 << 63), "is no safetensors file"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "its JSON does not read: 'utf-8' codec"),
    "no JSON": (raw(b"{]"), "its JSON does not read"),
    "JSON too deep": (raw(b"[" * 100_000), "its JSON does not read"),
    "number too long": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "its JSON does not read"),
    "a list": (raw([]), "its JSON is a list, not an object"),
    "duplicate key": (raw(b'{"a": 1, "a": 1}'), "'a' is there twice"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "__metadata__: is not a table of strings"),
    "entry of text": (raw({"a": "x"}), "a: does not have dtype, shape and data_offsets"),
    "entry without shape": (raw({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT), "a: does not have dtype"),
    "entry with more": (raw({"a": entry(stride=1)}, EIGHT), "a: does not have dtype, shape and data_offsets"),
    "integers": (raw({"a": entry(dtype="I64", shape=[1])}, EIGHT), "a: has dtype 'I64', which is not read"),
    "bytes": (
        raw({"a": entry(dtype="U8", shape=[8])}, EIGHT),
        "a: has dtype 'U8', which is not read; use weights in F",
    ),
    "dtype of a list": (raw({"a": entry(dtype=["F32"])}, EIGHT), "a: has dtype"),
    "negative shape": (raw({"a": entry(shape=[-2])}, EIGHT), "a: shape is no list of at most 8 counts"),
    "shape of floats": (raw({"a": entry(shape=[2.0])}, EIGHT), "a: shape is no list"),
    "shape of bools": (raw({"a": entry(shape=[True, 2])}, EIGHT), "a: shape is no list"),
    "nine dimensions": (raw({"a": entry(shape=[1] * 8 + [2])}, EIGHT), "a: shape is no list"),
    "shape over 2^64": (
        raw({"a": entry(shape=[BIG, BIG])}, EIGHT),
        f"[0, 8], and its shape [{BIG}, {BIG}] takes",
    ),
    "shape and bytes": (raw({"a": entry(shape=[3])}, EIGHT), "a: has data_offsets [0, 8], and its shape [3] takes 12"),
    "offsets reversed": (raw({"a": entry(8, 0)}, EIGHT), "a: has data_offsets [8, 0]"),
    "three offsets": (raw({"a": entry() | {"data_offsets": [0, 8, 8]}}, EIGHT), "a: has data_offsets [0, 8, 8]"),
    "data cut": (raw({"a": entry()}, EIGHT[:7]), "holds 7 bytes of data, and its tensors take 8"),
    "data after the end": (raw({"a": entry()}, EIGHT * 2), "holds 16 bytes of data, and its tensors take 8"),
    "hole": (raw({"a": entry(8, 16)}, EIGHT * 2), "a: begins at byte 8 of the data, not at 0"),
    "overlap": (raw({"a": entry(), "b": entry(4, 12)}, EIGHT * 2), "b: begins at byte 4 of the data, not at 8"),
    "same bytes twice": (raw({"a": entry(), "b": entry()}, EIGHT), "b: begins at byte 0 of the data, not at 8"),
    "terminal codes": (raw({"\x1b[2J\n": "x"}), r"'\x1b[2J\n': does not have dtype"),
    "lone surrogate": (raw({"\ud800": "x"}), r"'\ud800': does not have dtype"),
}


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(case: str, tmp_path: Path) -> None:
    """Each malformed file is one error of the class asked for, one line, with the file, the tensor and the value."""
    content, words = MALFORMED[case]
    with pytest.raises(AdapterError) as caught:
        open_file(written(tmp_path, content), AdapterError)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/model.safetensors")
    assert str(caught.value).isprintable()


def test_a_header_over_the_cap_is_refused_unread(tmp_path: Path) -> None:
    """A header larger than the cap is refused by its length, even in a file that is large enough."""
    path = written(tmp_path, (MAX_HEADER + 1).to_bytes(8, "little"))
    os.truncate(path, MAX_HEADER + 100)
    with pytest.raises(ModelError, match=f"its header would take {MAX_HEADER + 1}"):
        open_file(path)


def test_mutants_are_refused_or_valid(tmp_path: Path) -> None:
    """500 damaged copies of a valid file are each refused in one line or read in full, within a second each."""
    generator = random.Random(0)
    write_safetensors(tmp_path / "whole", TENSORS)
    whole = (tmp_path / "whole").read_bytes()
    refused = 0
    for number in range(500):
        content = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(len(content))] = generator.choice([0, 34, 48, 57, 127, 255])
        if generator.random() < 0.2:
            del content[generator.randrange(len(content)) :]
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content)
        started, fault = time.perf_counter(), ""
        try:
            shards = open_file(path)
            for name, shape in shards.shapes.items():
                assert tuple(shards.load(name).shape) == shape
        except ModelError as error:
            fault = str(error)
        assert time.perf_counter() - started < 1
        assert fault.startswith(str(path) if fault else "")
        assert fault.isprintable()
        refused += bool(fault)
    assert 100 < refused < 500


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Names, shapes, dtypes and bits come back, through our reader and through the library's."""
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {**TENSORS, "turned": TENSORS["a"].T})
    shards, library = open_file(path), safetensors.torch.load_file(path)
    assert shards.shapes["turned"] == (3, 2)
    assert shards.shapes["scalar"] == ()
    assert shards.dtypes == {
        "a": "F32",
        "b.weight": "BF16",
        "c": "F16",
        "scalar": "F32",
        "nothing": "F32",
        "turned": "F32",
    }
    for name, tensor in {**TENSORS, "turned": TENSORS["a"].T}.items():
        assert shards.load(name).dtype == tensor.dtype
        assert torch.equal(shards.load(name), tensor)
        assert torch.equal(library[name], tensor)


def test_two_writes_are_the_same_bytes(tmp_path: Path) -> None:
    """The file is a function of the tensors: their order does not matter, and the metadata is one key."""
    write_safetensors(tmp_path / "one", TENSORS)
    write_safetensors(tmp_path / "two", dict(reversed(TENSORS.items())))
    content = (tmp_path / "one").read_bytes()
    assert content == (tmp_path / "two").read_bytes()
    assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_mode_follows_the_umask(umask: int, tmp_path: Path) -> None:
    """A file has the mode that any program's file has: 666 less the umask."""
    before = os.umask(umask)
    try:
        write_safetensors(tmp_path / "x", TENSORS)
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_file_that_changed_after_opening_is_refused(tmp_path: Path) -> None:
    """Loading from a file that is gone or was exchanged is an error with the tensor's name, not a crash."""
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b"short")):
        write_safetensors(tmp_path / "x", TENSORS)
        shards = open_file(tmp_path / "x")
        damage(tmp_path / "x")
        with pytest.raises(ModelError, match="x: a: cannot be read"):
            shards.load("a")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A file that is not there is an error of the class asked for."""
    with pytest.raises(AdapterError, match="cannot be read: No such file"):
        open_file(tmp_path / "absent", AdapterError)


@pytest.fixture
def sharded(tmp_path: Path) -> Callable[..., Path]:
    """A folder of two shards with an index; `changes` go into its weight_map."""
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

    def folder(changes: dict[str, Any] | None = None) -> Path:
        write_safetensors(tmp_path / names[0], {name: TENSORS[name] for name in ("a", "c")})
        write_safetensors(tmp_path / names[1], {"b.weight": TENSORS["b.weight"]})
        weight_map = {"a": names[0], "c": names[0], "b.weight": names[1], **(changes or {})}
        weight_map = {name: shard for name, shard in weight_map.items() if shard is not None}
        (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
        return tmp_path

    return folder


def test_shards_are_one_set_of_tensors(sharded: Callable[..., Path]) -> None:
    """A sharded folder gives the tensors of all its shards by name; other files may lie beside them."""
    folder = sharded()
    write_safetensors(folder / "consolidated.safetensors", TENSORS)
    shards = open_folder(folder)
    assert shards.shapes.keys() == {"a", "b.weight", "c"}
    assert shards.dtypes["b.weight"] == "BF16"
    for name in shards.shapes:
        assert torch.equal(shards.load(name), TENSORS[name])


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    """Without an index, the folder's weights are model.safetensors."""
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    assert open_folder(tmp_path).shapes.keys() == TENSORS.keys()


@pytest.mark.parametrize("index", [False, True])
def test_a_models_folder_may_hold_bytes(index: bool, tmp_path: Path) -> None:
    """U8 and I8, of which quantised weights are made, are read bit for bit from a model's folder; no wider integer."""
    shard = "model-00001-of-00001.safetensors" if index else "model.safetensors"
    tensors = {**TENSORS, **INTEGERS}
    write_safetensors(tmp_path / shard, tensors)
    if index:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
    shards = open_folder(tmp_path)
    assert [shards.dtypes[name] for name in INTEGERS] == ["U8", "I8"]
    for name, tensor in tensors.items():
        assert shards.load(name).dtype == tensor.dtype
        assert torch.equal(shards.load(name), tensor)
    safetensors.torch.save_file({**tensors, "wide": torch.zeros(2, dtype=torch.int16)}, tmp_path / shard)
    with pytest.raises(ModelError, match="wide: has dtype 'I16', which is not read"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/model.safetensors", "model/a.safetensors", "x", 5, ["a"]]
)
def test_shard_names_are_plain(shard: Any, sharded: Callable[..., Path]) -> None:
    """An index that names anything but a model*.safetensors file of the same folder is refused."""
    with pytest.raises(ModelError, match=rf"{INDEX}: a: .*is not the plain name of a shard"):
        open_folder(sharded({"a": shard}))


def test_index_and_shards_must_agree(sharded: Callable[..., Path]) -> None:
    """Every tensor that index and shards do not both have is listed, with its file."""
    with pytest.raises(Faults) as caught:
        open_folder(sharded({"c": None, "d": "model-00002-of-00002.safetensors"}))
    lines = caught.value.lines()
    assert len(lines) == 2
    assert "model-00001-of-00002.safetensors: c: " in lines[0]
    assert "model-00002-of-00002.safetensors: d: " in lines[1]


def test_shards_missing_and_too_many_are_listed(sharded: Callable[..., Path]) -> None:
    """Shards that the index names and the folder lacks, and the other way round, are all listed."""
    folder = sharded({"d": "model-00003-of-00003.safetensors", "e": "model-00004-of-00004.safetensors"})
    write_safetensors(folder / "model.safetensors", TENSORS)
    with pytest.raises(Faults) as caught:
        open_folder(folder)
    assert [fault.place.rsplit(": ", 1)[-1].rsplit("/", 1)[-1] for fault in caught.value.faults] == [
        "model-00003-of-00003.safetensors",
        "model-00004-of-00004.safetensors",
        "model.safetensors",
    ]


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "{"])
def test_a_broken_index_is_refused(content: str, tmp_path: Path) -> None:
    """An index without a table of tensors and files is one error that names it."""
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ModelError, match=INDEX):
        open_folder(tmp_path)


def test_folders_without_safetensors_are_refused(tmp_path: Path) -> None:
    """An empty folder is refused, and one with pickled weights says that those are not read."""
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match="pickled weights"):
        open_folder(tmp_path)


def test_a_streamed_file_is_read_by_the_library(tmp_path):
    """Tensors made one at a time come back with their values, and the file passes every check; wide ones stand first,
    as the library has them, so that none lies askew."""
    kinds = {"b": torch.bfloat16, "a": torch.float32, "c": torch.float16, "d": torch.uint8, "e": torch.float32}
    shapes = {"b": (3, 5), "a": (7,), "c": (2, 2, 2), "d": (5,), "e": (1,)}
    tensors = {name: torch.randn(shapes[name]).mul(3).abs().to(kind) for name, kind in kinds.items()}
    codes = {"b": "BF16", "a": "F32", "c": "F16", "d": "U8", "e": "F32"}
    asked = []

    def load(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    path = tmp_path / "model.safetensors"
    stream_safetensors(path, {name: (shapes[name], code) for name, code in codes.items()}, load)
    assert asked == ["a", "e", "b", "c", "d"]
    found = safetensors.torch.load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert open_file(path, dtypes=BYTES).dtypes == codes
