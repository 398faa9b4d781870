"""Training runs in processes of their own, so that tests can kill them. Imports are paid once, by a fork server."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["lorafit.run", "lorafit.api"])


def write_data(path: Path, rows: int = 24) -> Path:
    """A small prompt/completion file; every row differs."""
    lines = (
        json.dumps({"prompt": f"What is {i} and the {i % 7}?", "completion": f"The {i * 3}."}) for i in range(rows)
    )
    path.write_text("\n".join(lines) + "\n")
    return path


def train_in_child(options: dict[str, Any]) -> None:
    """The child: train, or resume if the run was begun."""
    import lorafit
    from lorafit.errors import LorafitError
    from lorafit.run import resume

    try:
        if (Path(options["out"]) / "run.yaml").exists():
            resume(Path(options["out"]))
        else:
            lorafit.train(**{"overwrite": True, **options})
    except LorafitError as error:
        os._exit(error.exit_code)


def start(options: dict[str, Any]) -> Any:
    """A running child."""
    child = _context.Process(target=train_in_child, args=(options,))
    child.start()
    return child


def finish(options: dict[str, Any]) -> None:
    """Run to the end; the child must succeed."""
    child = start(options)
    child.join()
    assert child.exitcode == 0, f"training ended with {child.exitcode}"


def kill_at_random(options: dict[str, Any], chance: random.Random, longest: float, most: int = 20) -> int:
    """Start, kill -9 after a random part of `longest` seconds, go on, until one ends by itself; return the kills.

    After `most` kills nothing disturbs the run any more.
    """
    kills = 0
    while True:
        child = start(options)
        child.join(chance.uniform(0, longest) if kills < most else None)
        if child.exitcode is not None:
            assert child.exitcode == 0, f"a resumed run ended with {child.exitcode}"
            return kills
        child.kill()
        child.join()
        kills += 1


def seconds_of(options: dict[str, Any]) -> float:
    """How long an undisturbed run takes."""
    began = time.perf_counter()
    finish(options)
    return time.perf_counter() - began


def assert_same_run(a: Path, b: Path) -> None:
    """The adapters are equal in every byte, and so are the metrics but for times and memory."""
    for name in ("adapter_model.safetensors", "adapter_config.json", "lorafit.json"):
        assert (a / "adapter" / name).read_bytes() == (b / "adapter" / name).read_bytes(), name
    assert metrics(a) == metrics(b)


def metrics(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs between two equal runs."""
    timed = ("seconds", "tokens_per_second", "memory_bytes")
    lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]
