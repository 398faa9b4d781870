"""Loss curves of lorafit and of PEFT from the same start over the same rows, seed by seed.

PEFT's adapters are in fp32, as lorafit's are. Noise is how far two seeds' curves lie apart: they differ in the order
of the rows and in the adapter's start.
"""

from __future__ import annotations

import statistics
from itertools import combinations

from benchmarks.common import alternate, table
from benchmarks.comparison import Comparison

SETTINGS = {"rows": "padded", "adapters": "fp32", "malloc": "kept"}
END = 5  # steps whose mean loss counts as the end's


def losses(job: Comparison, steps: int) -> dict[str, list[float]]:
    """The losses of both sides, which take their steps in turn."""
    sides = {}
    try:
        for name, settings in (("lorafit", {}), ("peft", SETTINGS)):
            sides[name] = job.open(name, settings)
        found = alternate({name: side.step for name, side in sides.items()}, steps, warm_up=0)
    finally:
        for side in sides.values():
            side.end()
    return {name: [answer["loss"] for _, answer in times] for name, times in found.items()}


def curves_tables(curves: list[dict[str, list[float]]]) -> list[str]:
    """A table of the differences seed by seed, and a sentence on the noise; curves: one entry a seed."""
    rows, ends = [], []
    for seed, curve in enumerate(curves):
        ours, theirs = curve["lorafit"], curve["peft"]
        gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        end = [statistics.mean(values[-END:]) for values in (ours, theirs)]
        ends.append(end[0])
        figures = [ours[0], *end, max(gaps), statistics.mean(gaps)]
        rows.append([seed, *(f"{value:.4f}" for value in figures)])
    ends_of = [f"{name}, mean of the last {END}" for name in ("lorafit", "PEFT")]
    head = ["seed", "first loss", *ends_of, "largest difference", "mean difference"]
    noise = [
        abs(a - b) for one, two in combinations(curves, 2) for a, b in zip(one["lorafit"], two["lorafit"], strict=True)
    ]
    if not noise:
        return [table(head, rows)]
    text = (
        f"Noise: two seeds' curves of lorafit differ by {statistics.mean(noise):.4f} in the mean and "
        f"{max(noise):.4f} at most; their last {END} losses by {max(ends) - min(ends):.4f}."
    )
    return [table(head, rows), text]
