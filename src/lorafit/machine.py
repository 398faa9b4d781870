"""What this machine is: processor features, memory in use, versions. Nothing is assumed, everything is read."""

from __future__ import annotations

import ctypes
import importlib.metadata
import mmap
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

PROC, SYS = Path("/proc"), Path("/sys")  # where Linux tells; elsewhere they are missing
PACKAGES = ("lorafit", "torch", "transformers", "tokenizers", "safetensors", "numpy")
AROUND = 1 << 20  # bytes that the system maps around one that is touched, at most (seen: 512 KB)
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


@cache
def processor() -> tuple[str, frozenset[str]]:
    """(model name, features of FEATURES that it has), from /proc/cpuinfo; the platform's name elsewhere."""
    named = _cpuinfo()
    flags = set((named.get("flags") or named.get("Features") or "").split())
    return named.get("model name") or platform.processor() or platform.machine(), frozenset(flags & set(FEATURES))


def vendor() -> str:
    """Who made the processor, as /proc/cpuinfo names it: `GenuineIntel`, `AuthenticAMD`; "" where it does not tell."""
    return _cpuinfo().get("vendor_id", "")


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields."""
    lines = reversed(_read(PROC / "cpuinfo").splitlines())
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines) if value}


def fast_bf16() -> bool:
    """Whether the processor multiplies bf16 in hardware: avx512_bf16, AMX or Arm's bf16."""
    return bool(processor()[1] & {"avx512_bf16", "amx_bf16", "bf16"})


def cores() -> int:
    """Physical cores that this process may run on (hyper-threads share one), or less where a control group or
    OMP_NUM_THREADS says so."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    found = len({_read(SYS / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in allowed})
    quota, _, period = _read(SYS / "fs/cgroup/cpu.max").strip().partition(" ")
    limits = [int(quota) // int(period)] if quota.isdigit() else []
    asked = os.environ.get("OMP_NUM_THREADS", "")  # what schedulers and people set for every numerical program
    return max(1, min([found, *limits, *([int(asked)] if asked.isdigit() else [])]))


def memory_bytes(field: str = "VmRSS") -> int:
    """A field of /proc/self/status in bytes: VmRSS (now), VmHWM (peak), RssAnon (private). 0 where there is none."""
    return _kilobytes(PROC / "self/status", field) * 1024


def available_memory() -> int:
    """Bytes that can be used without swapping: the system's, or less where a control group says so."""
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _kilobytes(PROC / "meminfo", "MemAvailable") * 1024 or everything
    return max(0, min([free, *_left_of_groups()]))


def _left_of_groups() -> list[int]:
    """What each control group above this process leaves, in bytes: its limit less what cannot be taken back. A group's
    own view is asked first, then those on the way to the root, version 2 and 1."""
    paths = {Path()}
    for line in _read(PROC / "self/cgroup").splitlines():
        place = Path(line.rsplit(":", 1)[-1].lstrip("/"))
        paths |= {place, *place.parents}
    found = []
    for path in paths:
        for folder, limit, used, total in (
            (SYS / "fs/cgroup" / path, "memory.max", "memory.current", ""),
            (SYS / "fs/cgroup/memory" / path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            most, taken = _read(folder / limit).strip(), _read(folder / used).strip()
            if most.isdigit():
                files = {f"{total}inactive_file", f"{total}active_file"}  # pages of a paged base are active
                words = (line.split() for line in _read(folder / "memory.stat").splitlines())
                reclaimable = sum(int(word[1]) for word in words if word[:1] and word[0] in files)
                found.append(int(most) - (int(taken) - reclaimable if taken.isdigit() else memory_bytes()))
    return found


def settle_allocator(keeps: bool) -> bool:
    """Tell the C library what to do with large blocks that are freed; whether it understood (glibc does).

    keeps: reuse them, since a step takes the same ones again and fresh memory faults in page by page (peers spend 18 to
    97 s of a 50-120 s run in that). Not keeps: give them back at once, where the step's own buffers go round anyway and
    a heap would only fall to pieces.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):
        return False
    trim(0)  # what loading left
    if keeps:  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        return all(mallopt(option, value) for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)))
    return bool(mallopt(-3, 1 << 20))  # M_MMAP_THRESHOLD: fixed, it would grow to what was freed


def bound_primitives() -> None:
    """Let oneDNN, and torch's own cache above it, keep the code of their 64 newest products instead of 1,024; before
    the first of them.

    Packs differ in length, so each brings some 30 products that are not met again, and 50 MB a step stayed behind.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def mapped(file: Path) -> list[tuple[int, int]]:
    """(first, last) addresses at which this process has the file mapped; none where the system does not tell."""
    lines = (line.split(maxsplit=5) for line in _read(PROC / "self/maps").splitlines())
    spans = [words[0].split("-") for words in lines if len(words) == 6 and words[5] == str(file.resolve())]
    return [(int(start, 16), int(stop, 16)) for start, stop in spans]


def drop(address: int, size: int, spans: Iterable[tuple[int, int]]) -> None:
    """Give the pages of these bytes back, if they lie in one of the mapped (first, last) spans: they are read again
    when they are needed. Of any other memory the values would be lost.

    With them go those around them, which the system brought along when they were touched.
    """
    for first, last in spans:
        if first <= address and address + size <= last:
            start, stop = max(first, address - AROUND), min(last, address + size + AROUND)
            advise(start, stop - start, wanted=False)


def advise(address: int, size: int, wanted: bool) -> bool:
    """Tell the system that bytes of a mapped file are wanted soon, or not any more; whether it listened.

    Only whole pages can be told of, so those at both ends are among them: of a file that is only read they come back
    when they are touched.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    start = address // page * page
    try:
        call = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return False
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(call(start, address + size - start, mmap.MADV_WILLNEED if wanted else mmap.MADV_DONTNEED) == 0)


def trim() -> None:
    """Give the holes of the heap back to the system, where the C library can (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def describe() -> dict[str, object]:
    """The machine, for reports."""
    name, features = processor()
    return {"processor": name, "features": sorted(features), "cores": cores(), "system": platform.system()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found


def _read(path: Path) -> str:
    """What the kernel tells there; nothing on a system without that file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _kilobytes(path: Path, field: str) -> int:
    """The number of a line `field:  123 kB`; 0 where there is none."""
    lines = (line.split() for line in _read(path).splitlines())
    return next((int(words[1]) for words in lines if words[:1] == [f"{field}:"]), 0)
