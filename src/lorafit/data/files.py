"""Files -> rows with places. A row is whatever one line, array element, CSV record or document holds, read strictly.

Faults are values in the stream, not exceptions: reading goes on after them wherever the file allows it, so that all
faults of a file are shown at once.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.data.strict_json import JsonError, read_value
from lorafit.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".txt")
LATER = (".tsv", ".parquet")
BOM = "\ufeff"
NEWLINE = b"\n"
BLANK = " \t\r\n" + BOM


@dataclass(frozen=True)
class Row:
    """One row as it stands in a file. `place` is file:line, the line being the one where the row begins."""

    place: str
    value: Any


def read_rows(path: Path) -> Iterator[Row | DataError]:
    """The rows and faults of one file, in its order. A file that cannot be opened is one fault."""
    reader = {".jsonl": _lines, ".json": _json, ".csv": _csv, ".txt": _document}.get(path.suffix.lower())
    if reader is None:
        yield _unsupported(path)
        return
    empty = True
    try:
        if _is_utf16(path):
            yield DataError(f"{path}:1", "the file is UTF-16, not UTF-8", "save it as UTF-8")
            return
        for row in reader(path):
            empty = False
            yield row
    except OSError as error:
        yield DataError(str(path), error.strerror or "cannot be read", "check the path")
        return
    if empty:
        yield DataError(f"{path}:1", "the file is empty", "it must hold at least one row")


def _is_utf16(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) in (b"\xff\xfe", b"\xfe\xff")


def data_files(paths: Sequence[Path]) -> tuple[list[Path], list[DataError]]:
    """The files named, folders replaced by the data files in them by name; hidden files and other kinds are passed
    over there."""
    files: list[Path] = []
    faults: list[DataError] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        try:
            inside = sorted(path.iterdir())
        except OSError as error:
            faults.append(DataError(str(path), error.strerror or "cannot be read", "check the path"))
            continue
        found = [p for p in inside if p.suffix.lower() in SUFFIXES + LATER and not p.name.startswith(".")]
        files += found
        if not found:
            faults.append(DataError(str(path), "the folder holds no data file", f"put {_listed(SUFFIXES)} files there"))
    return files, faults


def _unsupported(path: Path) -> DataError:
    if not path.exists():
        return DataError(str(path), "No such file or directory", "check the path")
    kind = path.suffix or "a file without a suffix"
    if path.suffix.lower() in LATER:
        return DataError(str(path), f"{kind} is not supported yet", f"convert it to one of {_listed(SUFFIXES)}")
    return DataError(str(path), f"{kind} is no kind of data that is read", f"give {_listed(SUFFIXES)}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]


def _lines(path: Path) -> Iterator[Row | DataError]:
    """JSON Lines, one at a time; a faulty line does not stop the next."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            text = _decoded(raw, path, number)
            if isinstance(text, DataError):
                yield text
            elif text.strip(BLANK):
                yield _json_line(text.rstrip(BLANK), f"{path}:{number}", ended=raw.endswith(b"\n"))


def _json_line(text: str, place: str, ended: bool) -> Row | DataError:
    try:
        value, end, wrong = read_value(text, len(text) - len(text.lstrip(BLANK)))
    except JsonError as fault:
        if not ended and _runs_out(text, fault):
            return DataError(place, f"the file ends in the middle of this row: {fault}", "it may have been cut")
        return DataError(place, str(fault), "write one JSON object per line")
    if end < len(text):
        return DataError(place, f"invalid JSON at column {end + 1}: text after the row", "write one object per line")
    return DataError(place, wrong, "mend the row") if wrong else Row(place, value)


def _runs_out(text: str, fault: JsonError) -> bool:
    """Whether the text was good JSON for as far as it goes."""
    return (fault.position or 0) >= len(text.rstrip()) or "unterminated string" in str(fault)


def _json(path: Path) -> Iterator[Row | DataError]:
    """A JSON array of rows, or rows one after another; a .json file that is really JSON Lines is read as such."""
    with path.open("rb") as file:
        first = next((line.strip().removeprefix(b"\xef\xbb\xbf") for line in file if line.strip()), b"")
    if first.startswith(b"{") and first.endswith(b"}"):
        yield from _lines(path)
        return
    text = _decoded(path.read_bytes(), path)
    if isinstance(text, DataError):
        yield text
        return
    yield from _elements(path, text)


def _elements(path: Path, text: str) -> Iterator[Row | DataError]:
    """The elements of the array that `text` is, or the values that stand in it one after another."""
    position = _after_space(text, text.startswith(BOM))
    array = text.startswith("[", position)
    position = _after_space(text, position + array)
    line, counted, comma = 1, 0, False
    while position < len(text) and (comma or not (array and text[position] == "]")):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end, wrong = read_value(text, position)
        except JsonError as fault:
            cut = "the file ends in the middle of a row: " if _runs_out(text, fault) else ""
            yield _stopped(path, text, fault.position or 0, cut + str(fault))
            return
        yield DataError(f"{path}:{line}", wrong, "mend the row") if wrong else Row(f"{path}:{line}", value)
        position = _after_space(text, end)
        comma = array and text.startswith(",", position)
        if comma:
            position = _after_space(text, position + 1)
        elif array:
            break
    if array and position == len(text):
        yield _stopped(path, text, position, "the file ends before its array does")
    elif array and text[position] != "]":
        yield _stopped(path, text, position, "no comma between two rows")
    elif array and (rest := _after_space(text, position + 1)) < len(text):
        yield _stopped(path, text, rest, "text after the end of the array")


def _stopped(path: Path, text: str, position: int, what: str) -> DataError:
    return DataError(f"{path}:{text.count(chr(10), 0, position) + 1}", what, "the rest of the file was not read")


def _after_space(text: str, position: int) -> int:
    """The next position that holds no white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _csv(path: Path) -> Iterator[Row | DataError]:
    """RFC 4180: a header, commas, quoted cells that may hold line ends. A row is {column: text}."""
    with path.open("rb") as file:
        # Bad bytes go through as lone surrogates, so that the record in which they stand can be named.
        lines = (raw.decode("utf-8", errors="surrogateescape") for raw in file)
        header: list[str] | None = None
        for line, cells in _csv_records(lines):
            place = f"{path}:{line}"
            if isinstance(cells, str):
                yield DataError(
                    place, f"invalid CSV: {cells}", 'put the cell in quotes and double the quotes in it ("")'
                )
            elif fault := next(filter(None, (_unsound_cell(cell) for cell in cells)), None):
                yield DataError(place, *fault)
                if header is None:
                    return
            elif header is None:
                header = [cells[0].removeprefix(BOM), *cells[1:]]
                twice = [name for name in header if header.count(name) > 1]
                if twice:
                    yield DataError(place, f'the column "{twice[0]}" stands twice in the header', "rename one of them")
                    return
            elif len(cells) != len(header):
                count = f"{len(cells)} cells, the header has {len(header)}"
                yield DataError(place, f"the row has {count}", "put cells that hold commas in quotes")
            else:
                yield Row(place, dict(zip(header, cells, strict=True)))


def _csv_records(lines: Iterator[str]) -> Iterator[tuple[int, list[str] | str]]:
    """(line where the record begins, its cells, or what is wrong with it); blank lines are passed over."""
    bound = csv.field_size_limit(sys.maxsize)  # a cell may hold a document; the module's bound is 128 KiB
    try:
        reader = csv.reader(lines, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, "a quoted cell never ends" if "end of data" in str(error) else str(error)
                continue
            if cells:
                yield line, cells
    finally:
        csv.field_size_limit(bound)


def _unsound_cell(cell: str) -> tuple[str, str] | None:
    if "\0" in cell:
        return "a NUL byte", "remove it"
    bad = next((character for character in cell if "\udc80" <= character <= "\udcff"), None)
    return (f"not UTF-8: byte 0x{ord(bad) - 0xDC00:02x}", "save the file as UTF-8") if bad else None


def _document(path: Path) -> Iterator[Row | DataError]:
    """A .txt file is one row, its text."""
    text = _decoded(path.read_bytes(), path)
    if isinstance(text, DataError):
        yield text
    elif text.strip(BLANK):
        yield Row(f"{path}:1", {"text": text.removeprefix(BOM)})


def _decoded(raw: bytes, path: Path, line: int = 1) -> str | DataError:
    """`raw`, which begins at `line` of the file, as text."""

    def fault(offset: int, what: str, remedy: str) -> DataError:
        column = offset - raw.rfind(NEWLINE, 0, offset)
        place = f"{path}:{line + raw.count(NEWLINE, 0, offset)}"
        return DataError(place, f"{what} at column {column}", remedy)

    if (nul := raw.find(b"\0")) >= 0:
        return fault(nul, "a NUL byte", "remove it")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return fault(error.start, f"not UTF-8: byte 0x{raw[error.start]:02x}", "save the file as UTF-8")
