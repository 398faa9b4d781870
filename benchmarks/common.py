"""What the benchmarks share: works timed in alternation, a child watched from outside, the machine, Markdown tables.

The peers are those of the extra `bench`: pip install -e '.[bench]'. Time nothing on a busy machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from lorafit import machine
from lorafit.kernels import native

T = TypeVar("T")

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).with_name("results")
ROWS = ROOT / "examples" / "wikisql" / "train.jsonl"
LOAD = os.getloadavg()[0]  # when the benchmark began
STATUS, ROLLUP = ("RssAnon", "RssFile", "VmHWM"), ("Pss", "Private_Dirty")
SAMPLING, ROLLUP_EVERY = 0.05, 20  # seconds between looks at a child; smaps_rollup walks all pages, so not every time


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=machine.cores(), help="default: the cores of this machine")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="also write the tables here; a plain name: benchmarks/results/")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)  # a process of its own, asked by JSON
    return parser


def model_file(name: str) -> Path:
    """A GGUF file given by its path, or `smollm2` or `gemma3`, which are fetched once."""
    if Path(name).suffix == ".gguf":
        return Path(name)
    fetch = [sys.executable, str(ROOT / "scripts" / "fetch_model.py"), name]
    return Path(subprocess.run(fetch, stdout=subprocess.PIPE, check=True, text=True).stdout.strip())


def alternate(
    works: Mapping[str, Callable[[int], T]], rounds: int, warm_up: int = 1
) -> dict[str, list[tuple[float, T]]]:
    """A B A B ...: (seconds, result) of each work in each round; the warm-up rounds come first and are left out.

    A work is called with the number of the round, so that all do the same in it.
    """
    found: dict[str, list[tuple[float, T]]] = {name: [] for name in works}
    for number in range(warm_up + rounds):
        for name, work in works.items():
            began = time.perf_counter()
            result = work(number)
            found[name].append((time.perf_counter() - began, result))
    return {name: times[warm_up:] for name, times in found.items()}


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median, with minimum and maximum."""
    middle, low, high = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low}-{high})"


def memory(pid: int | str = "self", rollup: bool = True) -> dict[str, int]:
    """Bytes of a process: RssAnon (private), RssFile (mapped files), VmHWM (peak of all), Pss, Private_Dirty."""
    found: dict[str, int] = {}
    for file, fields in (("status", STATUS), ("smaps_rollup", ROLLUP if rollup else ())):
        try:
            lines = [line.split() for line in Path(f"/proc/{pid}/{file}").read_text().splitlines()] if fields else []
        except OSError:  # it has ended
            continue
        found |= {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0][:-1] in fields}
    return found


@dataclass(frozen=True)
class Watched:
    """A child that has ended: the JSON of its last line of output (None: it failed), and the most of each `memory`."""

    result: Any
    peaks: dict[str, int]
    seconds: float
    ending: str


def watch(module: str, job: Mapping[str, Any], limit: float = 600) -> Watched:
    """Run `python -m module --child JOB` and look at its memory every 50 ms; after `limit` seconds it is killed."""
    command = [sys.executable, "-m", module, "--child", json.dumps(job)]
    peaks: dict[str, int] = {}
    began, looks, ending = time.perf_counter(), 0, ""
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, cwd=ROOT)
        while child.poll() is None:
            for field, value in memory(child.pid, rollup=looks % ROLLUP_EVERY == 0).items():
                peaks[field] = max(peaks.get(field, 0), value)
            if time.perf_counter() - began > limit and not ending:
                ending = f"did not finish in {limit:.0f} s"
                child.kill()
            looks += 1
            time.sleep(SAMPLING)
        seconds = time.perf_counter() - began
        output.seek(0)
        lines = output.read().splitlines()
    ending = ending or ("finished" if child.returncode == 0 else f"ended with {child.returncode}")
    return Watched(json.loads(lines[-1]) if child.returncode == 0 else None, peaks, seconds, ending)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def heading(title: str, threads: int, peers: Sequence[str] = ()) -> str:
    """What was measured, when, and on what."""
    name, features = machine.processor()
    versions = ", ".join(f"{package} {_version(package)}" for package in ("torch", "transformers", "lorafit", *peers))
    kernels, why = native.describe()
    facts = (
        f"{datetime.now(UTC):%Y-%m-%d}, load when it began {LOAD:.1f}",
        f"{name}, {machine.cores()} cores, {', '.join(sorted(features)) or 'no features'}; threads: {threads}",
        f"{versions}; kernels: {kernels} ({why})",
        "median (minimum-maximum) where three figures stand",
    )
    return "\n".join((f"# {title}", "", *(f"- {fact}" for fact in facts)))


def publish(parts: Sequence[str], out: str | None) -> None:
    """Print the parts as one Markdown page and, if asked, write it."""
    text = "\n\n".join(parts) + "\n"
    print(text)
    if out:
        (RESULTS / out).parent.mkdir(parents=True, exist_ok=True)
        (RESULTS / out).write_text(text, encoding="utf-8")


def say(text: str) -> None:
    """A line about what goes on, on standard error."""
    print(text, file=sys.stderr, flush=True)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
