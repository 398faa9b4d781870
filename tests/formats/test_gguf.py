"""The laws of lorafit.formats.gguf: what a valid file holds comes out exactly; no other file is read."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants

from builders.gguf_files import array_key, gguf_bytes, number_key, string_key, tensor_info, text
from lorafit.errors import ModelError
from lorafit.formats.gguf import OTHER_TYPES, GgufFile, read_gguf
from lorafit.kernels import BLOCK_TYPES

F32 = 0
ARCH = string_key("general.architecture", "llama")
FLOATS = np.arange(64, dtype="<f4").tobytes()  # 256 bytes


def read(tmp_path: Path, content: bytes) -> GgufFile:
    """The reader's view of a file with these bytes."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return read_gguf(path)


def two_tensors(second_offset: int = 128) -> bytes:
    """A small valid file: three keys, tensors `a` and `b` of 32 floats each."""
    keys = [ARCH, number_key("llama.block_count", "I", 2), array_key("tokens", 8, 2, text("x") + text("yz"))]
    infos = [tensor_info("a", [8, 4], F32, 0), tensor_info("b", [32], F32, second_offset)]
    return gguf_bytes(keys, infos, FLOATS)


def one_key(*keys: bytes) -> bytes:
    return gguf_bytes([ARCH, *keys])


def one_tensor(*infos: bytes, data: bytes = FLOATS[:128]) -> bytes:
    return gguf_bytes([ARCH], infos, data)


BIG = 1 << 62
NAME_64 = "n" * 64
# What is wrong: the file, and words of the error, the key or tensor among them.
MALFORMED = {
    "empty": (b"", "no GGUF file: it begins with b''"),
    "another format": (b"PK\x03\x04 and so on", r"no GGUF file: it begins with b'PK\x03\x04'"),
    "magic only": (b"GGUF", "version cannot fit"),
    "bad magic": (gguf_bytes([ARCH], magic=b"GGUX"), "begins with b'GGUX'"),
    "version 1": (gguf_bytes([ARCH], version=1), "GGUF version 1"),
    "version 4": (gguf_bytes([ARCH], version=4), "GGUF version 4"),
    "big-endian": (gguf_bytes([ARCH], version=3 << 24), "GGUF big-endian, version 3"),
    "header cut": (gguf_bytes()[:20], "number of keys cannot fit"),
    "n_keys too big": (gguf_bytes([ARCH], n_keys=BIG), f"{BIG} keys and 0 tensors cannot fit"),
    "n_tensors too big": (gguf_bytes([ARCH], n_tensors=BIG), f"1 keys and {BIG} tensors cannot fit"),
    "n_keys too big by one": (gguf_bytes([ARCH], n_keys=2), "cannot fit"),
    "key too long for the file": (gguf_bytes([struct.pack("<Q", BIG) + b"x" * 20]), "key 1 is longer than the file"),
    "key over 64 KiB": (one_key(string_key("k" * 65537, "v")), "the name of key 2 has 65537 bytes"),
    "empty key": (one_key(string_key("", "v")), "the name of key 2 has 0 bytes"),
    "key not UTF-8": (one_key(string_key(b"k\xff", "v")), "the name of key 2 is not UTF-8"),
    "duplicate key": (one_key(ARCH), "general.architecture: is there twice"),
    "unknown value type": (one_key(text("k") + struct.pack("<IQ", 13, 1)), "k: has the unknown value type 13"),
    "unknown element type": (one_key(array_key("k", 99, 1, b"123")), "k: has the unknown value type 99"),
    "array of arrays": (one_key(array_key("k", 9, 1, struct.pack("<IQ", 4, 0))), "k: is an array of arrays"),
    "array of 2^40 numbers": (one_key(array_key("k", 0, 1 << 40)), f"k: {1 << 40} x uint8 cannot fit"),
    "array of 2^40 strings": (one_key(array_key("k", 8, 1 << 40)), f"k: {1 << 40} x string cannot fit"),
    "array of 2^64-1 doubles": (one_key(array_key("k", 12, (1 << 64) - 1)), " x float64 cannot fit"),
    "array longer by one": (one_key(array_key("k", 4, 3, bytes(8))), "k: 3 x uint32 cannot fit"),
    "string longer than the file": (one_key(text("k") + struct.pack("<IQ", 8, BIG)), "k: a string is longer"),
    "string in an array cut": (
        one_key(array_key("k", 8, 2, text("x") + struct.pack("<Q", 9))),
        "k: a string is longer",
    ),
    "value not UTF-8": (one_key(string_key("k", b"ab\xff")), "k: a string is not UTF-8: invalid start byte at byte"),
    "bool of 2": (one_key(text("k") + struct.pack("<IB", 7, 2)), "k: holds the bool 2"),
    "bool of 2 in an array": (one_key(array_key("k", 7, 3, b"\0\1\2")), "k: holds the bool 2"),
    "value cut": (one_key(number_key("k", "Q", 1))[:-1], "k: 1 x uint64 cannot fit"),
    "alignment 13": (one_key(number_key("general.alignment", "I", 13)), "general.alignment: is 13, not a power"),
    "alignment 0": (one_key(number_key("general.alignment", "I", 0)), "general.alignment: is 0, not a power"),
    "alignment 2^31": (one_key(number_key("general.alignment", "I", 1 << 31)), "not a power of two from 8 to 65536"),
    "alignment of type uint64": (one_key(number_key("general.alignment", "Q", 32)), "has type uint64, not uint32"),
    "alignment of type string": (one_key(string_key("general.alignment", "32")), "has type string, not uint32"),
    "no dimensions": (one_tensor(tensor_info("t", [], F32, 0) + bytes(8)), "t: has 0 dimensions"),
    "five dimensions": (one_tensor(tensor_info("t", [1, 1, 1, 1, 1], F32, 0)), "t: has 5 dimensions"),
    "2^32-1 dimensions": (one_tensor(tensor_info("t", [1], F32, 0, n_dims=(1 << 32) - 1)), "t: has 4294967295"),
    "dimension of zero": (one_tensor(tensor_info("t", [32, 0], F32, 0)), "t: has shape [0, 32]"),
    "dimension too big": (one_tensor(tensor_info("t", [BIG], F32, 0)), "t: needs bytes"),
    "product over 2^64": (one_tensor(tensor_info("t", [1 << 32, 1 << 32, 1 << 32, 4], F32, 0)), "t: needs bytes"),
    "product wraps to 32": (one_tensor(tensor_info("t", [32, (1 << 59) + 1], F32, 0)), "t: needs bytes"),
    "row not divisible": (one_tensor(tensor_info("t", [40, 2], 2, 0)), "t: has rows of 40, which Q4_0 blocks of 32"),
    "unknown tensor type": (one_tensor(tensor_info("t", [32], 99, 0)), "t: has the unknown type 99"),
    "removed tensor type": (one_tensor(tensor_info("t", [32], 4, 0)), "t: has the unknown type 4"),
    "IQ2_XXS": (one_tensor(tensor_info("t", [256], 16, 0)), "t: has type IQ2_XXS, which is not supported yet"),
    "duplicate tensor": (one_tensor(*[tensor_info("t", [8], F32, 0)] * 2), "t: is there twice"),
    "tensor name of 65 bytes": (one_tensor(tensor_info(NAME_64 + "n", [32], F32, 0)), "tensor 1 has 65 bytes"),
    "tensor name not UTF-8": (one_tensor(tensor_info(b"\xc3", [32], F32, 0)), "the name of tensor 1 is not UTF-8"),
    "offset not aligned": (one_tensor(tensor_info("t", [24], F32, 8)), "t: has offset 8, which is not aligned to 32"),
    "offset past the end": (one_tensor(tensor_info("t", [32], F32, 1 << 40)), "t: needs bytes"),
    "offset of 2^64-32": (one_tensor(tensor_info("t", [32], F32, (1 << 64) - 32)), "t: needs bytes"),
    "overlap": (two_tensors(second_offset=96), "b: overlaps 'a'"),
    "data cut": (two_tensors()[:-1], "b: needs bytes"),
    "infos cut": (two_tensors()[:200], "the name of tensor 2 is longer"),
    "trailing bytes": (two_tensors() + bytes(32), "goes on for 32 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(case: str, tmp_path: Path) -> None:
    """Each malformed file is one ModelError of one line that names the file, the place and the value."""
    content, words = MALFORMED[case]
    with pytest.raises(ModelError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/model.gguf")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(("code", "name"), OTHER_TYPES.items())
def test_other_types_are_refused_by_name(code: int, name: str, tmp_path: Path) -> None:
    """Each ggml type that is not read yet is named in the error, by gguf-py's name for its number."""
    assert GGMLQuantizationType(code).name == name
    with pytest.raises(ModelError, match=f"t: has type {name}, which is not supported yet"):
        read(tmp_path, one_tensor(tensor_info("t", [256], code, 0)))


def test_every_type_of_ggml_is_known() -> None:
    """A tensor type is read, or known by name: none of gguf-py's is missing."""
    assert {kind.value for kind in GGMLQuantizationType} == set(OTHER_TYPES) | {b.code for b in BLOCK_TYPES.values()}


def test_mutants_are_refused_or_valid(tmp_path: Path) -> None:
    """500 damaged copies of a valid file are each refused in one line or read, within a second each."""
    generator = random.Random(0)
    whole = two_tensors()
    refused = 0
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(len(content))] = generator.choice([0, 1, 127, 255, generator.randrange(256)])
        if generator.random() < 0.2:
            del content[generator.randrange(len(content)) :]
        started, fault = time.perf_counter(), ""
        try:
            for tensor in read(tmp_path, bytes(content)).tensors.values():
                tensor.data.sum()
        except ModelError as error:
            fault = str(error)
        assert time.perf_counter() - started < 1
        assert fault.startswith(str(tmp_path) if fault else "")
        assert fault.isprintable()
        refused += bool(fault)
    assert 100 < refused < 500


@pytest.mark.parametrize("version", [2, 3])
def test_a_file_made_by_hand_is_read(version: int, tmp_path: Path) -> None:
    """Both versions are read: keys in order with their types, tensors as views with rows first."""
    file = read(tmp_path, two_tensors().replace(struct.pack("<I", 3), struct.pack("<I", version), 1))
    assert file.metadata == {"general.architecture": "llama", "llama.block_count": 2, "tokens": ["x", "yz"]}
    assert file.types == {"general.architecture": "string", "llama.block_count": "uint32", "tokens": "array of string"}
    assert list(file.tensors) == ["a", "b"]
    assert file.tensors["a"].shape == (4, 8)
    assert file.tensors["a"].data.shape == (4, 32)
    assert file.tensors["b"].data.shape == (1, 128)
    assert file.tensors["b"].nbytes == 128
    assert file.tensors["b"].data.tobytes() == FLOATS[128:]
    assert not file.tensors["a"].data.flags.owndata


def test_three_dimensions_lie_as_rows(tmp_path: Path) -> None:
    """A 3-D tensor (experts, rows, inputs) is one packed row per expert and row."""
    file = read(tmp_path, one_tensor(tensor_info("t", [4, 2, 3], F32, 0), data=FLOATS[:96]))
    assert file.tensors["t"].shape == (3, 2, 4)
    assert file.tensors["t"].data.shape == (6, 16)


def test_padding_after_the_last_tensor_is_no_fault(tmp_path: Path) -> None:
    """Writers pad the last tensor to the alignment; less than one alignment may follow."""
    content = one_tensor(tensor_info("t", [30], F32, 0), data=FLOATS[:128])
    assert read(tmp_path, content).tensors["t"].nbytes == 120


def test_values_of_every_type_come_back(tmp_path: Path) -> None:
    """Numbers of every type are Python's, exactly, alone and in arrays, at their limits."""
    limits = {"B": 255, "b": -128, "H": 65535, "h": -32768, "I": (1 << 32) - 1, "i": -(1 << 31)}
    limits |= {"Q": (1 << 64) - 1, "q": -(1 << 63), "f": 0.5, "d": 1e300, "?": True}
    codes = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "?": 7, "Q": 10, "q": 11, "d": 12}
    keys = [number_key(f"one.{kind}", kind, value) for kind, value in limits.items()]
    for kind, value in limits.items():
        keys.append(array_key(f"three.{kind}", codes[kind], 3, struct.pack(f"<3{kind}", value, 0, value)))
    file = read(tmp_path, gguf_bytes(keys))
    for kind, value in limits.items():
        assert file.metadata[f"one.{kind}"] == value
        assert type(file.metadata[f"one.{kind}"]) is type(value)
        assert file.metadata[f"three.{kind}"] == [value, type(value)(0), value]


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_files_by_gguf_py_come_back(name: str, tmp_path: Path) -> None:
    """What gguf-py writes is read with the same keys, shapes, types and bytes."""
    kind = GGMLQuantizationType[name]
    weight = np.random.default_rng(0).standard_normal((3, 5, 64)).astype(np.float32)
    packed = {f"t{i}": quants.quantize(part, kind) for i, part in enumerate([weight[0, 0], weight[0], weight])}
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(7)
    writer.add_token_list(["a", "\u0120b", "\U0001f600", ""])
    writer.add_token_scores([0.0, -1.5, 2.0, 3.0])
    for tensor_name, data in packed.items():
        writer.add_tensor(tensor_name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "model.gguf")
    assert file.value("llama.block_count", int) == 7
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "\u0120b", "\U0001f600", ""]
    assert file.metadata["tokenizer.ggml.scores"] == [0.0, -1.5, 2.0, 3.0]
    assert [tensor.shape for tensor in file.tensors.values()] == [(64,), (5, 64), (3, 5, 64)]
    for tensor_name, data in packed.items():
        assert file.tensors[tensor_name].type == BLOCK_TYPES[name]
        assert file.tensors[tensor_name].data.tobytes() == data.tobytes()


def test_typed_access_names_the_key(tmp_path: Path) -> None:
    """A key that is missing or of another type is refused by name; a bool is no int, an int no float."""
    keys = [number_key("flag", "?", True), number_key("n", "I", 3), array_key("list", 4, 1, bytes(4))]
    file = read(tmp_path, gguf_bytes(keys))
    assert file.value("n", int) == 3
    assert file.value("absent", int, 5) == 5
    for key, kind, words in [
        ("absent", int, "absent: is missing"),
        ("flag", int, "flag: has type bool, not int"),
        ("n", float, "n: has type uint32, not float"),
        ("list", int, "list: has type array of uint32, not int"),
    ]:
        with pytest.raises(ModelError, match=words):
            file.value(key, kind)


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    """A missing file and a folder are ModelErrors too."""
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(ModelError, match="cannot be read"):
            read_gguf(path)


def test_a_hostile_name_stays_on_one_line(tmp_path: Path) -> None:
    """Control characters of a name are escaped in the error: nothing from a file reaches the terminal raw."""
    with pytest.raises(ModelError) as caught:
        read(tmp_path, one_key(text("\x1b[2J\nk") + struct.pack("<I", 99)))
    assert str(caught.value).isprintable()


def test_a_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    """A quarter of a million tokens take less than a second: one pass, no work per byte."""
    tokens = b"".join(text(f"token{number}") for number in range(250_000))
    content = gguf_bytes([array_key("tokens", 8, 250_000, tokens), array_key("types", 5, 250_000, bytes(1_000_000))])
    started = time.perf_counter()
    file = read(tmp_path, content)
    assert time.perf_counter() - started < 1
    assert file.metadata["tokens"][-1] == "token249999"
