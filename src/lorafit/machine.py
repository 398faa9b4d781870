"""What this machine is: processor features, memory in use, versions. Nothing is assumed, everything is read."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
from functools import cache
from pathlib import Path

PACKAGES = ("lorafit", "torch", "transformers", "tokenizers", "safetensors", "numpy")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


@cache
def processor() -> tuple[str, frozenset[str]]:
    """(model name, features of FEATURES that it has), from /proc/cpuinfo; the platform's name elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields = dict(line.split(":", 1) for line in reversed(text.splitlines()) if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set((named.get("flags") or named.get("Features") or "").split())
    return named.get("model name", platform.machine()), frozenset(flags & set(FEATURES))


def fast_bf16() -> bool:
    """Whether the processor multiplies bf16 in hardware: avx512_bf16, AMX or Arm's bf16."""
    return bool(processor()[1] & {"avx512_bf16", "amx_bf16", "bf16"})


def cores() -> int:
    """Physical cores that this process may run on (hyper-threads share one)."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    found = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        found.add(siblings.read_text() if siblings.exists() else cpu)
    return len(found)


def memory_bytes(field: str = "VmRSS") -> int:
    """A field of /proc/self/status in bytes: VmRSS (now), VmHWM (peak), RssAnon (private). 0 where there is none."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def available_memory() -> int:
    """Bytes that can be used without swapping: the system's, or less where a control group says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 8 << 30
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - memory_bytes())
    return free


def keep_freed_memory() -> bool:
    """Tell the C library to reuse freed buffers instead of returning them to the system; whether it understood.

    A training step frees and takes the same large buffers again; returned ones fault in page by page each time
    (peers spend 18 to 97 s of a 50-120 s run in that). glibc only: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, value) for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)))


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
