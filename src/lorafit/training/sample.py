"""The rows that a start may look at (EVA's): the first of the run, through the model without a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn

from lorafit.data.batch import Tokens, pack_rows
from lorafit.data.order import order
from lorafit.training.step import pack_hidden

TOKENS, PACK = 4096, 1024  # looked at, and of these at once: whatever a run's own packs are, so that a start is one


@torch.no_grad()
def feed(model: nn.Module, rows: Sequence[Tokens], seed: int, together: bool) -> None:
    """Run the first rows of the run, in its order, until they have TOKENS tokens; together: as in `pack_rows`."""
    numbers = [int(number) for number in order(seed, 0, len(rows))]
    ends = accumulate(len(rows[number].ids) for number in numbers)
    count = next((place for place, end in enumerate(ends, 1) if end >= TOKENS), len(numbers))
    model.eval()
    for pack in pack_rows(rows, numbers[:count], PACK, together):
        pack_hidden(model, pack)
