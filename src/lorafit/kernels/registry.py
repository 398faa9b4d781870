"""How our operators become torch's: `torch.ops.lorafit.*`, each with a CPU kernel and a fake.

Operators write into tensors that they are given, so that their fakes do nothing and no caller meets a buffer of ours.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from lorafit.kernels import native

LIBRARY = torch.library.Library("lorafit", "DEF")
TYPES = {torch.float32: 0, torch.bfloat16: 1}  # a dtype's number in native/lorafit.h


def is_plain(tensor: Tensor) -> bool:
    """Whether nobody looks on: then the dispatcher's 6 microseconds a call are saved, which decoding would feel."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def address(tensor: Tensor | None) -> int | None:
    """Where the tensor's values begin; None for None."""
    return None if tensor is None else tensor.data_ptr()


def native_for(tensor: Tensor) -> ctypes.CDLL | None:
    """The native library, where it computes with this tensor: on the CPU, in fp32 or bf16."""
    return native.library() if tensor.device.type == "cpu" and tensor.dtype in TYPES else None


def writes(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function of tensors an operator that only writes into its arguments; schema: `name(Tensor x, ...)`.

    The first argument says on which device it runs; other devices than the CPU have the function run as it is.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(f"{schema} -> ()")
    torch.library.register_fake(f"lorafit::{name}", lambda *arguments: None, lib=LIBRARY)

    def register(function: Callable[..., None]) -> Callable[..., None]:
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        operator = getattr(torch.ops.lorafit, name)

        def call(first: Tensor, *others: object) -> None:
            (function if is_plain(first) else operator)(first, *others)

        call.__doc__ = function.__doc__
        return call

    return register
