"""One buffer that every weight is unpacked into, just before its product: it is never larger than one block of rows."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_own = threading.local()


def scratch(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A (rows, columns) buffer with any values; the next call of this thread hands out the same memory again."""
    size = rows * columns * dtype.itemsize
    held: Tensor | None = getattr(_own, "buffer", None)
    if held is None or held.nbytes < size:
        _own.buffer = None  # the old one goes before the new one comes
        _own.buffer = held = torch.empty(size, dtype=torch.uint8)
    return held[:size].view(dtype).view(rows, columns)
