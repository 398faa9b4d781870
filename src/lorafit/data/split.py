"""Held-out rows: chosen by the hash of what they say, so that neither order, place nor seed changes the choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from lorafit.data.records import Record, content_hash

FEWEST, MOST = 8, 200

R = TypeVar("R")


def split(rows: Sequence[R], fraction: float, key: Callable[[R], str]) -> tuple[list[R], list[R]]:
    """(training rows, evaluation rows), each in the order given; key: a hash of what a row says.

    `fraction` of the rows are held out, at least 8 and at most 200, never more than half of the distinct contents:
    those with the smallest hashes, one row each. Other rows of equal content are in neither part. 0 holds out none.
    """
    keys = [key(row) for row in rows]
    distinct = sorted(set(keys))
    wanted = min(max(round(fraction * len(rows)), FEWEST), MOST) if fraction > 0 else 0
    chosen = set(distinct[: min(wanted, len(distinct) // 2)])
    training: list[R] = []
    held_out: dict[str, R] = {}
    for row, at in zip(rows, keys, strict=True):
        if at in chosen:
            held_out.setdefault(at, row)
        else:
            training.append(row)
    return training, list(held_out.values())


def overlap(training: Sequence[Record], evaluation: Sequence[Record]) -> list[tuple[str, str]]:
    """(training place, evaluation place) for each evaluation row whose content is also trained on."""
    trained = {content_hash(record): record.place for record in reversed(training)}
    pairs = [(trained.get(content_hash(record)), record.place) for record in evaluation]
    return [(place, other) for place, other in pairs if place is not None]
