"""The user's files as a command needs them: a chat template's source, and data as token rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lorafit import console
from lorafit.config import TrainConfig
from lorafit.data.records import Record, read_records
from lorafit.data.rows import Rows, build_rows
from lorafit.errors import SHOWN, ConfigError, Faults
from lorafit.formats.tokenizer import TextTokenizer


def read_template(file: str | None) -> str | None:
    """The chat template in a file, if one is given."""
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--template", f"{file} does not read: {error}", "give a Jinja file") from None


def read_rows(
    paths: Sequence[str], tokenizer: TextTokenizer, config: TrainConfig, context: int
) -> tuple[Rows, list[Record]]:  # fmt: skip
    """Token rows of the files, and their records; raises Faults unless bad rows are to be skipped."""
    read = read_records([Path(path) for path in paths])
    rows = build_rows(
        read.records, tokenizer, max_length=config.max_length, trained=config.trained, context=context
    )  # fmt: skip
    faults = [*read.faults, *rows.faults]
    if faults and not config.skip_bad_rows:
        raise Faults(faults)
    for fault in faults[:SHOWN]:
        console.warn(f"skipped: {fault}")
    counts = {**rows.counts}
    for key in ("rows", "skipped"):
        counts[key] += len(read.faults)
    return dataclasses.replace(rows, counts=counts), list(read.records)
