"""The runs of a comparison: each is `lorafit train` in a process of its own, so that its peak memory is its own.

A run that is there and finished is not run again; one that was begun is resumed. So a comparison that was killed goes
on where it stood.
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit import console
from lorafit.config import ADAPTER_ONLY
from lorafit.errors import ConfigError, Interrupted, MemoryLimitError

PARENT_DIED = 1  # prctl's PR_SET_PDEATHSIG
DIVERGED = ("NaN or infinity", "held-out loss: is ")  # how `lorafit train` says it


@dataclass(frozen=True)
class Arm:
    """One run: a method, its peak learning rate (None: by rule), and its folder's name in OUT."""

    method: str
    lr: float | None = None

    @property
    def name(self) -> str:
        return self.method if self.lr is None else f"{self.method}-lr-{self.lr:g}"


@dataclass(frozen=True)
class Outcome:
    """What became of an arm: its report.json, or why there is none."""

    arm: Arm
    folder: Path
    report: dict[str, Any] | None
    failure: str = ""

    @property
    def loss(self) -> float:
        """Held-out loss of what was made; infinite without a report."""
        return float(self.report["adapter_loss"]) if self.report else float("inf")


def run_arm(arm: Arm, model: str, data: tuple[str, ...], out: Path, settings: Mapping[str, Any]) -> Outcome:
    """Train, resume, or read an arm. One that diverges or does not fit in memory is an outcome, not an error.

    settings: options given to the comparison, by field; those of adapters go to LoRA alone. Raises ConfigError with the
    run's own error, Interrupted when a signal ended it.
    """
    folder = out / arm.name
    if not (folder / "report.json").is_file():
        console.say(f"== {arm.name}")
        begun = (folder / "run.yaml").is_file()
        words = ["--resume", str(folder)] if begun else _train(arm, model, data, folder, settings)
        code, errors = _run([sys.executable, "-m", "lorafit", "train", *words], arm.name)
        if code in (130, 143):
            what = f"stopped by signal {code - 128} in {arm.name}, checkpoint written"
            raise Interrupted(str(out), what, f"go on with: lorafit compare --resume {out}", code - 128)
        if code and any(sign in line for line in errors for sign in DIVERGED):
            return Outcome(arm, folder, None, "diverged")
        if code == MemoryLimitError.exit_code:
            return Outcome(arm, folder, None, f"does not fit in memory: {errors[0] if errors else ''}")
        if code:
            killed = ", which the system does where memory runs out" if code == 128 + signal.SIGKILL else ""
            what = errors[0] if errors else f"ended with exit code {code}{killed}"
            raise ConfigError(arm.name, what, "mend that and go on with --resume")
    return Outcome(arm, folder, json.loads((folder / "report.json").read_text(encoding="utf-8")))


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _train(arm: Arm, model: str, data: tuple[str, ...], folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """The words after `lorafit train` that begin an arm."""
    words = [model, *data, "--out", str(folder), "--method", arm.method]
    words += [] if arm.lr is None else ["--lr", repr(arm.lr)]
    for name, value in settings.items():
        if value is None or (arm.method == "full" and name in (*ADAPTER_ONLY, "base")):
            continue
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, (list, tuple)):
            words += [part for one in value for part in (flag, one)] if name == "eval" else [flag, ",".join(value)]
        else:
            words += [flag, str(value)]
    return words


def _run(command: list[str], name: str) -> tuple[int, list[str]]:
    """(exit code, its `error:` lines); what the run says goes on to standard error, line by line, after its name."""
    errors = []
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        start_new_session=True, preexec_fn=_end_with_parent,
    )  # fmt: skip
    with _forwarded(child):
        assert child.stderr is not None, "it is a pipe"
        for line in child.stderr:
            if line.startswith("error: "):
                errors.append(line.removeprefix("error: ").strip())
            console.say(f"{name} | {line.rstrip()}")
        code = child.wait()
        return (128 - code if code < 0 else code), errors  # a signal that came before the run could hear it


@contextmanager
def _forwarded(child: subprocess.Popen[str]) -> Iterator[None]:
    """SIGINT and SIGTERM go to the child, which saves and ends; its exit code then says so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, frame: object) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """In the child, on Linux: SIGTERM when the parent is gone, so that a killed comparison leaves no run behind."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGTERM)
