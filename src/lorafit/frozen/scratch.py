"""One buffer a device that every weight is unpacked into, just before its product: never more than a block of rows."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_own = threading.local()


def scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A (rows, columns) buffer with any values; the next call of this thread hands out the same memory again."""
    size = rows * columns * dtype.itemsize
    buffers: dict[torch.device, Tensor] = _own.__dict__.setdefault("buffers", {})
    if device not in buffers or buffers[device].nbytes < size:
        buffers.pop(device, None)  # the old one goes before the new one comes
        buffers[device] = torch.empty(size, dtype=torch.uint8, device=device)
    return buffers[device][:size].view(dtype).view(rows, columns)
