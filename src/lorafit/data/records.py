"""Files -> records: every row of every known format in one shape, every fault with file and line."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.data.files import Row, data_files, read_rows
from lorafit.data.shapes import FormatError, ShapeError, format_of, messages_of, text_of, tools_of
from lorafit.errors import DataError


@dataclass(frozen=True)
class Record:
    """One row of the user's data: messages for the chat template, or text (then messages is None)."""

    place: str
    """file:line where the row begins, the file as the user named it."""
    number: int
    """Counts the rows of all the data from 1, faulty ones too."""
    format: str
    """chat, sharegpt, prompt/completion, alpaca, text, or raw (a .txt file)."""
    messages: tuple[dict[str, Any], ...] | None
    tools: tuple[dict[str, Any], ...] | None
    text: str | None
    fields: dict[str, Any]
    """The row as read."""
    prompt: int = 0
    """Messages at the start that are the prompt of a prompt/completion row: their assistant turns are not trained."""


@dataclass(frozen=True)
class Read:
    """What files held: good rows, faults, and how many rows each format has."""

    records: list[Record]
    faults: list[DataError]
    formats: dict[str, int]


def read_records(paths: Sequence[Path], *, for_training: bool = True) -> Read:
    """All rows of the files and folders `paths`, in their order.

    for_training=False reads prompts: answers may be missing, and those at a row's end are left out of the messages.
    Raises nothing for faulty data: the caller raises `faults`, or counts them and goes on.
    """
    files, missing = data_files(paths)
    faults: list[DataError] = list(missing)
    records: list[Record] = []
    number = 0
    for path in files:
        form = "raw" if path.suffix.lower() == ".txt" else None
        for row in read_rows(path):
            number += 1
            if isinstance(row, DataError):
                faults.append(row)
                continue
            try:
                record = _record(row, number, form, for_training)
            except FormatError as wrong:
                header = path.suffix.lower() == ".csv"  # every row of it has the same keys
                faults.append(DataError(f"{path}:1" if header else row.place, wrong.what, wrong.remedy))
                if header:
                    break
                continue
            except ShapeError as wrong:
                faults.append(DataError(row.place, wrong.what, wrong.remedy))
                continue
            form = record.format
            records.append(record)
    return Read(records, faults, dict(Counter(record.format for record in records)))


def content_hash(record: Record) -> str:
    """SHA-256 (hex) of what the row says: messages, tools and text, without its place or ignored columns."""
    said = [record.messages, record.tools, record.text]
    canonical = json.dumps(said, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def _record(row: Row, number: int, file_format: str | None, for_training: bool) -> Record:
    """The row as a record; file_format: what the rows before it in the file are. Raises ShapeError."""
    if file_format == "raw":
        return Record(row.place, number, "raw", None, None, row.value["text"], row.value)
    form = format_of(row.value, for_training)
    if file_format not in (None, form):
        raise ShapeError(f"two formats in one file: a {form} row among {file_format} rows", "put each in its own file")
    if form == "text":
        return Record(row.place, number, form, None, None, text_of(row.value), row.value)
    messages, prompt = messages_of(row.value, form, for_training)
    tools = tools_of(row.value, form)
    return Record(row.place, number, form, tuple(messages), tools, None, row.value, prompt)
