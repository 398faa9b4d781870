"""How lorafit's speed and memory grow with the rows, the length of documents, the rank and the batch.

Each point is a process of its own: a step to warm up, then timed ones. lengths: the same tokens in each step, all
trained, cut into documents of that length.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import say, spread, table, watch
from benchmarks.rows import read
from benchmarks.trainee import Trainee, tokens_of

POINTS = {
    "rows": (100, 1_000, 10_000, 100_000),
    "lengths": (64, 256, 1024, 4096, 8192),
    "rank": (4, 16, 64, 256),
    "batch": (1, 4, 16, 64),
}
TOKENS = 8192  # of a step, for lengths
MB = 1e6


def options_of(sweep: str, point: int, options: dict[str, Any], data: str, folder: str) -> dict[str, Any]:
    """The options of lorafit at one point."""
    if sweep == "lengths":
        batch = max(1, TOKENS // point)
        return {**options, "data": (_documents(batch, point, folder),), "max_length": point, "batch_size": batch}
    if sweep == "rows":
        return {**options, "data": (read(data, point, folder),)}
    return {**options, {"rank": "rank", "batch": "batch_size"}[sweep]: point}


def _documents(count: int, length: int, folder: str) -> str:
    """A file of `count` texts with more tokens than `length`."""
    chance = random.Random(length)
    rows = [{"text": " ".join(str(chance.randrange(100)) for _ in range(length))} for _ in range(count)]
    found = Path(folder) / f"documents-{length}.jsonl"
    found.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(found)


def point(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of each timed step at one point, in this process."""
    began = time.perf_counter()
    trainee = Trainee(**job["options"])
    loaded, rates, tokens = time.perf_counter() - began, [], []
    for number in range(job["repeats"] + 1):
        packs = trainee.packs(number)
        began = time.perf_counter()
        trainee.step(packs)
        rates.append(tokens_of(packs) / (time.perf_counter() - began))
        tokens.append(tokens_of(packs))
    config = trainee.config
    return {"rates": rates[1:], "tokens": statistics.mean(tokens[1:]), "loaded": loaded,
            "micro": config.micro_batch_tokens, "checkpointing": config.checkpointing}  # fmt: skip


def sweep_table(asked: argparse.Namespace, points: Sequence[int], options: dict[str, Any], folder: str) -> str:
    """A line for each point, against the fastest of them."""
    seen = {}
    for value in points:
        say(f"{asked.sweep} {value}")
        own = options_of(asked.sweep, value, options, asked.data[0], folder)
        job = {"task": "point", "repeats": asked.repeats, "options": own}
        seen[value] = watch("benchmarks.compare", job, asked.limit)
    middles = {value: statistics.median(found.result["rates"]) for value, found in seen.items() if found.result}
    rows = []
    for value, found in seen.items():
        peak = f"{found.peaks.get('VmHWM', 0) / MB:,.0f}"
        if found.result is None:
            rows.append([value, found.ending, "", "", "", "", peak])
            continue
        result, share = found.result, middles[value] / max(middles.values())
        cut = f"{result['micro']}, {result['checkpointing']}"
        figures = [spread(result["rates"]), f"{share:.2f}", f"{result['tokens']:,.0f}", cut, f"{result['loaded']:.1f}"]
        rows.append([f"{value:,}", *figures, peak])
    head = [asked.sweep, "tokens/s", "of the fastest", "tokens a step", "tokens of a micro-batch, checkpointing",
            "ready after, s", "peak, MB"]  # fmt: skip
    return table(head, rows)
