"""bitsandbytes' NF4 weights in safetensors files: six tensors for one matrix, or four without double quantisation.

    NAME                                  U8    (O * I / 2, 1)   two codes in a byte
    NAME.absmax                           U8    (O * I / 64,)    codes of the scales; or F32, the scales themselves
    NAME.quant_map                        F32   (16,)            NF4's levels
    NAME.nested_absmax                    F32   (n / 256,)       scales of the scales
    NAME.nested_quant_map                 F32   (256,)           levels of the scales' codes
    NAME.quant_state.bitsandbytes__nf4    U8                     JSON: the rest, shape and offset among it

Source: bitsandbytes 0.50, `functional.QuantState.as_dict`; transformers, `BitsAndBytesConfig`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit import formats
from lorafit.errors import ModelError
from lorafit.kernels.nf4 import BLOCK, DYNAMIC_CODE, NESTED, NF4_CODE

STATE, FP4_STATE = ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"
PLAIN_SUFFIXES = (".absmax", ".quant_map", STATE)
NESTED_SUFFIXES = (".nested_absmax", ".nested_quant_map")
SUFFIXES = (*PLAIN_SUFFIXES, *NESTED_SUFFIXES, FP4_STATE)
DTYPES = ("float32", "float16", "bfloat16")
MAX_STATE = 4096  # bytes of JSON; bitsandbytes writes some 180
REMEDY = "quantise the model again, to NF4 in blocks of 64"


@dataclass(frozen=True, eq=False)
class Nf4Parts:
    """One NF4 matrix as `lorafit.kernels.nf4` makes and unpacks it.

    codes: uint8 (O, I/2). scales: uint8 codes (O, I/64) with nested fp32 (ceil(O * I / 64 / 256),) and offset; or,
    without double quantisation, fp32 (O, I/64), nested None and offset 0. shape: (O, I).
    """

    codes: Tensor
    scales: Tensor
    nested: Tensor | None
    offset: float
    shape: tuple[int, int]


def parts_of(name: str) -> tuple[str, ...]:
    """The keys that may stand beside weight `name` in a file; a weight with any of them is bitsandbytes' in 4 bits."""
    return tuple(name + suffix for suffix in SUFFIXES)


def suffix_of(key: str) -> str:
    """The suffix by which a key is a part of another weight; empty for a weight's own key."""
    return next((suffix for suffix in SUFFIXES if key.endswith(suffix)), "")


def read_all(load: Callable[[str], Tensor], names: Collection[str], place: str) -> dict[str, Nf4Parts]:
    """Every 4-bit weight among the keys, by its name. Raises ModelError as `read_nf4` does."""
    owners = {name.removesuffix(suffix_of(name)): None for name in names if suffix_of(name)}
    return {name: read_nf4(load, names, name, place) for name in owners}


def read_nf4(load: Callable[[str], Tensor], names: Collection[str], name: str, place: str) -> Nf4Parts:
    """The parts of weight `name`, views of what `load` gives for a key; names: all keys; place: the file, for errors.

    Raises ModelError, naming file and key, for all but NF4 in blocks of 64 with whole blocks in a row: FP4, other
    sizes, other maps than NF4_CODE and DYNAMIC_CODE, parts missing or too many, scales that are not finite.
    """

    def fault(suffix: str, what: str, remedy: str = "the file is damaged; download it again") -> ModelError:
        return ModelError(formats.place(Path(place), name + suffix), what, remedy)

    def part(suffix: str, dtype: torch.dtype, *shape: int) -> Tensor:
        tensor = load(name + suffix)
        if tensor.dtype != dtype or tensor.shape != shape:
            what = f"is {tensor.dtype} {list(tensor.shape)}, and the weight needs {dtype} {list(shape)}"
            raise fault(suffix, what, REMEDY)
        if not bool(tensor.isfinite().all()):
            raise fault(suffix, "holds NaN or infinity")
        return tensor

    if name + FP4_STATE in names:
        raise fault(FP4_STATE, "the weight is in FP4, which is not read", REMEDY)
    if name + STATE not in names:
        raise fault(STATE, "is missing")
    try:
        state = _parse(load(name + STATE))
    except ValueError as error:
        raise fault(STATE, str(error), REMEDY) from None
    double = "nested_offset" in state
    expected = PLAIN_SUFFIXES + (NESTED_SUFFIXES if double else ())
    for suffix in SUFFIXES:
        if (name + suffix in names) != (suffix in expected):
            raise fault(suffix, "is missing" if suffix in expected else "is there, and the quantisation is not nested")
    rows, width = state["shape"]
    count = rows * width // BLOCK
    scales = part(".absmax", torch.uint8 if double else torch.float32, count)
    nested = part(".nested_absmax", torch.float32, -(-count // NESTED)) if double else None
    maps = {".quant_map": NF4_CODE} | ({".nested_quant_map": DYNAMIC_CODE} if double else {})
    for suffix, levels in maps.items():
        if not torch.equal(part(suffix, torch.float32, len(levels)), levels):
            raise fault(suffix, "is not the map of levels that bitsandbytes 0.50 writes", REMEDY)
    codes = part("", torch.uint8, rows * width // 2, 1)
    offset = float(state.get("nested_offset", 0.0))
    return Nf4Parts(codes.view(rows, -1), scales.view(rows, -1), nested, offset, (rows, width))


def write_nf4(name: str, parts: Nf4Parts, dtype: str) -> dict[str, Tensor]:
    """The tensors, by key, that bitsandbytes reads as weight `name`; dtype: what it unpacks to, such as bfloat16."""
    assert dtype in DTYPES, f"bitsandbytes unpacks to {', '.join(DTYPES)}, not {dtype}"
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": parts.shape}
    tensors = {
        name: parts.codes.reshape(-1, 1),
        f"{name}.absmax": parts.scales.reshape(-1),
        f"{name}.quant_map": NF4_CODE.clone(),  # safetensors refuses to write one tensor under two names
    }
    if parts.nested is not None:
        tensors |= {f"{name}.nested_absmax": parts.nested, f"{name}.nested_quant_map": DYNAMIC_CODE.clone()}
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": parts.offset}
    return tensors | {name + STATE: torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)}


def quantization_config(compute_dtype: str = "float32") -> dict[str, Any]:
    """config.json's `quantization_config` as transformers writes it for NF4 with double quantisation.

    compute_dtype: what bitsandbytes multiplies in; float32, transformers' default, is what lorafit does.
    """
    return {
        "quant_method": "bitsandbytes",
        "_load_in_8bit": False,
        "_load_in_4bit": True,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": None,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "load_in_4bit": True,
        "load_in_8bit": False,
    }


def _parse(tensor: Tensor) -> dict[str, Any]:
    """The checked fields of the JSON. Raises ValueError that says what is wrong with them."""
    if tensor.dtype != torch.uint8 or tensor.ndim != 1 or len(tensor) > MAX_STATE:
        raise ValueError(f"is {tensor.dtype} {list(tensor.shape)}, not at most {MAX_STATE} bytes of JSON")
    try:
        state = json.loads(bytes(tensor.tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its JSON does not read: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"its JSON is a {type(state).__name__}, not an object")
    allowed: dict[str, Callable[[Any], bool]] = {
        "quant_type": lambda value: value == "nf4",
        "blocksize": lambda value: value == BLOCK,
        "dtype": lambda value: value in DTYPES,
        "shape": lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_size, value)),
    }
    if any(str(key).startswith("nested_") for key in state):
        allowed |= {
            "nested_blocksize": lambda value: value == NESTED,
            "nested_dtype": lambda value: value == "float32",
            "nested_offset": _is_float,
        }
    if state.keys() != allowed.keys():
        wrong = sorted(state.keys() ^ allowed.keys())[0]
        raise ValueError(f"its field {wrong[:80]!a} is {'unknown' if wrong in state else 'missing'}")
    for key, value in state.items():
        if not allowed[key](value):
            raise ValueError(f"its {key} is {json.dumps(value)[:80]}, which is not read")
    if state["shape"][1] % BLOCK:
        raise ValueError(f"its shape is {state['shape']}, whose rows are no whole blocks of {BLOCK}")
    return state


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_float(value: Any) -> bool:
    """A finite number in fp32; not NaN, which compares false."""
    return type(value) in (int, float) and abs(value) <= torch.finfo(torch.float32).max
