"""metrics.jsonl: one line per optimizer step and per evaluation, without gaps or doubles after any crash."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lorafit.errors import ResumeError
from lorafit.formats.folders import refusals, write_text_atomically


class Metrics:
    """Appends lines to OUT/metrics.jsonl; `sync` must run before the checkpoint of the same step is committed.

    Every method raises ConfigError when the disk refuses.
    """

    def __init__(self, path: Path, keep_to_step: int) -> None:
        """Cut the file back to steps up to `keep_to_step` (what is later will be computed again) and open it."""
        kept = [line for line in read_metrics(path) if line["step"] <= keep_to_step]
        write_text_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def add(self, **values: Any) -> None:
        with refusals(self._path):
            self._file.write(json.dumps(values, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        with refusals(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with refusals(self._path):  # a line that did not fit is tried once more
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The file's lines; a last line torn by a crash is left out. No file: none.

    Raises ResumeError, naming the line, when one is no object with a step.
    """
    if not path.exists():
        return []
    *lines, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [_read_line(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _read_line(line: str, place: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise ResumeError(place, f"is no line of metrics: {line[:80]!a}", "put the line back, or start a new run")
    return values
