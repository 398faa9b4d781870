"""Token rows kept on disk between commands, so that the same data is written out and encoded once.

    LORAFIT_CACHE/rows/KEY    32 bytes: sha256 of what follows;  then safetensors: ids, ends, trained, about (JSON)

KEY is a hash over all that `build_rows` depends on, this package's own source included: a file is right or has another
name. A damaged file is made anew. LORAFIT_CACHE is a folder, or 0 to keep nothing; where it is not set, rows are kept
in lorafit/ of XDG_CACHE_HOME or ~/.cache. Nobody but the user can read them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from array import array
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from lorafit.data.chat import Trained
from lorafit.data.records import Record
from lorafit.data.rows import Rows, build_rows
from lorafit.data.tokens import CHUNK, Tokenizer, TokenRow

VARIABLE = "LORAFIT_CACHE"
WORTH = CHUNK  # characters of JSON; less is encoded as fast as it is looked up
BOUND = 10**9  # bytes of all files together; those that were not used for longest go
SOURCE = Path(__file__).parent.parent
LIBRARIES = ("tokenizers", "jinja2")
CHECKSUM = hashlib.sha256().digest_size


def cached_rows(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int | None,
    context: int,
    trained: Trained = "assistant",
) -> Rows:
    """What `build_rows` gives, read back where it was made before. Only time depends on whether it was."""
    file = _file(records, tokenizer, [max_length, context, trained])
    rows = _read(file, records) if file else None
    if rows is None:
        rows = build_rows(records, tokenizer, max_length=max_length, context=context, trained=trained)
        if file and not rows.faults:  # a refusal may come of the time that a template took
            _write(file, rows, records)
    return rows


def folder_of(kind: str) -> Path | None:
    """Where files of this kind, such as rows, are kept; None to keep none."""
    wanted = os.environ.get(VARIABLE)
    if wanted:
        return None if wanted == "0" else Path(wanted) / kind
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "lorafit" / kind


def _file(records: Sequence[Record], tokenizer: Tokenizer, settings: list[Any]) -> Path | None:
    """The file of these rows, there or not; None where rows are not kept, or follow from the time too."""
    folder, key, size = folder_of("rows"), hashlib.sha256(), 0
    if folder is None:
        return None
    for one in records:
        said = json.dumps([one.place, one.format, one.prompt, one.messages, one.tools, one.text]).encode()
        key.update(said)
        size += len(said)
    if size < WORTH or (encoding := tokenizer.digest()) is None:
        return None
    key.update(json.dumps([settings, encoding, _code()]).encode())
    return folder / key.hexdigest()


@cache
def _code() -> list[str]:
    """What makes the rows: a hash of this package's source, the versions of Python and of the libraries behind it."""
    source = hashlib.sha256()
    for file in sorted(SOURCE.rglob("*.py")):
        source.update(hashlib.sha256(file.read_bytes()).digest())
    return [source.hexdigest(), sys.version, *map(version, LIBRARIES)]


def _read(file: Path, records: Sequence[Record]) -> Rows | None:
    """The rows in a file; None where there is none, or it is damaged."""
    try:
        content = file.read_bytes()
        os.utime(file)  # so that it counts as used
    except OSError:
        return None
    body = content[CHECKSUM:]
    if hashlib.sha256(body).digest() != content[:CHECKSUM]:
        return None
    found = load(body)
    about = json.loads(found["about"].tobytes())
    trained = found["trained"].tolist()
    rows = []
    bounds = pairwise(np.cumsum([0, *about["lengths"]]).tolist())
    for (start, stop), (record, rendered, cut, notes) in zip(bounds, about["rows"], strict=True):
        ids, ends = (array("i", found[name][start:stop].tobytes()) for name in ("ids", "ends"))
        rows.append(TokenRow(records[record], rendered, ids, trained[start:stop], ends, cut, tuple(notes)))
    return Rows(rows, [(place, what) for place, what in about["problems"]], about["counts"], [], about["max_length"])


def _write(file: Path, rows: Rows, records: Sequence[Record]) -> None:
    """Keep the rows; where the disk refuses, nothing is lost but time."""
    number = {id(record): n for n, record in enumerate(records)}
    about = {
        "rows": [[number[id(row.record)], row.rendered, row.cut, row.notes] for row in rows.rows],
        "lengths": [len(row.ids) for row in rows.rows],
        "problems": rows.problems,
        "counts": rows.counts,
        "max_length": rows.max_length,
    }
    body = save(
        {
            "ids": np.frombuffer(b"".join(row.ids for row in rows.rows), np.int32),
            "ends": np.frombuffer(b"".join(row.ends for row in rows.rows), np.int32),
            "trained": np.frombuffer(b"".join(bytes(row.trained) for row in rows.rows), np.bool_),
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        }
    )
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_bytes(hashlib.sha256(body).digest() + body)
        temporary.replace(file)
        _make_room(file.parent)
    except OSError:
        with suppress(OSError):
            temporary.unlink()


def _make_room(folder: Path) -> None:
    """Remove the files that were used longest ago, down to BOUND."""
    size = 0
    for used in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns, reverse=True):
        size += used.stat().st_size
        if size > BOUND:
            used.unlink()
