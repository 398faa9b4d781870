"""Token rows made of random ids, for tests that need no text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Row:
    """The part of a token row that packing and training read."""

    ids: list[int]
    trained: list[bool]


def random_rows(lengths: list[int], vocabulary: int = 400, seed: int = 0, share: float = 0.6) -> list[Row]:
    """Rows of these lengths; about `share` of the tokens trained, the last one always."""
    random = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        trained = random.random(length) < share
        trained[-1] = True
        rows.append(Row(random.integers(3, vocabulary, length).tolist(), trained.tolist()))
    return rows
