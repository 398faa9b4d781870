"""Folders and files that are complete or absent, whatever happens while they are written.

`commit` writes into a temporary folder, syncs each file, writes MANIFEST.json with every file's size and hash last,
syncs, renames, and syncs the parent: after a crash at any instant the folder is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from lorafit.errors import ConfigError

MANIFEST = "MANIFEST.json"


def commit(folder: Path, write: Callable[[Path], None], manifest: bool = True) -> None:
    """Make `folder` with what `write` puts into it, whole or not at all; an older one is replaced.

    manifest=False leaves MANIFEST.json out, for folders that other programs read.

    Raises ConfigError when the disk refuses (full, read-only); nothing committed before is touched then.
    """
    temporary = folder.with_name(f".tmp-{folder.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        written = sorted(temporary.iterdir())
        for path in written:
            sync(path)
        if manifest:
            files = {p.name: {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in written}
            (temporary / MANIFEST).write_text(json.dumps({"files": files}, indent=1, sort_keys=True) + "\n")
            sync(temporary / MANIFEST)
        sync(temporary)
        replaced = folder.with_name(f".old-{folder.name}")
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        temporary.rename(folder)
        sync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ConfigError(str(folder), f"cannot be written: {error.strerror}", "free space or choose --out") from None


def complete(folder: Path) -> bool:
    """Whether every file that the manifest names is there with its size and hash, and nothing else."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return {p.name for p in folder.iterdir()} == {*files, MANIFEST} and all(
            (folder / name).stat().st_size == entry["bytes"] and file_hash(folder / name) == entry["sha256"]
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_text_atomically(path: Path, text: str) -> None:
    """The file with this text, or the one that was there before."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
