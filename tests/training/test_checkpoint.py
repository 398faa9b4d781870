"""The laws of lorafit.training.checkpoint: the newest and the best are always there, and read only when whole."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from builders.crashes import dies_at, largest_file
from lorafit.errors import ConfigError, ResumeError
from lorafit.formats.folders import commit, complete
from lorafit.training.checkpoint import Checkpoint, Checkpoints, Progress, single_writer

IDENTITY = {"base": "0123", "settings": {"lr": 0.01, "targets": ["all-linear"]}, "init_adapter": None}


def checkpoint(progress: Progress, size: int = 3) -> Checkpoint:
    """One whose tensors are a function of its step."""
    generator = torch.Generator().manual_seed(progress.step)
    adapter = {"layer.A": torch.randn(size, 4, generator=generator)}
    optimizer = {"layer.A.exp_avg": torch.randn(size, 4, generator=generator), "layer.A.step": torch.tensor(7.0)}
    return Checkpoint(progress, IDENTITY, adapter, optimizer)


def after(progress: Progress, loss: float) -> Progress:
    """Progress one step on, whose evaluation gave `loss`."""
    step = progress.step + 1
    if progress.best_loss is None or loss < progress.best_loss:
        return replace(progress, step=step, best_step=step, best_loss=loss)
    return replace(progress, step=step)


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    """Equal in every bit."""
    assert a.progress == b.progress
    assert a.identity == b.identity
    for ours, theirs in ((a.adapter, b.adapter), (a.optimizer, b.optimizer)):
        assert ours.keys() == theirs.keys()
        assert all(ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_round_trip_keeps_every_bit(tmp_path):
    """Progress, identity and tensors come back as they were, tiny, huge and zero-dimensional ones too."""
    saved = checkpoint(Progress(7, best_step=5, best_loss=1 / 3, stale_evaluations=2, finished=True))
    saved.adapter["extremes"] = torch.tensor([1e-45, 3.4e38, -0.0, 1 / 3])
    Checkpoints(tmp_path).save(saved)
    assert_same(Checkpoints(tmp_path).read(7), saved)
    newest, damaged = Checkpoints(tmp_path).newest()
    assert newest is not None
    assert_same(newest, saved)
    assert damaged == []


def test_the_same_state_gives_the_same_bytes(tmp_path):
    """Saved in two folders at two times, every file is equal, so nothing in it is a time or a path."""
    for name in "ab":
        Checkpoints(tmp_path / name).save(checkpoint(Progress(4, best_step=4)))
    folders = [Checkpoints(tmp_path / name).path(4) for name in "ab"]
    files = names(folders[0])
    assert files == {"adapter.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"}
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in files)
    state = json.loads((folders[0] / "state.json").read_text())
    assert set(state) == {"progress", "identity"}
    assert set(state["progress"]) == {"step", "best_step", "best_loss", "stale_evaluations", "finished"}


def test_no_checkpoint_is_none(tmp_path):
    """A run that has none begins at step 0."""
    assert Checkpoints(tmp_path).newest() == (None, [])


def dump(value: object, file: Path) -> None:
    file.write_text(json.dumps(value))


def damage(folder: Path, kind: str) -> None:
    file = folder / ("state.json" if kind == "flip in the state" else "optimizer.safetensors")
    if kind == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif kind.startswith("flip"):
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    elif kind == "extra file":
        (folder / "notes.txt").touch()
    elif kind == "no manifest":
        (folder / "MANIFEST.json").unlink()
    else:
        (folder / "MANIFEST.json").write_text("{")


KINDS = ("cut", "flip in a tensor", "flip in the state", "extra file", "no manifest", "manifest is no JSON")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_ones_are_skipped_and_named(tmp_path, kind):
    """The newest whole one is taken and each newer one is named; reading a damaged one by its step is one line."""
    checkpoints = Checkpoints(tmp_path)
    saved = [checkpoint(Progress(step, best_step=1)) for step in (1, 2, 3)]
    for each in saved:
        checkpoints.save(each)
    damage(checkpoints.path(3), kind)
    newest, damaged = checkpoints.newest()
    assert newest is not None
    assert_same(newest, saved[1])
    assert damaged == ["step-00000003"]
    with pytest.raises(ResumeError, match=r"step-00000003: is damaged; remove .* and resume"):
        checkpoints.read(3)
    damage(checkpoints.path(2), kind)
    damage(checkpoints.path(1), kind)
    assert checkpoints.newest() == (None, ["step-00000003", "step-00000002", "step-00000001"])


def test_another_versions_state_is_one_line(tmp_path):
    """A whole checkpoint with a field that we do not know is refused, not half understood."""
    state = {"progress": {"step": 1, "moon": "full"}, "identity": {}}
    commit(Checkpoints(tmp_path).path(1), lambda folder: dump(state, folder / "state.json"))
    with pytest.raises(ResumeError, match=r"state.json: does not read: .*moon.*; resume with the version"):
        Checkpoints(tmp_path).read(1)


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    """And a folder of the user's own, whatever it is called, is no checkpoint of ours to drop."""
    checkpoints, progress = Checkpoints(tmp_path), Progress()
    for loss in (3.0, 1.0, 2.0, 1.5, 1.0):
        progress = after(progress, loss)
        checkpoints.save(checkpoint(progress))
        (checkpoints.folder / "step-00000001-backup").mkdir(exist_ok=True)
    assert names(checkpoints.folder) == {
        "step-00000002",
        "step-00000004",
        "step-00000005",
        "step-00000001-backup",
    }


def test_a_damaged_later_step_does_not_push_out_the_one_saved(tmp_path):
    """After going back past two damaged checkpoints, the next save is kept and the damaged ones go."""
    checkpoints = Checkpoints(tmp_path)
    for step in (2, 8, 9):
        checkpoints.save(checkpoint(Progress(step, best_step=2)))
    for step in (8, 9):
        damage(checkpoints.path(step), "cut")
    checkpoints.save(checkpoint(Progress(5, best_step=2)))
    assert checkpoints.steps() == [2, 5]


def test_a_link_is_no_checkpoint(tmp_path):
    """A link named like a checkpoint, or like a crash's leftover, is not read; rotation takes the link alone."""
    precious = tmp_path / "precious"
    Checkpoints(precious).save(checkpoint(Progress(3, best_step=3)))
    checkpoints = Checkpoints(tmp_path / "out")
    checkpoints.folder.mkdir(parents=True)
    for name in ("step-00000003", ".tmp-step-00000004", ".old-step-00000001", "step-00000004"):
        (checkpoints.folder / name).symlink_to(Checkpoints(precious).path(3))
    assert checkpoints.newest() == (None, [])
    checkpoints.save(checkpoint(Progress(4, best_step=4)))
    assert names(checkpoints.folder) == {"step-00000004"}
    assert not checkpoints.path(4).is_symlink()
    assert_same(Checkpoints(precious).read(3), checkpoint(Progress(3, best_step=3)))


def test_the_lock_goes_through_no_link(tmp_path):
    """A lock file that is a link leaves the bytes it points to."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with single_writer(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_killed_at_any_instant_of_a_save(tmp_path):
    """Before each file operation of a save that also drops a checkpoint: the newest is the old one or the new one,
    its best is there, and the save after the crash leaves exactly what an undisturbed run has."""
    before, new = [checkpoint(Progress(step, 2, 1.0)) for step in (2, 3, 4)], checkpoint(Progress(5, 5, 0.5))
    for old in before:
        Checkpoints(tmp_path / "before").save(old)
    seen = set()
    for k in count():
        checkpoints = Checkpoints(tmp_path / str(k))
        shutil.copytree(tmp_path / "before", tmp_path / str(k))
        died = dies_at(k, lambda checkpoints=checkpoints, new=new: checkpoints.save(new))
        newest, _ = checkpoints.newest()
        assert newest is not None
        seen.add(newest.progress.step)
        assert_same(newest, before[-1] if newest.progress.step == 4 else new)
        checkpoints.read(newest.progress.best_step)
        if newest.progress.step == 4:
            checkpoints.save(new)
        checkpoints.save(checkpoint(Progress(6, 5, 0.5)))
        assert names(checkpoints.folder) == {"step-00000005", "step-00000006"}
        if not died:
            break
    assert seen == {4, 5}


class Crash(BaseException):
    """The process ends here; nothing in lorafit catches it."""


@pytest.fixture
def fuse(monkeypatch):
    """A list with the number of file operations left before a Crash; without one, nothing happens."""
    left: list[int] = []

    def burning(function):
        def call(*args, **kwargs):
            if left and left[0] == 0:
                raise Crash
            if left:
                left[0] -= 1
            return function(*args, **kwargs)

        return call

    for name in ("open", "mkdir", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, burning(getattr(os, name)))
    monkeypatch.setattr(os, "fsync", burning(lambda handle: None))  # a disk that never loses power needs none
    return left


def test_rotation_over_random_runs(tmp_path, fuse):
    """1000 random sequences of losses, saves and crashes: after each, the newest complete checkpoint is the last one
    saved or the one being saved, the best one stands beside it, and a finished save leaves no litter."""
    chance, crashes = random.Random(0), 0
    for sequence in range(1000):
        checkpoints, progress = Checkpoints(tmp_path / str(sequence)), Progress()
        for _ in range(chance.randrange(1, 5)):
            wanted = after(progress, chance.choice((1.0, 2.0, 3.0)))
            fuse[:] = [chance.randrange(40)] if chance.random() < 0.4 else []
            try:
                checkpoints.save(checkpoint(wanted))
                crashed = False
            except Crash:
                crashed = True
            fuse.clear()
            newest, damaged = checkpoints.newest()
            assert damaged == []
            found = newest.progress if newest else Progress()
            assert found in ((progress, wanted) if crashed else (wanted,))
            assert newest is None or complete(checkpoints.path(found.best_step))
            if not crashed:
                kept = {wanted.step, wanted.best_step, *checkpoints.steps()[-2:]}
                assert names(checkpoints.folder) == {checkpoints.path(step).name for step in kept}
            crashes += crashed
            progress = found
    assert crashes > 300


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """Refused at any file of the save: one line with path and cause, exit code 2, the previous one whole; with room
    again, the same save goes through."""
    checkpoints, previous = Checkpoints(tmp_path), checkpoint(Progress(1, best_step=1), size=100)
    checkpoints.save(previous)
    new = checkpoint(Progress(2, best_step=1), size=100)
    sizes = sorted(path.stat().st_size for path in checkpoints.path(1).iterdir())
    for size in (0, 1, *(size - 1 for size in sizes)):
        with pytest.raises(ConfigError) as caught, largest_file(size):
            checkpoints.save(new)
        assert caught.value.exit_code == 2
        cause = "cannot be written: File too large; free space there, or write elsewhere"
        assert caught.value.lines() == [f"{checkpoints.path(2)}: {cause}"]
        assert names(checkpoints.folder) == {"step-00000001"}
        newest, damaged = checkpoints.newest()
        assert newest is not None
        assert_same(newest, previous)
        assert damaged == []
    with largest_file(sizes[-1]):
        checkpoints.save(new)
    assert_same(checkpoints.read(2), new)
