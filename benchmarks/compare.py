"""lorafit against PEFT, TRL and Unsloth on the same rows, in pairs, beside the roof of this machine.

    python -m benchmarks.compare [--models smollm2] [--jobs chat] [--data gsm8k/train.jsonl] [--sides lorafit peft]
        [--peers-python P/bin/python] [--unsloth-python U/bin/python] [--compute fp32] [--out compare.md]
    python -m benchmarks.compare --sweep rows|lengths|rank|batch
    python -m benchmarks.compare --seeds 3

dense: 4 rows of 512 random ids, all trained. chat: rows of --data as lorafit renders and masks them, 8 to a step; the
peers get its ids and labels. Rank 16, all linear layers, the same start, the same AdamW at the same constant learning
rate. Tokens are real ones: padding is never counted. Each side is a process of its own; lorafit's and one peer's take
the same step in turn, the others asleep. A peer's settings are searched first, one after another (--search). Peak
memory is VmHWM of the process; user and system time and page faults are those of a step, medians.
--peers-python has peft, trl and bitsandbytes (the extra `bench`), --unsloth-python has unsloth; default: this Python.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import curves, jobs, roof, sweep
from benchmarks.common import ROWS, arguments, heading, model_file, publish, say, table
from benchmarks.comparison import BATCH, HEAD, Comparison, lines, task
from benchmarks.peers import FACTORS
from benchmarks.rows import read
from lorafit import machine

CURVE_STEPS = 30
OURS, PEERS = ("lorafit", "lorafit-packed"), tuple(FACTORS)
TASKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "job": jobs.write,
    "convert": jobs.convert,
    "rates": roof.rates,
    "profile": roof.profile,
    "point": sweep.point,
}
"""What `comparison.task` has done in a child."""


def page(job: Comparison) -> list[str]:
    """The tables of one job."""
    job.prepare(job.asked.repeats + 1)  # the first is the warm-up
    measure = partial(task, "rates", threads=job.asked.threads, **{k: job.facts[k] for k in ("compute", *roof.WIDTHS)})
    before, tried, pairs = measure(), [], []
    for peer in (name for name in PEERS if name in job.asked.sides):
        settings, found = job.search(peer)
        tried += found
        pairs.append({**job.ours, peer: settings})
    pairs = pairs or [job.ours]
    answers = [job.rounds(pair) for pair in pairs]
    after = measure()
    events = task("profile", options=job.options, kind=job.kind)
    best = max(before[0], after[0], key=lambda shape: shape[1])
    tokens = best[1] / roof.flops(job.facts)
    rows = [line for pair, found in zip(pairs, answers, strict=True) for line in lines(found, pair, tokens)]
    parts = [_facts(job, best, min(before[0][1], after[0][1]), tokens), table(HEAD, rows)]
    if tried:
        parts += ["Settings tried:", table(["peer", "settings", "real tokens/s", "peak, MB"], tried)]
    rates = [[shape, f"{rate / 1e9:,.0f}"] for shape, rate in before]
    parts += ["Products before the rounds:", table(["rows x inner x columns", "GFLOP/s"], rates)]
    parts += ["One step of lorafit under torch's profiler:", *roof.profile_tables(events)]
    return [*parts, _versions(job)]


def _facts(job: Comparison, best: tuple[str, float], worst: float, tokens: float) -> str:
    facts = job.facts
    return (
        f"{facts['tokens']:.0f} tokens a step, {facts['trained'] / facts['tokens']:.0%} trained; learning rate "
        f"{facts['lr']:g}; lorafit's micro-batches: {facts['micro_batch_tokens']} tokens, checkpointing "
        f"{facts['checkpointing']}. The roof: {best[0]} in {facts['compute']}, {best[1] / 1e9:,.0f} "
        f"GFLOP/s, the better of two measurements around the rounds (the other: {worst / 1e9:,.0f}). A token "
        f"has {roof.flops(facts) / 1e6:,.0f} MFLOP, attention left out: {tokens:,.0f} tokens/s."
    )


def _versions(job: Comparison) -> str:
    return "\n".join(f"- {side}: {', '.join(map(' '.join, found.items()))}" for side, found in job.versions.items())


def compare(asked: argparse.Namespace, model: Path) -> list[str]:
    """The tables of every job of one model."""
    parts = []
    wanted = [(kind, data) for kind in asked.jobs for data in (asked.data if kind == "chat" else asked.data[:1])]
    with tempfile.TemporaryDirectory() as weights:
        shared = _weights(model, asked.compute, weights) if set(PEERS) & set(asked.sides) else ""
        for kind, data in wanted:
            with tempfile.TemporaryDirectory() as folder:
                job = Comparison(asked, model, kind, read(data, asked.rows, folder), folder, shared)
                title = f"## {model.name}, {kind}" + (f", {_named(data)}" if kind == "chat" else "")
                parts += [title, *page(job)]
    return parts


def seeds(asked: argparse.Namespace, model: Path) -> list[str]:
    """Loss curves of one model over the rows of each data set."""
    parts = []
    with tempfile.TemporaryDirectory() as weights:
        shared = _weights(model, asked.compute, weights)
        for data in asked.data:
            found = [_curve(asked, model, data, shared, seed) for seed in range(asked.seeds)]
            parts += [f"## {model.name}, {_named(data)}, {CURVE_STEPS} steps in {asked.compute}"]
            parts += [*curves.curves_tables([losses for losses, _ in found]), found[0][1]]
    return parts


def _curve(
    asked: argparse.Namespace, model: Path, data: str, weights: str, seed: int
) -> tuple[dict[str, list[float]], str]:
    """The losses of each side, and the versions."""
    say(f"{model.name}, seed {seed}")
    with tempfile.TemporaryDirectory() as folder:
        job = Comparison(asked, model, "chat", read(data, CURVE_STEPS * BATCH, folder), folder, weights, seed)
        job.prepare(CURVE_STEPS)
        return curves.losses(job, CURVE_STEPS), _versions(job)


def sweeps(asked: argparse.Namespace, model: Path) -> list[str]:
    """One sweep of one model."""
    points = asked.points or sweep.POINTS[asked.sweep]
    with tempfile.TemporaryDirectory() as folder:
        options = Comparison(asked, model, "chat", read(asked.data[0], asked.rows, folder), folder).options
        found = sweep.sweep_table(asked, points, options, folder)
    return [f"## {model.name}, {asked.sweep}", found]


def _weights(model: Path, compute: str, folder: str) -> str:
    """A Hugging Face folder with the model's weights."""
    if model.is_dir():
        return str(model)
    say(f"{model.name}: weights for the peers")
    task("convert", model=str(model), compute=compute, folder=folder)
    return folder


def _named(data: str) -> str:
    return f"{Path(data).parent.name}/{Path(data).name}"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["smollm2", "gemma3"], help="names, GGUF files or folders")
    parser.add_argument("--jobs", nargs="+", default=["dense", "chat"], choices=("dense", "chat"))
    parser.add_argument("--data", nargs="+", default=[str(ROWS)], help="JSONL or CSV; each is a chat job (WikiSQL)")
    parser.add_argument("--rows", type=int, default=64, help="of each, a multiple of 8 (default: %(default)s)")
    parser.add_argument("--sides", nargs="+", default=[*OURS, "peft", "trl"], choices=(*OURS, *PEERS))
    parser.add_argument("--compute", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--peers-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--unsloth-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--search", type=int, default=2, metavar="STEPS", help="for each setting; 0: the first ones")
    parser.add_argument("--limit", type=float, default=900, help="seconds for a side's answer or a point of a sweep")
    parser.add_argument("--sweep", choices=tuple(sweep.POINTS), help="instead: how lorafit's speed and memory grow")
    parser.add_argument("--points", nargs="+", type=int, help="of the sweep, instead of its own")
    parser.add_argument("--seeds", type=int, default=0, help="instead: loss curves of lorafit and PEFT, so many")
    asked = parser.parse_args()
    if asked.child:
        return print(json.dumps(TASKS[asked.child["task"]](asked.child)))
    if asked.compute == "auto":
        asked.compute = "bf16" if machine.fast_bf16() else "fp32"
    title, work = "lorafit and its peers", compare
    if asked.sweep:
        title, work = f"lorafit by {asked.sweep}", sweeps
    elif asked.seeds:
        title, work = "Loss curves of lorafit and PEFT", seeds
    models = (Path(name) if Path(name).is_dir() else model_file(name) for name in asked.models)
    return publish(
        [heading(title, asked.threads), *(part for model in models for part in work(asked, model))], asked.out
    )


if __name__ == "__main__":
    main()
