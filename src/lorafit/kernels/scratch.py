"""Memory that is handed out again and again: what a weight is unpacked into, just before its product and never more
than a block of rows, and what attention's threads work in. Fresh memory costs a page fault for every 4 KiB, each time.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_own = threading.local()


def room(name: str, size: int, device: torch.device) -> Tensor:
    """At least `size` bytes with any values; this thread's next call under the name hands out the same memory again."""
    buffers: dict[tuple[str, torch.device], Tensor] = _own.__dict__.setdefault("buffers", {})
    key = name, device
    if key not in buffers or len(buffers[key]) < size:
        buffers.pop(key, None)  # the old one goes before the new one comes
        buffers[key] = torch.empty(size, dtype=torch.uint8, device=device)
    return buffers[key]


def scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A (rows, columns) buffer with any values, the same memory for every weight."""
    size = rows * columns * dtype.itemsize
    return room("weights", size, device)[:size].view(dtype).view(rows, columns)
