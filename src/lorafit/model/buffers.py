"""Buffers of activations that go round: the next layer, and the next step, write where the last ones have written.

Fresh memory costs a page fault for every 4 KiB, which peers pay for in each step again (18 to 97 s of system time in
runs of 50 to 120 s, measured), and a heap of many sizes falls to pieces. What is taken must be given back: it is kept
alive until then.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


def expect(tokens: int) -> None:
    """Make every buffer that is made from now on large enough for packs of so many tokens. What no pack touches of it
    is not in memory."""
    _own.tokens = tokens


def take(rows: int, columns: int, like: Tensor, most: int | None = None) -> Tensor:
    """A contiguous (rows, columns) tensor with any values, in the dtype and on the device of `like`.

    most: rows that it is made for; the pack's tokens that are expected, if not given.
    """
    mine = _own.free.get((columns, like.dtype, like.device), [])
    flat = mine.pop() if mine else None
    if flat is None or len(flat) < rows:  # one that is too small goes
        flat = like.new_empty(max(rows, _own.tokens if most is None else most), columns)
    _own.taken[flat.data_ptr()] = flat
    # no view of it: autograd would take writing into one use of it for a change of the other's values
    return like.new_empty(0).set_(flat.untyped_storage(), 0, (rows, columns), (columns, 1))


def give(*tensors: Tensor | None) -> None:
    """Nobody reads these any more: those that were taken are taken again. None, and what others made, is left alone."""
    for tensor in tensors:
        flat = None if tensor is None else _own.taken.pop(tensor.data_ptr(), None)
        if flat is not None:
            _own.free.setdefault((flat.shape[1], flat.dtype, flat.device), []).append(flat)


def forget() -> None:
    """Free the buffers that wait to be taken; new ones are made when they are needed."""
    _own.free.clear()


def is_taken(tensor: Tensor) -> bool:
    """Whether this is a buffer that somebody has to give back."""
    return tensor.data_ptr() in _own.taken


def taken() -> int:
    """How many buffers are taken."""
    return len(_own.taken)


def free_bytes() -> int:
    """Bytes of the buffers that wait to be taken."""
    return sum(flat.nbytes for flats in _own.free.values() for flat in flats)


class _Buffers(threading.local):
    """Of one thread: by columns, dtype and device those that are free; by address those that are taken."""

    def __init__(self) -> None:
        self.tokens = 0
        self.free: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}
        self.taken: dict[int, Tensor] = {}


_own = _Buffers()
