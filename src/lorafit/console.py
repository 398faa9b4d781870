"""What a person sees: progress and warnings on standard error, results on standard output. Only this file prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from lorafit.errors import ConfigError

_err = Console(stderr=True, soft_wrap=True)
_out = Console(soft_wrap=True)
# Control characters of the user's data as their pictures, since a terminal would obey them.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}


def say(message: str) -> None:
    """One line of news on standard error."""
    _err.print(Text(message))


def warn(message: str) -> None:
    """One line that the user should act on, on standard error."""
    _err.print(Text.assemble(("warning:", "yellow"), " ", message))


def fail(lines: Iterable[str]) -> None:
    """`error: ...` lines on standard error."""
    for line in lines:
        _err.print(Text.assemble(("error:", "red"), " ", line))


def result(text: str) -> None:
    """A command's result on standard output, as it is."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def result_json(value: Any) -> None:
    """A command's result as one JSON document on standard output."""
    result(json.dumps(value, ensure_ascii=False, allow_nan=False))


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A small table on standard output, its columns as wide as their widest cell and never folded."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(map(set_cell_size, line, widths)).rstrip() for line in lines]
    if title:
        result(title)
    _out.print(Text(shown[0], style="bold"))
    result("\n".join(shown[1:]))


def coloured(pieces: Iterable[tuple[str, bool]]) -> None:
    """Text on standard output with the trained pieces in green, the rest dim."""
    text = Text()
    for piece, trained in pieces:
        text.append(piece.translate(_PICTURES), style="bold green" if trained else "dim")
    _out.print(text)


def piece(text: str) -> None:
    """A part of a result on standard output, at once; what a terminal would obey is shown as pictures."""
    sys.stdout.write(text.translate(_PICTURES) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def lines(prompt: str) -> Iterator[str]:
    """Lines of standard input that say something, until it ends. A person sees the prompt and can edit the line;
    Ctrl-C drops the line, and on an empty one, the second time, ends them as Ctrl-D does. Raises ConfigError."""
    if sys.stdin is None:  # closed by whoever started this
        return
    if not sys.stdin.isatty():
        try:
            for line in sys.stdin:
                line.encode()  # in some locales bytes that are no UTF-8 arrive as halves of surrogate pairs
                if line.strip():
                    yield line.strip()
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            raise ConfigError("standard input", f"is not UTF-8: {error.reason}", "send it as UTF-8") from None
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input)
    warned = False
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return result("")
        except KeyboardInterrupt:
            result("")
            if warned:
                return None
            warned = True
            say("once more, or Ctrl-D, leaves")
            continue
        warned = False
        if line:
            yield line


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


class Steps:
    """Progress of a training run: a live bar for a person, a line per tenth of the run for a log."""

    def __init__(self, steps: int, left: Callable[[int], float]) -> None:
        """left: seconds from the end of a step to the end of the last."""
        self._steps, self._left = steps, left
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[news]}"),
            console=_err,
            transient=True,
            disable=not is_terminal(),
        )
        self._task = self._bar.add_task("training", total=steps, news="")

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def line(self, values: dict[str, Any]) -> None:
        """Show one line of metrics.jsonl."""
        step = values["step"]
        if "eval_loss" in values:
            say(f"step {step}/{self._steps}  held-out loss {values['eval_loss']:.4f}")
            return
        left = duration(self._left(step))
        speed = values["tokens_per_second"]
        self._bar.update(
            self._task, completed=step, news=f"loss {values['loss']:.4f}  {speed:.0f} tokens/s  {left} left"
        )
        if not is_terminal() and (step == 1 or step % max(1, self._steps // 10) == 0):
            say(f"step {step}/{self._steps}  loss {values['loss']:.4f}  {speed:.0f} tokens/s  {left} left")


def facts(found: dict[str, Any], as_json: bool) -> None:
    """Facts by name on standard output: JSON, or a line each with nested ones indented."""
    if as_json:
        return result_json(found)

    def lines(values: dict[str, Any], indent: str) -> Iterable[str]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield f"{indent}{key}"
                yield from lines(value, indent + "  ")
            else:
                shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
                shown = f"{value:.6g}" if isinstance(value, float) else shown
                yield f"{indent}{key:<22} {shown}"

    return result("\n".join(lines(found, "")))
