"""The laws of lorafit.formats.folders: whole or not at all, at every instant, on any disk, past any link."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from builders.crashes import dies_at, largest_file, operations
from lorafit.errors import ConfigError
from lorafit.formats.folders import MANIFEST, commit, commit_file, complete, make_folder, remove, write_text_atomically


def writer(word: str) -> Callable[[Path], None]:
    """Two files of 300 words each, one of them written in two halves."""

    def write(folder: Path) -> None:
        (folder / "a.txt").write_text(word * 300)
        (folder / "b.txt").write_text(word * 150)
        with (folder / "b.txt").open("a") as file:
            file.write(word * 150)

    return write


def holds(folder: Path, word: str) -> bool:
    """Whether the folder is what `writer(word)` makes, whole."""
    names = {p.name for p in folder.iterdir()} - {MANIFEST} if folder.is_dir() else set()
    return names == {"a.txt", "b.txt"} and all((folder / name).read_text() == word * 300 for name in names)


def contents(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir()}


def test_a_new_folder_is_whole_or_absent_wherever_the_process_dies(tmp_path):
    """Killed before each of its file operations: what stands under the name is complete, and a second try heals."""
    for k in count():
        folder = tmp_path / str(k) / "step-1"
        died = dies_at(k, lambda folder=folder: commit(folder, writer("new")))
        assert complete(folder) == folder.exists()
        commit(folder, writer("more"))
        assert holds(folder, "more")
        assert complete(folder)
        assert [p.name for p in folder.parent.iterdir()] == ["step-1"]
        if not died:
            break
    assert k > 12


def test_a_replaced_folder_is_old_or_new_or_comes_back(tmp_path):
    """Killed at any instant of a replacement, the old folder or the new one stands whole, or the old one waits beside
    and is back after the next commit, even when the disk refuses that one; no litter outlives a finished commit."""
    waiting = 0
    for k in count():
        folder = tmp_path / str(k) / "adapter"
        commit(folder, writer("old"), manifest=False)
        died = dies_at(k, lambda folder=folder: commit(folder, writer("new"), manifest=False))
        if not folder.exists():
            waiting += 1
            assert holds(folder.with_name(".old-adapter"), "old")
        word = "new" if holds(folder, "new") else "old"
        with pytest.raises(ConfigError), largest_file(100):
            commit(folder, writer("more"), manifest=False)
        assert holds(folder, word)
        commit(folder, writer("more"), manifest=False)
        assert holds(folder, "more")
        assert [p.name for p in folder.parent.iterdir()] == ["adapter"]
        if not died:
            break
    assert waiting == 1


def test_a_second_crash_loses_nothing_either(tmp_path):
    """With the old folder still waiting beside from one crash, the next commit may die anywhere too."""
    for k in count():
        folder = tmp_path / str(k) / "adapter"
        waiting = folder.with_name(".old-adapter")
        commit(waiting, writer("old"), manifest=False)
        died = dies_at(k, lambda folder=folder: commit(folder, writer("new"), manifest=False))
        assert holds(folder, "new") or holds(folder, "old") or holds(waiting, "old")
        if not died:
            break
    assert holds(folder, "new")


def test_a_refused_rename_brings_the_old_folder_back(tmp_path, monkeypatch):
    """The old folder has stepped aside and the disk refuses the new one its name: as if nothing had been tried."""
    folder, rename = tmp_path / "adapter", os.rename
    commit(folder, writer("old"))

    def refusing(source, target):
        if Path(source).name == ".tmp-adapter":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refusing)
    with pytest.raises(ConfigError, match="adapter: cannot be written: No space left on device"):
        commit(folder, writer("new"))
    assert holds(folder, "old")
    assert complete(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_file_is_the_old_one_or_the_new_one_wherever_the_process_dies(tmp_path):
    """write_text_atomically never shows half a text, and its leftover is used up by the next call."""
    path = tmp_path / "run.yaml"
    for k in count():
        write_text_atomically(path, "old" * 99)
        died = dies_at(k, lambda: write_text_atomically(path, "new" * 99))
        assert path.read_text() in ("old" * 99, "new" * 99)
        if not died:
            break
    assert k > 4
    assert contents(tmp_path) == {"run.yaml": "new" * 99}


def test_everything_is_synced_before_the_name_appears(tmp_path):
    """Order on disk: files, manifest, folder, rename, parent; nothing is written after its sync; new parents too."""
    folder = tmp_path / "checkpoints" / "step-1"
    log = operations(lambda: commit(folder, writer("new")), tmp_path / "log")
    named = log.index(("rename", [str(folder.with_name(".tmp-step-1")), str(folder)]))

    def synced(path: Path) -> int:
        return log.index(("fsync", path.stat().st_ino))

    files = [synced(folder / name) for name in ("a.txt", "b.txt")]
    assert max(files) < synced(folder / MANIFEST) < synced(folder) < named < len(log)
    assert ("fsync", folder.parent.stat().st_ino) in log[named:]
    assert log.index(("mkdir", [str(folder.parent), "511"])) < synced(tmp_path)
    for name in ("a.txt", "b.txt", MANIFEST):
        writes = [at for at, (event, about) in enumerate(log) if event == "write" and about.endswith(f"-1/{name}")]
        assert writes
        assert max(writes) < synced(folder / name)


def test_a_text_is_synced_before_its_name_appears(tmp_path):
    """Order on disk: the new file, the rename, the parent."""
    path = tmp_path / "run.yaml"
    log = operations(lambda: write_text_atomically(path, "text"), tmp_path / "log")
    named = log.index(("rename", [str(tmp_path / ".tmp-run.yaml"), str(path)]))
    assert log.index(("fsync", path.stat().st_ino)) < named < log.index(("fsync", tmp_path.stat().st_ino))


@pytest.mark.parametrize("size", [0, 1, 100, 599, 899])
def test_a_disk_that_refuses_leaves_what_was_there(tmp_path, size):
    """One line with the path and the cause, exit code 2, the old folder untouched, no litter; with room it works."""
    folder, file = tmp_path / "adapter", tmp_path / "run.yaml"
    commit(folder, writer("old"))
    write_text_atomically(file, "old")
    for action in (lambda: commit(folder, writer("new")), lambda: write_text_atomically(file, "new" * 300)):
        line = rf"{tmp_path}/.*: cannot be written: File too large; free space there"
        with pytest.raises(ConfigError, match=line) as caught, largest_file(size):
            action()
        assert caught.value.exit_code == 2
        assert len(caught.value.lines()) == 1
    assert holds(folder, "old")
    assert complete(folder)
    assert file.read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "run.yaml"}
    commit(folder, writer("new"))
    assert holds(folder, "new")


def test_a_place_that_is_no_folder_is_one_line(tmp_path):
    """A file where a parent folder should be is refused with the path."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file: is no folder; name another path"):
        commit(tmp_path / "file" / "sub" / "adapter", writer("new"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["adapter", ".tmp-adapter", ".old-adapter"])
@pytest.mark.parametrize("target", ["precious", "nowhere"])
def test_links_are_replaced_and_never_followed(tmp_path, name, target):
    """A link under any name that commit writes or removes, broken or not: what it points to keeps every file."""
    precious = tmp_path / "precious"
    commit(precious, writer("mine"))
    out = tmp_path / "out"
    commit(out / "adapter", writer("old"))
    remove(out / name)
    (out / name).symlink_to(tmp_path / target)
    commit(out / "adapter", writer("new"))
    assert holds(precious, "mine")
    assert holds(out / "adapter", "new")
    assert not (out / "adapter").is_symlink()
    assert [p.name for p in out.iterdir()] == ["adapter"]


@pytest.mark.parametrize("name", ["run.yaml", ".tmp-run.yaml"])
def test_a_text_is_not_written_through_a_link(tmp_path, name):
    """The file that a link points to keeps its bytes; the name becomes a file of its own."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / name).symlink_to(precious)
    write_text_atomically(tmp_path / "run.yaml", "text")
    assert contents(tmp_path) == {"precious": "mine", "run.yaml": "text"}
    assert not (tmp_path / "run.yaml").is_symlink()


def test_removing_a_link_leaves_what_it_points_to(tmp_path):
    """remove takes links, files, folders and nothing at all."""
    commit(tmp_path / "precious", writer("mine"))
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for name in ("link", "broken", "file", "nothing"):
        remove(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]
    assert holds(tmp_path / "precious", "mine")
    remove(tmp_path / "precious")
    assert not list(tmp_path.iterdir())


def test_modes_follow_the_umask(tmp_path):
    """Files and folders are as readable as any that the user makes."""
    before = os.umask(0o027)
    try:
        commit(tmp_path / "sub" / "adapter", writer("new"))
        write_text_atomically(tmp_path / "run.yaml", "text")
    finally:
        os.umask(before)
    modes = {p.relative_to(tmp_path).as_posix(): oct(p.stat().st_mode & 0o777) for p in tmp_path.rglob("*")}
    folders = {"sub", "sub/adapter"}
    assert modes == {name: "0o750" if name in folders else "0o640" for name in modes}
    assert len(modes) == 6


def flip(folder: Path) -> None:
    data = bytearray((folder / "a.txt").read_bytes())
    data[77] ^= 4
    (folder / "a.txt").write_bytes(data)


def swap_for_folder(folder: Path) -> None:
    (folder / "a.txt").unlink()
    (folder / "a.txt").mkdir()


def rewrite(entry: object) -> Callable[[Path], object]:
    return lambda folder: (folder / MANIFEST).write_text(json.dumps(entry))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "a cut file": lambda folder: os.truncate(folder / "b.txt", 899),
    "a longer file": lambda folder: os.truncate(folder / "b.txt", 901),
    "an extra file": lambda folder: (folder / "c.txt").touch(),
    "a missing file": lambda folder: (folder / "a.txt").unlink(),
    "a folder for a file": swap_for_folder,
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "an empty manifest": lambda folder: (folder / MANIFEST).write_text(""),
    "no JSON": lambda folder: (folder / MANIFEST).write_bytes(b"\xff{"),
    "deep JSON": lambda folder: (folder / MANIFEST).write_text("[" * 10**5),
    "a list": rewrite([]),
    "a list of files": rewrite({"files": ["a.txt", "b.txt"]}),
    "entries without sizes": rewrite({"files": {"a.txt": {}, "b.txt": 3}}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_damaged_counts_as_complete(tmp_path, damage):
    """Any difference from what was committed is seen."""
    commit(tmp_path / "step", writer("new"))
    assert complete(tmp_path / "step")
    DAMAGES[damage](tmp_path / "step")
    assert not complete(tmp_path / "step")


def test_make_folder_makes_what_is_missing(tmp_path):
    """All parents at once, and again without an error."""
    for _ in range(2):
        make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    """A path below a file: the file is what stands in the way, and it stays as it was."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file: is no folder; name another path"):
        commit(tmp_path / "file" / "below", lambda folder: None)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_is_whole_or_absent_wherever_the_process_dies(tmp_path):
    """Killed before each file operation, the name stands for the whole file or nothing; what `write` raises leaves
    nothing behind, and the next try heals."""

    def write(path: Path) -> None:
        path.write_text("new" * 300)

    for k in count():
        file = tmp_path / str(k) / "model.gguf"
        died = dies_at(k, lambda file=file: commit_file(file, write))
        assert not file.exists() or file.read_text() == "new" * 300
        commit_file(file, write)
        assert contents(file.parent) == {"model.gguf": "new" * 300}
        if not died:
            break
    assert k > 4

    def fails(path: Path) -> None:
        write(path)
        raise ConfigError("place", "does not fit")

    with pytest.raises(ConfigError, match="does not fit"):
        commit_file(tmp_path / "other" / "model.gguf", fails)
    assert list((tmp_path / "other").iterdir()) == []
