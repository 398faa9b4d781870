"""The training step on stored weights: a packed, NF4 or int8 base against a bf16 base of the same weights.

    python -m benchmarks.step --data gsm8k/train.jsonl [--models smollm2] [--jobs chat] [--bases bf16 packed]

dense: 4 rows of 512 random ids in one pack, all trained. chat: rows of --data as lorafit reads them, 8 to a step. Rank
16, all linear layers. The bases stand in one process and take their steps in turn, so that what disturbs the machine
disturbs all; a ratio is taken round by round. memory: each base in a process of its own, four chat steps.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import (
    ROWS,
    STATUS,
    alternate,
    arguments,
    heading,
    memory,
    model_file,
    publish,
    say,
    spread,
    table,
    watch,
)
from benchmarks.rows import read
from benchmarks.trainee import Trainee, random_pack, tokens_of

JOBS, BASES = ("dense", "chat", "memory"), ("bf16", "packed", "nf4", "int8")
MB = 1e6


def speed(job: str, trainees: dict[str, Trainee], repeats: int) -> list[str]:
    """A title and a table of tokens per second."""
    first = next(iter(trainees.values()))
    dense = [random_pack(first.model.config.vocab_size, 4, 512)]

    def packs(number: int) -> list[Any]:
        return dense if job == "dense" else first.packs(number)

    works = {base: lambda number, one=trainee: one.step(packs(number)) for base, trainee in trainees.items()}
    times = alternate(works, repeats)
    tokens = [tokens_of(packs(number + 1)) for number in range(repeats)]  # round 0 was the warm-up
    trained = sum(len(pack.targets_N) for number in range(repeats) for pack in packs(number + 1)) / sum(tokens)
    rates = {base: [n / timed[0] for n, timed in zip(tokens, found, strict=True)] for base, found in times.items()}
    rows = []
    for base, found in times.items():
        ratio = [a / b for a, b in zip(rates[base], next(iter(rates.values())), strict=True)]
        losses = f"{found[0][1]:.4f}", f"{found[-1][1]:.4f}"
        rows.append([base, spread(rates[base]), f"{statistics.median(ratio):.3f}", *losses])
    title = f"{job}: {statistics.mean(tokens):.0f} tokens a step, {trained:.0%} trained"
    head = ["base", "tokens/s", f"of {next(iter(rates))}", "loss of step 2", f"of step {repeats + 1}"]
    return [title, table(head, rows)]


def memory_table(options: dict[str, Any], bases: list[str], file: Path) -> list[str]:
    """A title and a table of what each base takes, seen from outside."""
    rows, size = [], file.stat().st_size
    for base in bases:
        say(f"memory {base}")
        seen = watch("benchmarks.step", {**options, "base": base})
        if seen.result is None:
            rows.append([base, seen.ending, *[""] * 5])
            continue
        loaded, frozen = seen.result["loaded"]["RssAnon"], seen.result["frozen"]
        figures = (loaded, *(seen.peaks[field] for field in STATUS), frozen)
        rows.append([base, *(f"{value / MB:,.0f}" for value in figures), f"{frozen / size:.2f}"])
    title = f"memory in MB, four chat steps; the file has {size / MB:,.0f} MB"
    head = [
        "base",
        "private, loaded",
        "private, most",
        "mapped, libraries too",
        "peak",
        "frozen weights",
        "of the file",
    ]
    return [title, table(head, rows)]


def child(options: dict[str, Any]) -> None:
    """One base alone: its memory when it is loaded, and a few steps for the parent to watch."""
    trainee = Trainee(**options)
    loaded = memory()
    for number in range(4):
        trainee.step(trainee.packs(number))
    print(json.dumps({"loaded": loaded, "frozen": trainee.frozen_bytes}))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["smollm2", "gemma3"], help="names or GGUF files")
    parser.add_argument("--jobs", nargs="+", default=JOBS, choices=JOBS)
    parser.add_argument("--bases", nargs="+", default=BASES, choices=BASES, help="the first is compared with")
    parser.add_argument("--data", default=str(ROWS), help="rows for chat and memory (default: WikiSQL)")
    parser.add_argument("--rows", type=int, default=64, help="of them (default: %(default)s)")
    parser.add_argument("--compute", default="auto", choices=("auto", "bf16", "fp32"))
    asked = parser.parse_args()
    if asked.child:
        return child(asked.child)
    parts = [heading("The training step on stored weights", asked.threads)]
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"data": (read(asked.data, asked.rows, folder),), "batch_size": 8}
        options |= {"threads": asked.threads, "compute": asked.compute}
        for name in asked.models:
            file = model_file(name)
            options["model"] = str(file)
            for job in asked.jobs:
                say(f"{file.name} {job}")
                if job == "memory":
                    found = memory_table(options, asked.bases, file)
                else:
                    found = speed(job, {base: Trainee(**options, base=base) for base in asked.bases}, asked.repeats)
                parts += [f"## {file.name}, {found[0]}", found[1]]
    return publish([*parts, f"Data: {Path(asked.data).parent.name}/{Path(asked.data).name}"], asked.out)


if __name__ == "__main__":
    main()
