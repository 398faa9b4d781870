"""The checkpoints of a run: folders that are complete or absent, read only when their manifest verifies.

They hold safetensors and JSON, no times and no paths, so that two runs of the same settings write the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorafit.errors import ResumeError
from lorafit.formats.folders import commit, complete, remove
from lorafit.formats.safetensors import open_file, write_safetensors

KEPT = 2  # newest checkpoints kept, besides the best
NAME = re.compile(r"(?P<leftover>\.(tmp|old)-)?step-(?P<step>\d{8})")


@contextmanager
def single_writer(out: Path) -> Iterator[None]:
    """Hold the run's folder for this process; raises ResumeError when another one has it.

    The lock is the kernel's (flock): it goes with the process however that ends, so no stale lock can remain.
    """
    with (out / ".lock").open("a") as file:
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
    """All that is trained by name: A and B; in full fine-tuning every weight, fp32."""
    optimizer: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one run, in OUT/checkpoints."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "checkpoints"

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, checkpoint: Checkpoint) -> None:
        """Commit it, then drop what is neither among the newest two nor the best, and what a crash left behind.

        Later steps go too: they are the damaged ones that the run had to go back from.
        """

        def write(folder: Path) -> None:
            write_safetensors(folder / "adapter.safetensors", checkpoint.adapter)
            write_safetensors(folder / "optimizer.safetensors", checkpoint.optimizer)
            state = {"progress": asdict(checkpoint.progress), "identity": checkpoint.identity}
            (folder / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")

        step = checkpoint.progress.step
        commit(self.path(step), write)
        newest = [s for s in self.steps() if s <= step][-KEPT:]
        keep = {self.path(s).name for s in (*newest, checkpoint.progress.best_step)}
        for path in list(self.folder.iterdir()):
            if NAME.fullmatch(path.name) and path.name not in keep:
                remove(path)

    def steps(self) -> list[int]:
        """Steps that have a folder under its final name, in order; `newest` checks what is inside."""
        if not self.folder.is_dir():
            return []
        found = (NAME.fullmatch(path.name) for path in self.folder.iterdir() if not path.is_symlink())
        return sorted(int(match["step"]) for match in found if match and not match["leftover"])

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest complete checkpoint, or None, and the names of newer ones that are damaged."""
        damaged: list[str] = []
        for step in reversed(self.steps()):
            if complete(self.path(step)):
                return self.read(step), damaged
            damaged.append(self.path(step).name)
        return None, damaged

    def read(self, step: int, optimizer: bool = True) -> Checkpoint:
        """The checkpoint of that step, without the optimizer's tensors if they are not wanted. Raises ResumeError when
        it is missing or damaged, or another version's."""
        folder = self.path(step)
        if not complete(folder):
            remedy = f"remove {self.folder} and resume: the run begins again and comes to the same bits"
            raise ResumeError(str(folder), "is damaged", remedy)
        try:
            state = json.loads((folder / "state.json").read_text())
            progress, identity = Progress(**state["progress"]), state["identity"]
        except (ValueError, KeyError, TypeError) as error:
            what = f"does not read: {error}"
            raise ResumeError(f"{folder}/state.json", what, "resume with the version that wrote it") from None
        tensors: dict[str, dict[str, Tensor]] = {"adapter": {}, "optimizer": {}}
        for part in ("adapter", "optimizer") if optimizer else ("adapter",):
            shards = open_file(folder / f"{part}.safetensors", ResumeError)
            tensors[part] = {name: shards.load(name).clone() for name in shards.shapes}
        return Checkpoint(progress, identity, **tensors)
