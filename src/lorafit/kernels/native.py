"""The native CPU library (native/ in the sources): found, loaded after torch, and asked by ctypes.

It is absent where it was installed without a C++ compiler; then plain torch twins do the same work slowly. What they
unpack has the same bits; sums are taken in another order. LORAFIT_NATIVE=0 asks for the twins, LORAFIT_NATIVE=avx2 (or
another name of `paths`) for one processor path.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from functools import cache
from pathlib import Path

import torch  # first: its OpenMP threads are then the library's too, instead of a second team on the same cores

from lorafit.errors import ConfigError

FILE = "liblorafit_native.so"
VARIABLE = "LORAFIT_NATIVE"


class Weight(ctypes.Structure):
    """`lorafit_weight` of native/lorafit.h."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("scales_are_codes", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("nested", ctypes.c_void_p),
        ("dynamic", ctypes.c_void_p),
        ("offset", ctypes.c_float),
        ("first_row", ctypes.c_int64),
    )


_POINTER, _COUNT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_FLOAT, _WEIGHT = ctypes.c_float, ctypes.POINTER(Weight)


class Attention(ctypes.Structure):
    """`lorafit_attention` of native/lorafit.h."""

    _fields_ = (
        ("type", _INT),
        ("threads", _INT),
        *((name, _COUNT) for name in ("tokens", "documents", "heads", "key_heads", "dim", "window")),
        ("bounds", _POINTER),
        ("scale", _FLOAT),
        ("softcap", _FLOAT),
        *((name, _POINTER) for name in ("sinks", "q", "k", "v")),
        *((name, _COUNT) for name in ("q_apart", "k_apart", "v_apart")),
        ("out", _POINTER),
        ("out_apart", _COUNT),
        ("lse", _POINTER),
        ("grad_out", _POINTER),
        ("grad_out_apart", _COUNT),
        *((name, _POINTER) for name in ("dq", "dk", "dv")),
        *((name, _COUNT) for name in ("dq_apart", "dk_apart", "dv_apart")),
        ("partial", _POINTER),
        ("memory", _POINTER),
        ("room", _COUNT),
    )


_ATTENTION = ctypes.POINTER(Attention)
_FUNCTIONS = {
    "lorafit_unpack": (_INT, (_WEIGHT, _POINTER, _COUNT, _COUNT, _POINTER, _INT, _INT)),
    "lorafit_matvec": (_INT, (_WEIGHT, _POINTER, _COUNT, _POINTER, _COUNT, _POINTER, _INT, _INT)),
    "lorafit_first_bad_row": (_COUNT, (_WEIGHT, _INT)),
    "lorafit_quantise_nf4": (_INT, (_POINTER, _COUNT, _COUNT, _POINTER, _POINTER, _INT)),
    "lorafit_quantise_int8": (_INT, (_POINTER, _COUNT, _COUNT, _POINTER, _POINTER, _INT)),
    "lorafit_norm": (
        _INT,
        (_INT, _POINTER, _POINTER, _FLOAT, _POINTER, _FLOAT, _COUNT, _COUNT, _POINTER, _POINTER, _POINTER, _INT),
    ),
    "lorafit_norm_backward": (
        _INT,
        (_INT, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _COUNT, _COUNT, _POINTER, _INT),
    ),
    "lorafit_heads": (
        _INT,
        (_INT, _POINTER, _COUNT, _POINTER, _FLOAT, _POINTER, _POINTER, *[_COUNT] * 3, _POINTER, _COUNT, _INT),
    ),
    "lorafit_heads_backward": (
        _INT,
        (_INT, _POINTER, _COUNT, _POINTER, _COUNT, _POINTER, _FLOAT, _POINTER, _POINTER, *[_COUNT] * 3, _INT),
    ),
    "lorafit_gate": (_INT, (_INT, _INT, _POINTER, _POINTER, _COUNT, _COUNT, _COUNT, _POINTER, _INT)),
    "lorafit_gate_backward": (_INT, (_INT, _INT, _POINTER, _POINTER, _POINTER, _COUNT, _COUNT, _COUNT, _INT)),
    "lorafit_entropy": (_INT, (_INT, _POINTER, _POINTER, _COUNT, _COUNT, _FLOAT, _FLOAT, _INT, _POINTER, _INT)),
    "lorafit_attention_room": (_COUNT, (_ATTENTION, _INT)),
    "lorafit_attend": (_INT, (_ATTENTION,)),
    "lorafit_attend_backward": (_INT, (_ATTENTION,)),
    "lorafit_paths": (ctypes.c_char_p, ()),
    "lorafit_path": (ctypes.c_char_p, ()),
    "lorafit_use": (_INT, (ctypes.c_char_p,)),
}


PLAIN = "plain"  # the name of the twins, where a path's name is asked for
_chosen: dict[str, bool] = {}  # {"plain": True} once `use` has asked for the twins


def library() -> ctypes.CDLL | None:
    """The library with its processor path chosen; None where the plain twins do the work.

    Raises ConfigError when LORAFIT_NATIVE names a path that this machine does not have.
    """
    return None if _chosen.get(PLAIN) else _library()


@cache
def _library() -> ctypes.CDLL | None:
    wanted = os.environ.get(VARIABLE, "")
    file = _file()
    if wanted == "0" or file is None:
        return None
    found = ctypes.CDLL(str(file))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    if wanted not in ("", "1") and found.lorafit_use(wanted.encode()):
        names = found.lorafit_paths().decode()
        raise ConfigError(VARIABLE, f"names no kernels of this machine: {wanted!r}", f"give 0 or one of {names}")
    return found


def paths() -> list[str]:
    """Names of the processor paths that the library holds and this processor runs, best first; [] without it."""
    found = _library()
    return found.lorafit_paths().decode().split(",") if found else []


def path() -> str:
    """The name of the kernels in use: one of `paths`, or `plain`."""
    found = library()
    return PLAIN if found is None else found.lorafit_path().decode()


def best() -> str:
    """The path that `auto` means: what LORAFIT_NATIVE asks for, or the best there is."""
    wanted = os.environ.get(VARIABLE, "")
    return PLAIN if _library() is None else wanted if wanted not in ("", "1") else paths()[0]


def use(path: str) -> None:
    """Take this processor path, or `plain`, from now on. Raises ConfigError when this machine does not have it."""
    found = _library()
    if path != PLAIN and (found is None or found.lorafit_use(path.encode())):
        there = ", ".join([*paths(), PLAIN])
        raise ConfigError("--kernels", f"{path}, and this machine has {there}", "go on where the run was begun")
    _chosen[PLAIN] = path == PLAIN


def describe() -> tuple[str, str]:
    """(kernels in use, why): a processor path's name, or `plain torch`."""
    found = library()
    if found is not None:
        why = f"the best of {', '.join(paths())} that this processor has" if not os.environ.get(VARIABLE) else ""
        return found.lorafit_path().decode(), why or f"{VARIABLE}={os.environ[VARIABLE]}"
    if os.environ.get(VARIABLE) == "0":
        return "plain torch", f"{VARIABLE}=0"
    return "plain torch", "lorafit was installed without a C++ compiler: install one, then install lorafit again"


def shares_threads() -> bool:
    """Whether the library's OpenMP is the one that torch runs on, so that the two never compete for the cores."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        loaded = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    return len(loaded) <= 1 or _first_symbol_is_torchs()


def _first_symbol_is_torchs() -> bool:
    """Which of several OpenMP libraries a global lookup, and with it our library, comes to."""

    class Info(ctypes.Structure):
        _fields_ = (("file", ctypes.c_char_p), ("base", _POINTER), ("name", ctypes.c_char_p), ("at", _POINTER))

    everything = ctypes.CDLL(None)
    info = Info()
    address = ctypes.cast(everything.GOMP_parallel, _POINTER)
    everything.dladdr(address, ctypes.byref(info))
    return Path(os.fsdecode(info.file)).resolve().is_relative_to(Path(torch.__file__).resolve().parent.parent)


def _file() -> Path | None:
    """In the package, or, in an editable install, where the wheel's files are."""
    inside = Path(__file__).parents[1] / "lib" / FILE
    if inside.is_file():
        return inside
    try:
        installed = Path(str(importlib.metadata.distribution("lorafit").locate_file(f"lorafit/lib/{FILE}")))
    except importlib.metadata.PackageNotFoundError:
        return None
    return installed if installed.is_file() else None
