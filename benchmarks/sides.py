"""One side of a comparison: a process that loads once, then takes a step each time it is told and sleeps in between.

The parent holds a `Side`; its child is `python -m benchmarks.sides SPEC`, where a `Gate` reads the number of a step
from a line of standard input and answers with a line of JSON. Nothing of lorafit is imported here and in `peers`: a
peer's Python need not have it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAUSE = 0.1  # seconds before each step, in which the other side's threads stop spinning
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "30000000000", "MALLOC_TOP_PAD_": "268435456"}
PACKAGES = ("torch", "transformers", "lorafit", "peft", "trl", "unsloth", "unsloth_zoo", "bitsandbytes")
LAST = 12  # lines of a failed child's complaints that are shown


class SideError(Exception):
    """A side that ended, or took too long; its complaints have been shown."""


class Side:
    """A child that has loaded. kept: whether malloc keeps what is freed. Raises SideError, here and in `step`."""

    def __init__(self, spec: Mapping[str, Any], python: str, kept: bool = False, limit: float = 600) -> None:
        self.name, self.limit = str(spec["side"]), limit
        own = {"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **own, **(MALLOC if kept else {})}
        command = [python, "-m", "benchmarks.sides", json.dumps(spec)]
        self.complaints = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed by `end`)
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints, cwd=ROOT, env=environment,
            text=True,
        )  # fmt: skip
        self.versions: dict[str, str] = self._answer()

    def step(self, number: int) -> dict[str, Any]:
        """Take step `number`, from 0, one after another: what `Gate.answer` says."""
        time.sleep(PAUSE)
        assert self.child.stdin is not None, "it was opened with a pipe"
        with contextlib.suppress(BrokenPipeError):  # `_answer` says why
            self.child.stdin.write(f"{number}\n")
            self.child.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """End the child; its memory is free afterwards. Safe to repeat."""
        self.child.kill()
        self.child.wait()
        self.complaints.close()

    def _answer(self) -> dict[str, Any]:
        assert self.child.stdout is not None, "it was opened with a pipe"
        ready, _, _ = select.select([self.child.stdout], [], [], self.limit)
        line = self.child.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        ending = f"ended with {self.child.wait()}" if ready else f"no answer in {self.limit:.0f} s"
        self.complaints.seek(0)
        print(*self.complaints.read().splitlines()[-LAST:], sep="\n", file=sys.stderr)
        self.end()
        raise SideError(f"{self.name}: {ending}")


class Gate:
    """The child's end: what its libraries print goes to standard error, so that only answers reach the parent."""

    def __init__(self) -> None:
        self.parent = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def ready(self) -> None:
        """Say that loading is over, and the versions."""
        found = {"python": platform.python_version()}
        for package in PACKAGES:
            if package.replace("-", "_") in sys.modules:
                found[package] = importlib.metadata.version(package)
        print(json.dumps(found), file=self.parent)

    def wait(self) -> int:
        """The number of the step to take now; ends this process when there is none any more."""
        line = sys.stdin.readline()
        if not line:
            raise SystemExit
        self.began, self.usage = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        return int(line)

    def answer(self, loss: float, tokens: int) -> None:
        """The step's loss in nats per trained token, its real tokens, and what it took since `wait`."""
        seconds, usage = time.perf_counter() - self.began, resource.getrusage(resource.RUSAGE_SELF)
        found = {"loss": loss, "tokens": tokens, "seconds": seconds, "peak": _peak()}
        found["user"] = usage.ru_utime - self.usage.ru_utime
        found["system"] = usage.ru_stime - self.usage.ru_stime
        found["faults"] = usage.ru_minflt - self.usage.ru_minflt
        print(json.dumps(found), file=self.parent)

    def steps(self) -> Iterator[int]:
        """The steps to take, for a loop of one's own."""
        self.ready()
        while True:
            yield self.wait()


def _peak() -> int:
    """Most bytes that this process had in memory, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    spec, gate = json.loads(sys.argv[1]), Gate()
    if spec["side"].startswith("lorafit"):
        from benchmarks.jobs import take_steps

        take_steps(spec, gate)
    else:
        from benchmarks.peers import PEERS

        PEERS[spec["side"]](spec, gate)


if __name__ == "__main__":
    main()
