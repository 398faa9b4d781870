"""Where exports go: to a path that is free, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafit.errors import ConfigError, LorafitError
from lorafit.formats.folders import remove


def refuse_existing(path: Path, option: str) -> None:
    """Raise ConfigError when there is something at `path` already."""
    if path.exists() or path.is_symlink():
        raise ConfigError(option, f"{path} exists already", "name another path, or remove it")


@contextmanager
def nothing_left(path: Path) -> Iterator[None]:
    """What was written at `path` goes when an error of ours, or Ctrl-C, comes out of the block."""
    try:
        yield
    except (LorafitError, KeyboardInterrupt):
        remove(path)
        raise
