"""The user's files as a command needs them: a chat template's source, and data as token rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lorafit import console
from lorafit.config import TrainConfig
from lorafit.data.cache import cached_rows
from lorafit.data.records import Record, read_records
from lorafit.data.rows import Rows
from lorafit.errors import SHOWN, ConfigError, DataError, Faults
from lorafit.formats.template import ChatTemplate
from lorafit.formats.tokenizer import TextTokenizer

NO_TEMPLATE = "the model has no chat template: conversations use lorafit's plain one (### User: ... ### Assistant: ...)"


def read_template(file: str | None) -> str | None:
    """The chat template in a file, if one is given. Raises ConfigError or ModelError when it does not read."""
    if file is None:
        return None
    try:
        source = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--template: {file}", f"does not read: {what}", "give a Jinja file") from None
    ChatTemplate(source, f"--template: {file}")  # what is wrong with it is said of this file, not of the model's
    return source


def collect_rows(
    paths: Sequence[str], tokenizer: TextTokenizer, config: TrainConfig, context: int
) -> tuple[Rows, list[Record], list[DataError]]:
    """Token rows of the files, the records behind them, and every fault; rows with faults are counted as skipped.

    A fault whose place is one of `paths` is of a file that does not read at all: there is no row to count.
    """
    read = read_records([Path(path) for path in paths])
    rows = cached_rows(
        read.records, tokenizer, max_length=config.max_length, trained=config.trained, context=context
    )  # fmt: skip
    bad = sum(fault.place not in paths for fault in read.faults)
    counts = {**rows.counts, "rows": rows.counts["rows"] + bad, "skipped": rows.counts["skipped"] + bad}
    return dataclasses.replace(rows, counts=counts), read.records, [*read.faults, *rows.faults]


def read_rows(
    paths: Sequence[str], tokenizer: TextTokenizer, config: TrainConfig, context: int
) -> tuple[Rows, list[Record]]:
    """Token rows of the files, and their records; raises Faults unless bad rows are to be skipped, and then too where
    a file does not read at all."""
    rows, records, faults = collect_rows(paths, tokenizer, config, context)
    fatal = [fault for fault in faults if fault.place in paths] if config.skip_bad_rows else faults
    if fatal:
        raise Faults(fatal)
    for fault in faults[:SHOWN]:
        console.warn(f"skipped: {fault}")
    if len(faults) > SHOWN:
        console.warn(f"skipped: {len(faults) - SHOWN} more")
    return rows, records
