"""Disks that refuse, and processes that die, at a chosen instant of their work on files."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR
PASSED = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")  # and each open and fsync


def _watch(see: Callable[[str, Any], None]) -> None:
    """Have `see` called before every file operation of this process, for the rest of its life."""
    fsync = os.fsync

    def seen_fsync(handle: int) -> None:
        see("fsync", os.fstat(handle).st_ino)
        fsync(handle)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in PASSED:
            see(event.removeprefix("os."), [str(a) for a in arguments[:2]])
        elif event == "open" and isinstance(arguments[0], (str, Path)):
            see("write" if arguments[2] & WRITES else "read", str(arguments[0]))

    os.fsync = seen_fsync
    sys.addaudithook(hook)


def _in_child(action: Callable[[], None]) -> int:
    """Exit status of a fork that runs `action` and ends without cleaning up; 1 after an exception."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dies_at(k: int, action: Callable[[], None]) -> bool:
    """Run `action` in a process that is gone, unwritten buffers and all, before its k-th (from 0) file operation.

    False: it came to its end first.
    """
    left = k

    def see(event: str, about: Any) -> None:
        nonlocal left
        if left == 0:
            os._exit(9)
        left -= 1

    def watched() -> None:
        _watch(see)
        action()

    status = _in_child(watched)
    assert status in (0, 9), f"the action failed with {status}"
    return status == 9


def operations(action: Callable[[], None], log: Path) -> list[tuple[str, Any]]:
    """(operation, what it is about) of a child that runs `action`: inode for fsync, paths for the others."""
    seen: list[tuple[str, Any]] = []

    def watched() -> None:
        _watch(lambda event, about: seen.append((event, about)))
        action()
        log.write_text(json.dumps(seen))

    assert _in_child(watched) == 0
    return [(event, about) for event, about in json.loads(log.read_text())]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the kernel refuse to make any file of this process longer than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
