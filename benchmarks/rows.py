"""Rows of public data sets under the names that lorafit reads."""

from __future__ import annotations

import csv
import json
from itertools import cycle, islice
from pathlib import Path

NAMES = ({"question": "prompt", "answer": "completion"}, {"text": "prompt", "category": "completion"})
"""GSM8K's and BANKING77's."""


def read(file: str, rows: int, folder: str) -> str:
    """A JSONL file with `rows` rows of a JSONL or CSV file, from its start again where it has fewer.

    A CSV file's rows are taken from all over it: they lie sorted by their label.
    """
    if Path(file).suffix == ".csv":
        with Path(file).open(encoding="utf-8", newline="") as opened:
            lines = list(csv.DictReader(opened))
        lines = lines[:: max(1, len(lines) // rows)]
    else:
        lines = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    found = Path(folder) / f"rows-{rows}.jsonl"
    found.write_text("".join(json.dumps(_renamed(row)) + "\n" for row in islice(cycle(lines), rows)))
    return str(found)


def _renamed(row: dict[str, str]) -> dict[str, str]:
    names = next((names for names in NAMES if names.keys() <= row.keys()), {})
    return {names.get(key, key): value for key, value in row.items()}
