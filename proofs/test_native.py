"""The native kernels under the sanitizers, and NEON's bits on an emulated processor. Run with `make proof-native`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).parent.parent / "native"
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
AARCH64 = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS}")
FORMATS = 18  # 16 of GGUF, NF4, INT8


def checksums(folder: Path, options: tuple[str, ...] = (), run_by: tuple[str, ...] = ()) -> dict[str, dict[str, str]]:
    """check.cpp, built in `folder` with sanitizers and run: for each path, each format's checksum of all output."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # cmake and ninja
        "ASAN_OPTIONS": f"detect_leaks={int(not run_by)}",  # leaks are looked for by tracing, which an emulator lacks
    }
    commands: list[list[str | Path]] = [
        ["cmake", "-S", NATIVE, "-B", folder, "-G", "Ninja", "-DCHECK=ON", "-DSANITIZE=address,undefined", *options],
        ["cmake", "--build", folder, "--target", "check"],
    ]
    for command in commands:
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    ran = subprocess.run([*run_by, folder / "check"], env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    found: dict[str, dict[str, str]] = {}
    for path, format_, value in map(str.split, ran.stdout.splitlines()):
        found.setdefault(path, {})[format_] = value
    assert all(len(of_path) == FORMATS for of_path in found.values())
    return found


def test_sanitizers_find_nothing_and_all_paths_agree(tmp_path: Path) -> None:
    """Every function, format and path: no byte out of bounds, no undefined behaviour, one checksum of all bits."""
    missing = [tool for tool in (CROSS, EMULATOR) if not shutil.which(tool)]
    if missing:
        pytest.fail(
            f"{', '.join(missing)} missing: install Debian's g++-aarch64-linux-gnu and qemu-user", pytrace=False
        )
    here = checksums(tmp_path / "here")
    emulated = checksums(tmp_path / "aarch64", AARCH64, (EMULATOR, "-L", "/usr/aarch64-linux-gnu"))
    assert set(emulated) == {"neon", "portable"}
    for found in (here, emulated):
        for path, of_path in found.items():
            assert of_path == here["portable"], path
    print(f"\n{FORMATS} formats: {', '.join(here)} here, {', '.join(emulated)} emulated, all of one checksum each")
