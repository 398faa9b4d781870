"""Folders that are complete or absent, and the checkpoints of a run made of them.

`commit` writes into a temporary folder, syncs each file, writes MANIFEST.json with every file's size and hash last,
syncs, renames, and syncs the parent: after a crash at any instant the folder is there whole or not at all. A reader
takes only folders whose manifest verifies. Checkpoints hold safetensors and JSON, no times and no paths, so that two
runs of the same settings write the same bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from lorafit.errors import ConfigError, ResumeError
from lorafit.formats.safetensors import open_file, write_safetensors

MANIFEST = "MANIFEST.json"
KEPT = 2  # newest checkpoints kept, besides the best


def commit(folder: Path, write: Callable[[Path], None]) -> None:
    """Make `folder` with what `write` puts into it, whole or not at all; an older one is replaced.

    Raises ConfigError when the disk refuses (full, read-only); nothing committed before is touched then.
    """
    temporary = folder.with_name(f".tmp-{folder.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        files = {}
        for path in sorted(p for p in temporary.iterdir()):
            _sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        (temporary / MANIFEST).write_text(json.dumps({"files": files}, indent=1, sort_keys=True) + "\n")
        _sync(temporary / MANIFEST)
        _sync(temporary)
        replaced = folder.with_name(f".old-{folder.name}")
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        temporary.rename(folder)
        _sync(folder.parent)
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
    _sync(temporary)
    temporary.rename(path)
    _sync(path.parent)


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def single_writer(out: Path) -> Iterator[None]:
    """Hold the run's folder for this process; raises ResumeError when another one has it.

    The lock is the kernel's (flock): it goes with the process however that ends, so no stale lock can remain.
    """
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResumeError(str(out), "another lorafit process is writing to it", "wait for it or stop it") from None
        yield


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `step` optimizer steps. Losses are held-out nats per trained token."""

    step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    stale_evaluations: int = 0
    finished: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's folder holds."""

    progress: Progress
    identity: dict[str, Any]
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one run, in OUT/checkpoints."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "checkpoints"

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, checkpoint: Checkpoint) -> None:
        """Commit it, then drop what is neither among the newest two nor the best."""

        def write(folder: Path) -> None:
            write_safetensors(folder / "adapter.safetensors", checkpoint.adapter)
            write_safetensors(folder / "optimizer.safetensors", checkpoint.optimizer)
            state = {"progress": asdict(checkpoint.progress), "identity": checkpoint.identity}
            (folder / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")

        commit(self.path(checkpoint.progress.step), write)
        keep = {*self.steps()[-KEPT:], checkpoint.progress.best_step}
        for step in self.steps():
            if step not in keep:
                shutil.rmtree(self.path(step), ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps that have a folder under its final name, in order; `newest` checks what is inside."""
        if not self.folder.is_dir():
            return []
        found = (re.fullmatch(r"step-(\d{8})", path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest complete checkpoint, or None, and the names of newer ones that are damaged."""
        damaged = []
        for step in reversed(self.steps()):
            if complete(self.path(step)):
                return self.read(step), damaged
            damaged.append(self.path(step).name)
        return None, damaged

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of that step. Raises ResumeError when its state does not read."""
        folder = self.path(step)
        try:
            state = json.loads((folder / "state.json").read_text())
            names = {field.name for field in fields(Progress)}
            progress = Progress(**{key: value for key, value in state["progress"].items() if key in names})
            identity = state["identity"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResumeError(f"{folder}/state.json", f"does not read: {error}", "remove that folder") from None
        adapter, optimizer = (
            {name: shards.load(name).clone() for name in shards.shapes}
            for shards in (open_file(folder / f"{part}.safetensors", ResumeError) for part in ("adapter", "optimizer"))
        )
        return Checkpoint(progress, identity, adapter, optimizer)
