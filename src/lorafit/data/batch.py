"""Packing: the rows of one optimizer step laid end to end in few sequences, without a pad token.

Rows are never mixed across steps and never split. Where a row stands in its pack changes no number: attention stays
within the row (`documents`), positions restart, dropout's mask follows the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Tokens(Protocol):
    """What packing needs of a row: its token ids and which of them are trained, equally long."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def trained(self) -> Sequence[bool]: ...


@dataclass(frozen=True)
class Pack:
    """Rows in one sequence of T tokens. Arrays are int64; `documents` are the rows' bounds (0, end_1, ..., T)."""

    ids_T: np.ndarray
    positions_T: np.ndarray
    rows_T: np.ndarray
    documents: tuple[int, ...]
    numbers: tuple[int, ...]
    predictors_N: np.ndarray
    targets_N: np.ndarray
    """predictors_N: places whose next token is trained; targets_N: those next tokens."""


def pack_rows(rows: Sequence[Tokens], numbers: Sequence[int], budget: int, together: bool = True) -> list[Pack]:
    """The rows `numbers` in the fewest packs of at most `budget` tokens that first fit decreasing finds, evenly filled,
    so that no product is small.

    A row longer than the budget is a pack of its own. together=False: one row per pack. A pure function of its
    arguments, so that a resumed run cuts a step as the first run did.
    """
    packs = cut({n: len(rows[n].ids) for n in numbers}, budget, together)
    return [_pack([rows[n] for n in members], members) for members in packs]


def cut(lengths: Mapping[int, int], budget: int, together: bool = True) -> list[list[int]]:
    """The numbers of the rows in each pack, from the tokens of each row alone; see `pack_rows`."""
    sizes = sorted(lengths.items(), key=lambda item: (-item[1], item[0]))
    if not together:
        return [[number] for number, _ in sizes]
    packs = _first_fit(sizes, budget)
    return _even(sizes, len(packs), budget) or packs


def _first_fit(sizes: Sequence[tuple[int, int]], budget: int) -> list[list[int]]:
    """Each row into the first pack that has room; a new one where none has."""
    packs: list[tuple[int, list[int]]] = []
    for number, length in sizes:
        for place, (used, members) in enumerate(packs):
            if used + length <= budget:
                packs[place] = (used + length, [*members, number])
                break
        else:
            packs.append((length, [number]))
    return [members for _, members in packs]


def _even(sizes: Sequence[tuple[int, int]], count: int, budget: int) -> list[list[int]] | None:
    """Each row into the emptiest of `count` packs; None where one would then hold more than the budget."""
    used, packs = [0] * count, [list[int]() for _ in range(count)]
    for number, length in sizes:
        place = used.index(min(used))
        if packs[place] and used[place] + length > budget:
            return None
        used[place] += length
        packs[place].append(number)
    return packs


def _pack(rows: Sequence[Tokens], numbers: Sequence[int]) -> Pack:
    lengths = [len(row.ids) for row in rows]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([np.asarray(row.ids, dtype=np.int64) for row in rows])
    trained = np.concatenate([np.asarray(row.trained, dtype=bool) for row in rows])
    trained[bounds[:-1]] = False  # nothing in the row predicts its first token
    targets = np.flatnonzero(trained)
    return Pack(
        ids_T=ids,
        positions_T=np.concatenate([np.arange(n) for n in lengths]),
        rows_T=np.repeat(np.asarray(numbers, dtype=np.int64), lengths),
        documents=tuple(int(b) for b in bounds),
        numbers=tuple(numbers),
        predictors_N=targets - 1,
        targets_N=ids[targets],
    )
