"""The laws of lorafit.machine: what it says is what the system says, and a silent system is no error."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys

import pytest
import torch

from lorafit import machine

CPUINFO = """processor\t: 0
model name\t: Some Processor 9000
flags\t\t: fpu avx2 avx512f avx512_bf16 ht

processor\t: 1
model name\t: Some Other One
flags\t\t: fpu
"""


@pytest.fixture
def system(monkeypatch, tmp_path):
    """Makes /proc and /sys of its own from {path: text}; nothing else is there."""

    def make(files: dict[str, str]) -> None:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        root.mkdir(exist_ok=True)
        monkeypatch.setattr(machine, "PROC", root / "proc")
        monkeypatch.setattr(machine, "SYS", root / "sys")
        machine.processor.cache_clear()

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield make
    machine.processor.cache_clear()


def test_this_machine_is_described():
    """Every figure is there and can be."""
    name, features = machine.processor()
    assert name
    assert features <= set(machine.FEATURES)
    assert machine.fast_bf16() in (True, False)
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)
    assert machine.available_memory() > 10**8
    assert set(machine.describe()) == {"processor", "features", "cores", "system"}
    versions = machine.versions()
    assert (versions["torch"], versions["python"]) == (torch.__version__, platform.python_version())
    assert set(versions) == {"python", *machine.PACKAGES}


def test_memory_in_use_is_this_process_own():
    """200 MB more are seen as such, at once and at the peak, which stays when they are gone (the kernel counts to
    within a few pages per thread); where the system tells nothing, 0 stands for it."""
    before = machine.memory_bytes()
    with mmap.mmap(-1, 200_000_000, flags=mmap.MAP_PRIVATE) as block:
        for _ in range(200):
            block.write(b"x" * 1_000_000)
        during = machine.memory_bytes()
    assert 190e6 < during - before < 210e6 or during == 0
    assert machine.memory_bytes("VmHWM") >= during - 2e6
    assert machine.memory_bytes("NoSuchField") == 0


def test_a_system_that_tells_nothing_is_no_error(system):
    """Without /proc and /sys: a name, no features, at least one core, all of the memory, none in use."""
    system({})
    name, features = machine.processor()
    assert name == (platform.processor() or platform.machine())
    assert features == frozenset()
    assert not machine.fast_bf16()
    assert machine.cores() >= 1
    assert machine.memory_bytes() == 0
    assert machine.available_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("text", "name", "fast"),
    [
        (CPUINFO, "Some Processor 9000", True),
        (CPUINFO.replace("avx512_bf16", "avx512_vnni"), "Some Processor 9000", False),
        (CPUINFO.replace("avx512_bf16", "amx_bf16"), "Some Processor 9000", True),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", None, True),
        ("processor\t: 0\nFeatures\t: fp asimd\n", None, False),
        ("nonsense", None, False),
    ],
)
def test_the_first_processor_is_read(system, text, name, fast):
    """x86 calls them flags, Arm Features; where there is no name, the platform's stands."""
    system({"proc/cpuinfo": text})
    assert machine.processor()[0] == (name or platform.processor() or platform.machine())
    assert machine.fast_bf16() is fast


def test_the_usual_variable_limits_the_threads(system, monkeypatch):
    """OMP_NUM_THREADS below the cores is obeyed; above them, or no number, it is not."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    system({})
    for value, cores in (("2", 2), ("9", 4), ("0", 1), ("many", 4), ("", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert machine.cores() == cores


def test_hyper_threads_share_a_core(system, monkeypatch):
    """Four logical processors in pairs are two cores; without a topology each counts; those not allowed do not."""
    pairs = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}
    files = {f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": text for n, text in pairs.items()}
    for allowed, paired in (({0, 1, 2, 3}, 2), ({0, 2}, 1), ({1}, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, allowed=allowed: allowed, raising=False)
        system(files)
        assert machine.cores() == paired
        system({})
        assert machine.cores() == len(allowed)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 4), ("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("", 4)],
)
def test_a_control_group_limits_the_cores(system, monkeypatch, quota, cores):
    """A container with two processors' time gets two threads, however many the machine has; at least one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    system({"sys/fs/cgroup/cpu.max": quota + "\n"})
    assert machine.cores() == cores


@pytest.mark.parametrize(
    ("limit", "free"), [("max", 4_096_000), (None, 4_096_000), ("3000000", 1_976_000), ("1000000", 0)]
)
def test_a_control_group_limits_the_memory(system, limit, free):
    """What is left of its limit after this process, if that is less than the system has."""
    files = {
        "proc/meminfo": "MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable:    4000 kB\n",
        "proc/self/status": "Name:\tpython\nVmHWM:\t2000 kB\nVmRSS:\t1000 kB\n",
    }
    system(files if limit is None else {**files, "sys/fs/cgroup/memory.max": limit + "\n"})
    assert machine.memory_bytes() == 1_024_000
    assert machine.memory_bytes("VmHWM") == 2_048_000
    assert machine.available_memory() == free


@pytest.mark.parametrize("version", [1, 2])
def test_pages_of_files_are_no_memory_that_is_taken(system, version):
    """A group's cache of files, active or not, can be had: a paged base leaves its pages there."""
    folder, total, names = {
        1: ("memory/", "total_", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
        2: ("", "", ("memory.max", "memory.current")),
    }[version]
    stat = f"{total}inactive_file 500000\n{total}active_file 2000000\n{total}inactive_anon 400000\n"
    files = dict(zip((*names, "memory.stat"), ("4000000", "3900000", stat), strict=True))
    free = {"proc/meminfo": "MemAvailable:    90000 kB\n"}
    system({**free, **{f"sys/fs/cgroup/{folder}{name}": text for name, text in files.items()}})
    assert machine.available_memory() == 2_600_000


PRODUCTS = """
import torch
from lorafit import machine
machine.bound_primitives()
w = torch.zeros(512, 512, dtype=torch.bfloat16)
def multiply(lengths):
    for length in lengths:
        torch.ones(length, 512, dtype=torch.bfloat16) @ w
multiply(range(1, 129))
before = machine.memory_bytes("RssAnon")
multiply(range(129, 649))
print(machine.memory_bytes("RssAnon") - before)
"""


def test_code_for_lengths_that_are_not_met_again_is_not_kept():
    """520 more lengths leave less than 40 MB; unbounded ones leave 370 where bf16 is multiplied in hardware."""
    done = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40_000_000
