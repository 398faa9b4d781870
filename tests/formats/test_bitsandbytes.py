"""The laws of lorafit.formats.bitsandbytes: what bitsandbytes writes is read, what we write it reads, nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import safetensors.torch
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch import Tensor
from transformers import BitsAndBytesConfig

from lorafit.errors import ModelError
from lorafit.formats.bitsandbytes import (
    MAX_STATE,
    STATE,
    SUFFIXES,
    Nf4Parts,
    parts_of,
    quantization_config,
    read_nf4,
    write_nf4,
)
from lorafit.formats.safetensors import open_folder, write_safetensors
from lorafit.kernels.nf4 import quantise_nf4, quantise_scales, unpack_nf4, unpack_scales

NAME = "model.layers.0.mlp.up_proj.weight"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def matrix(rows: int = 100, width: int = 192) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))


def quantised(weight_OI: Tensor, double: bool = True) -> Nf4Parts:
    """The parts of a matrix by our own kernels."""
    codes, absmax = quantise_nf4(weight_OI)
    scales, nested, offset = quantise_scales(absmax) if double else (absmax, None, 0.0)
    return Nf4Parts(codes, scales, nested, offset, tuple(weight_OI.shape))


def values(parts: Nf4Parts) -> Tensor:
    """fp32 (O, I) of the parts."""
    scales = parts.scales if parts.nested is None else unpack_scales(parts.scales, parts.nested, parts.offset)
    return unpack_nf4(parts.codes, scales)


def linear_of(weight_OI: Tensor, double: bool) -> bitsandbytes.nn.Linear4bit:
    """bitsandbytes' own layer, quantised by it."""
    rows, width = weight_OI.shape
    layer = bitsandbytes.nn.Linear4bit(width, rows, bias=False, compress_statistics=double, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight_OI, compress_statistics=double, quant_type="nf4", module=layer)
    return layer.to("cpu")


def keys_of(weight_OI: Tensor, double: bool = True) -> dict[str, Tensor]:
    """What bitsandbytes saves of a layer, under our name."""
    state = linear_of(weight_OI, double).state_dict(prefix=NAME.removesuffix("weight"))
    return {key: tensor.data for key, tensor in state.items()}


def read(keys: dict[str, Tensor]) -> Nf4Parts:
    return read_nf4(keys.__getitem__, keys, NAME, "folder/model.safetensors")


def in_fp32(weight: Tensor, state: QuantState) -> Tensor:
    """bitsandbytes' values before it rounds them to the model's dtype."""
    state.dtype = torch.float32
    return dequantize_4bit(weight.data, state)


def same_bits(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), two.view(torch.int32))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (100, 192), (257, 640)])
def test_what_bitsandbytes_saves_is_read(
    shape: tuple[int, int], dtype: torch.dtype, double: bool, tmp_path: Path
) -> None:
    """A Linear4bit's state, in a folder, unpacks to the bits to which bitsandbytes unpacks it."""
    layer = linear_of(matrix(*shape).to(dtype), double)
    state = layer.state_dict(prefix=NAME.removesuffix("weight"))
    safetensors.torch.save_file({key: tensor.data for key, tensor in state.items()}, tmp_path / "model.safetensors")
    shards = open_folder(tmp_path)
    parts = read_nf4(shards.load, shards.shapes, NAME, str(tmp_path))
    assert set(shards.shapes) <= {NAME, *parts_of(NAME)}
    assert parts.shape == shape
    assert (parts.nested is not None) == double
    assert same_bits(values(parts), in_fp32(layer.weight, layer.weight.quant_state))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (100, 192), (257, 640)])
def test_what_we_write_bitsandbytes_loads(
    shape: tuple[int, int], dtype: torch.dtype, double: bool, tmp_path: Path
) -> None:
    """Our tensors are those that bitsandbytes saves for the matrix, byte for byte, and it unpacks them to our bits."""
    parts, name = quantised(matrix(*shape).to(dtype), double), str(dtype).removeprefix("torch.")
    write_safetensors(tmp_path / "model.safetensors", write_nf4(NAME, parts, name))
    ours = safetensors.torch.load_file(tmp_path / "model.safetensors")
    theirs = keys_of(matrix(*shape).to(dtype), double)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key
    weight = ours.pop(NAME)
    stats = {key.removeprefix(f"{NAME}."): tensor for key, tensor in ours.items()}
    param = bitsandbytes.nn.Params4bit.from_prequantized(weight, dict(stats), device="cpu")
    assert param.quant_state.dtype == dtype
    assert same_bits(in_fp32(param, param.quant_state), values(parts))
    assert same_bits(in_fp32(weight, QuantState.from_dict(dict(stats), device="cpu")), values(parts))


@pytest.mark.parametrize("double", [True, False])
def test_what_we_write_we_read(double: bool) -> None:
    """All parts come back, with bytes of codes and scales untouched."""
    parts = quantised(matrix(), double)
    again = read(write_nf4(NAME, parts, "bfloat16"))
    assert (again.shape, again.offset) == (parts.shape, parts.offset)
    for field in ("codes", "scales", "nested") if double else ("codes", "scales"):
        assert torch.equal(getattr(again, field), getattr(parts, field))


def test_a_file_takes_little_more_than_the_parts(tmp_path: Path) -> None:
    """Maps, JSON and header add less than 0.02 bits a weight to a matrix of a million."""
    weights = matrix(1024, 1024)
    write_safetensors(tmp_path / "x", write_nf4(NAME, quantised(weights), "bfloat16"))
    assert 4.127 < 8 * (tmp_path / "x").stat().st_size / weights.numel() < 4.15


def test_several_matrices_stand_in_one_file(tmp_path: Path) -> None:
    """The maps of one weight are no views of another's, which safetensors refuses to write."""
    parts = {"a": quantised(matrix(3)), "b": quantised(matrix(5))}
    tensors = {key: tensor for name in parts for key, tensor in write_nf4(name, parts[name], "float32").items()}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    shards = open_folder(tmp_path)
    assert len(shards.shapes) == 12
    for name in parts:
        assert same_bits(values(read_nf4(shards.load, shards.shapes, name, "x")), values(parts[name]))


def test_the_configuration_is_that_of_transformers() -> None:
    """`quantization_config` is what transformers writes for NF4 with double quantisation, and reads again."""
    for dtype in ("float32", "bfloat16"):
        theirs = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        assert quantization_config(dtype) == json.loads(json.dumps(theirs.to_dict()))
        assert BitsAndBytesConfig.from_dict(quantization_config(dtype)).to_dict() == theirs.to_dict()
    assert quantization_config() == quantization_config("float32")


def test_suffixes_are_those_that_transformers_collects() -> None:
    """The keys of a weight are the ones by which transformers knows a 4-bit weight."""
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    assert {"weight" + suffix for suffix in ("", *SUFFIXES)} == set(Bnb4BitHfQuantizer.serialized_names["weight"])


def with_state(**changes: Any) -> Callable[[dict[str, Tensor]], None]:
    """Changes fields of the JSON; None removes one."""

    def change(keys: dict[str, Tensor]) -> None:
        state = json.loads(bytes(keys[NAME + STATE].tolist())) | changes
        put({key: value for key, value in state.items() if value is not None})(keys)

    return change


def put(state: Any) -> Callable[[dict[str, Tensor]], None]:
    """Puts another JSON, or bytes, in place of the right one."""
    content = state if isinstance(state, bytes) else json.dumps(state).encode()
    return lambda keys: keys.update({NAME + STATE: torch.tensor(list(content), dtype=torch.uint8)})


def without(suffix: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda keys: keys.__delitem__(NAME + suffix)


def changed(suffix: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda keys: keys.update({NAME + suffix: change(keys[NAME + suffix].clone())})


def first(value: float) -> Callable[[Tensor], Tensor]:
    """Puts the value in the first place."""
    return lambda tensor: tensor.index_fill(0, torch.tensor([0]), value)


# What is wrong: the change to good keys, the suffix that the error names, and words of it.
MALFORMED: dict[str, tuple[Callable[[dict[str, Tensor]], None], str, str]] = {
    "no state": (without(STATE), STATE, "is missing"),
    "FP4 beside it": (
        lambda keys: keys.update({f"{NAME}.quant_state.bitsandbytes__fp4": keys[NAME + STATE]}),
        ".quant_state.bitsandbytes__fp4",
        "the weight is in FP4, which is not read; quantise the model again",
    ),
    "FP4 in the state": (with_state(quant_type="fp4"), STATE, 'its quant_type is "fp4", which is not read'),
    "blocks of 128": (with_state(blocksize=128), STATE, "its blocksize is 128, which is not read"),
    "nested blocks of 64": (with_state(nested_blocksize=64), STATE, "its nested_blocksize is 64"),
    "nested in half": (with_state(nested_dtype="float16"), STATE, 'its nested_dtype is "float16"'),
    "unpacked to int": (with_state(dtype="int8"), STATE, 'its dtype is "int8"'),
    "offset of text": (with_state(nested_offset="1"), STATE, 'its nested_offset is "1"'),
    "offset NaN": (with_state(nested_offset=float("nan")), STATE, "its nested_offset is NaN"),
    "offset over fp32": (with_state(nested_offset=1e39), STATE, "its nested_offset is 1e+39"),
    "offset a bool": (with_state(nested_offset=True), STATE, "its nested_offset is true"),
    "no offset": (with_state(nested_offset=None), STATE, "its field 'nested_offset' is missing"),
    "no shape": (with_state(shape=None), STATE, "its field 'shape' is missing"),
    "a field more": (with_state(code="x"), STATE, "its field 'code' is unknown"),
    "shape of one": (with_state(shape=[19200]), STATE, "its shape is [19200], which is not read"),
    "shape of floats": (with_state(shape=[100.0, 192]), STATE, "its shape is [100.0, 192]"),
    "shape of nothing": (with_state(shape=[0, 192]), STATE, "its shape is [0, 192]"),
    "shape over 2^31": (with_state(shape=[1 << 40, 64]), STATE, "its shape is [1099511627776, 64]"),
    "broken blocks": (with_state(shape=[192, 100]), STATE, "whose rows are no whole blocks of 64"),
    "another shape": (with_state(shape=[100, 256]), ".absmax", "is torch.uint8 [300], and the weight needs"),
    "JSON that is none": (put(b"{]"), STATE, "its JSON does not read"),
    "not UTF-8": (put(b"\xff"), STATE, "its JSON does not read: 'utf-8' codec"),
    "JSON too deep": (put(b"[" * MAX_STATE), STATE, "its JSON does not read"),
    "a list": (put([]), STATE, "its JSON is a list, not an object"),
    "too much JSON": (put(b" " * (MAX_STATE + 1)), STATE, "is torch.uint8 [4097], not at most 4096 bytes"),
    "state of floats": (changed(STATE, Tensor.float), STATE, "is torch.float32 ["),
    "no scales": (without(".absmax"), ".absmax", "is missing"),
    "no map": (without(".quant_map"), ".quant_map", "is missing"),
    "no nested scales": (without(".nested_absmax"), ".nested_absmax", "is missing"),
    "no nested map": (without(".nested_quant_map"), ".nested_quant_map", "is missing"),
    "another map": (changed(".quant_map", first(-0.99)), ".quant_map", "is not the map of levels"),
    "another nested map": (changed(".nested_quant_map", first(-1.0)), ".nested_quant_map", "is not the map of levels"),
    "a map of 17": (changed(".quant_map", lambda t: torch.cat([t, t[:1]])), ".quant_map", "is torch.float32 [17]"),
    "a map in half": (changed(".quant_map", Tensor.half), ".quant_map", "is torch.float16 [16]"),
    "scale codes signed": (changed(".absmax", Tensor.char), ".absmax", "is torch.int8 [300]"),
    "nested scale too few": (changed(".nested_absmax", lambda t: t[:1]), ".nested_absmax", "and the weight needs"),
    "nested scale NaN": (changed(".nested_absmax", first(float("nan"))), ".nested_absmax", "holds NaN or infinity"),
    "codes cut": (
        changed("", lambda t: t[:-1]),
        "",
        "is torch.uint8 [9599, 1], and the weight needs torch.uint8 [9600",
    ),
    "codes in a row": (changed("", lambda t: t.T), "", "is torch.uint8 [1, 9600]"),
    "codes stored as bf16": (changed("", lambda t: t.view(-1).view(torch.bfloat16)[:, None]), "", "is torch.bfloat16"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_keys_are_refused(case: str) -> None:
    """Each malformed set of keys is one ModelError of one line, with the file, the key and the value."""
    change, suffix, words = MALFORMED[case]
    keys = keys_of(matrix())
    change(keys)
    with pytest.raises(ModelError) as caught:
        read(keys)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"folder/model.safetensors: {NAME}{suffix}: ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("change", "suffix", "words"),
    [
        (changed(".absmax", first(float("inf"))), ".absmax", "holds NaN or infinity"),
        (changed(".absmax", Tensor.half), ".absmax", "is torch.float16 [300]"),
        (changed(".absmax", Tensor.byte), ".absmax", "is torch.uint8 [300], and the weight needs torch.float32 [300]"),
        (
            lambda keys: keys.update({f"{NAME}.nested_absmax": torch.zeros(2)}),
            ".nested_absmax",
            "is there, and the quantisation is not nested",
        ),
    ],
)
def test_malformed_plain_scales_are_refused(
    change: Callable[[dict[str, Tensor]], None], suffix: str, words: str
) -> None:
    """Without double quantisation the scales are finite fp32, and nothing nested lies beside them."""
    keys = keys_of(matrix(), double=False)
    change(keys)
    with pytest.raises(ModelError) as caught:
        read(keys)
    assert str(caught.value).startswith(f"folder/model.safetensors: {NAME}{suffix}: ")
    assert words in str(caught.value)
