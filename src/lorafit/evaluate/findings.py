"""What the training data looks like: how long its rows are, how much of them is trained, what was odd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorafit.data.rows import Problem, Rows

BINS, SHOWN = 12, 20


def findings(data: Rows) -> dict[str, Any]:
    """Lengths in tokens (least, median, largest, a histogram of rows) and the first problems with their places."""
    lengths = sorted(len(row.ids) for row in data.rows)
    return {
        "lengths": {
            "shortest": lengths[0],
            "median": lengths[len(lengths) // 2],
            "longest": lengths[-1],
            **histogram(lengths),
        },
        "problems": [{"place": place, "what": what} for place, what in shown(data.problems)],
        "problem_count": len(data.problems),
    }


def shown(problems: Sequence[Problem]) -> Sequence[Problem]:
    """The first of them."""
    return problems[:SHOWN]


def histogram(lengths: Sequence[int]) -> dict[str, Any]:
    """Rows per bin of `width` tokens, 1, 2 or 5 x 10^n; the first bin begins at `start`, a multiple of it."""
    low, high = min(lengths), max(lengths)
    rough, power = (high - low + 1) / BINS, 1
    while power * 10 <= rough:
        power *= 10
    width = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    start = low // width * width
    counts = [0] * ((high - start) // width + 1)
    for length in lengths:
        counts[(length - start) // width] += 1
    return {"start": start, "width": width, "counts": counts}
