"""Reading and writing model files; nothing that is read here is trusted."""

from __future__ import annotations

from pathlib import Path


def place(path: Path, name: str) -> str:
    """File and key or tensor, for an error: a name that would upset a terminal is escaped, a long one cut."""
    return f"{path}: {name[:80] if name.isprintable() else ascii(name[:80])}"
