"""What a person sees: progress, tables, warnings on standard error; results on standard output. Only this file prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

_err = Console(stderr=True, highlight=False, soft_wrap=True)
_out = Console(highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """One line of news on standard error."""
    _err.print(escape(message))


def warn(message: str) -> None:
    """One line that the user should act on, on standard error."""
    _err.print(f"[yellow]warning:[/] {escape(message)}")


def fail(lines: Iterable[str]) -> None:
    """`error: ...` lines on standard error."""
    for line in lines:
        _err.print(f"[red]error:[/] {escape(line)}")


def result(text: str) -> None:
    """A command's result on standard output, as it is."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def result_json(value: Any) -> None:
    """A command's result as one JSON document on standard output."""
    result(json.dumps(value, ensure_ascii=False, allow_nan=False))


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, on_stdout: bool = False) -> None:
    """A small table; numbers are right-aligned by the caller's choice of text."""
    shown = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in header:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(escape(cell) for cell in row))
    (_out if on_stdout else _err).print(shown)


def coloured(pieces: Iterable[tuple[str, bool]]) -> None:
    """Text on standard output with the trained pieces in green, the rest dim."""
    text = Text()
    for piece, trained in pieces:
        text.append(piece, style="bold green" if trained else "dim")
    _out.print(text)


def is_terminal() -> bool:
    """Whether a person watches standard error."""
    return _err.is_terminal


def duration(seconds: float) -> str:
    """Seconds as people read them: 41 s, 3 min 05 s, 2 h 10 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def gigabytes(size: float) -> str:
    """Bytes in GB (10^9 bytes), or MB below one tenth of that."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
