"""metrics.jsonl: one line per optimizer step and per evaluation, without gaps or doubles after any crash."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lorafit.formats.folders import write_text_atomically


class Metrics:
    """Appends lines to OUT/metrics.jsonl; `sync` must run before the checkpoint of the same step is committed."""

    def __init__(self, path: Path, keep_to_step: int) -> None:
        """Cut the file back to steps up to `keep_to_step` (what is later will be computed again) and open it."""
        kept = [line for line in read_metrics(path) if line["step"] <= keep_to_step]
        write_text_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def add(self, **values: Any) -> None:
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The file's lines; a last line torn by a crash is left out. No file: none."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
