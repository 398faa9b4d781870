"""Folders and files that are complete or absent, whatever happens while they are written.

`commit` writes into a temporary folder, syncs each file, writes MANIFEST.json with every file's size and hash last,
syncs, renames, and syncs the parent: after a crash at any instant the folder is there whole or not at all. A folder
that is replaced steps aside first, and comes back if the new one does not arrive. Nothing is written or removed
through a symbolic link: the link goes, and what it points to stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorafit.errors import ConfigError

MANIFEST = "MANIFEST.json"
LEFTOVERS = (".tmp-", ".old-")  # what a crash in `commit` can leave beside a folder; the next commit of it heals


def commit(folder: Path, write: Callable[[Path], None], manifest: bool = True) -> None:
    """Make `folder` with what `write` puts into it, whole or not at all; an older one is replaced.

    manifest=False leaves MANIFEST.json out, for folders that other programs read.

    Raises ConfigError when the disk refuses (full, read-only); nothing committed before is touched then.
    """
    temporary, replaced = (folder.with_name(mark + folder.name) for mark in LEFTOVERS)
    with refusals(folder):
        _put_back(replaced, folder)
        remove(temporary)
        make_folder(folder.parent)
        try:
            temporary.mkdir()
            write(temporary)
            _seal(temporary, manifest)
            remove(replaced)
            if os.path.lexists(folder):
                folder.rename(replaced)
            temporary.rename(folder)
            sync(folder.parent)
        except OSError:
            _put_back(replaced, folder)
            remove(temporary)
            raise
    remove(replaced)


def commit_file(path: Path, write: Callable[[Path], None]) -> None:
    """Make the file `path` by what `write` writes to the path it is given, whole or not at all.

    Raises what `write` raises, and ConfigError when the disk refuses; nothing is left behind then.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    with refusals(path):
        make_folder(path.parent)
        remove(temporary)
        try:
            write(temporary)
            sync(temporary)
            temporary.rename(path)
            sync(path.parent)
        finally:
            remove(temporary)


def complete(folder: Path) -> bool:
    """Whether every file that the manifest names is there with its size and hash, and nothing else."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return {p.name for p in folder.iterdir()} == {*files, MANIFEST} and all(
            (folder / name).stat().st_size == entry["bytes"] and file_hash(folder / name) == entry["sha256"]
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def write_text_atomically(path: Path, text: str) -> None:
    """The file with this text, or the one that was there before. Raises ConfigError when the disk refuses."""
    temporary = path.with_name(f".tmp-{path.name}")
    with refusals(path):
        remove(temporary)
        try:
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            temporary.rename(path)
            sync(path.parent)
        except OSError:
            remove(temporary)
            raise


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """What the disk refuses within (full, read-only, too large) as a ConfigError that names `path`."""
    try:
        yield
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise ConfigError(str(path), what, "free space there, or write elsewhere") from None


def make_folder(folder: Path) -> None:
    """The folder and its parents, each held by the disk: a synced file in a lost folder is lost. Raises
    ConfigError, OSError."""
    if not folder.is_dir():
        if folder.exists():
            raise ConfigError(str(folder), "is no folder", "name another path")
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link without what it points to; none is no error, and neither is failing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


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


def _seal(folder: Path, manifest: bool) -> None:
    """Have the disk hold every file, then the manifest that vouches for them, then the folder."""
    written = sorted(folder.iterdir())
    for path in written:
        sync(path)
    if manifest:
        files = {p.name: {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in written}
        (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1, sort_keys=True) + "\n")
        sync(folder / MANIFEST)
    sync(folder)


def _put_back(replaced: Path, folder: Path) -> None:
    """Undo the first of the two renames, where the second did not follow."""
    if os.path.lexists(replaced) and not os.path.lexists(folder):
        replaced.rename(folder)
