"""A model of 8B's shape trained under a limit of memory that is smaller than its file, in a control group if one can be
made.

    python -m benchmarks.limit FILE [--layers 32] [--memory 4GB] [--steps 2] [--keep]

FILE is written first (4.9 GB; random weights) and deleted at the end unless --keep; one that is there is used and left.
Where no control group can be made, the child's RssAnon + RssFile are looked at every 50 ms. The prediction stands
beside it, made before a weight is read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks import bigfile
from benchmarks.common import arguments, heading, memory, publish, say, table
from lorafit.config import bytes_of

NAME = f"lorafit-limit-{os.getpid()}"
LIMITS = {"cgroup2": "memory.max", "cgroup": "memory.limit_in_bytes"}
GB = 1e9


def group(limit: int) -> Path | None:
    """A control group with this limit, of version 2 or 1, where one can be made."""
    for mount in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = mount.split()
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            made = Path(where) / NAME
            try:
                made.mkdir()
                (made / LIMITS[kind]).write_text(str(limit))
            except OSError:
                with suppress(OSError):
                    made.rmdir()
            else:
                with suppress(OSError):
                    (made / "memory.swap.max").write_text("0")
                return made
    return None


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    limit, written = bytes_of(options.memory), not options.file.exists()
    if written:
        say(f"writing {options.file}")
        bigfile.write(options.file, bigfile.Shape(layers=options.layers), "q4_k_m")
    size = options.file.stat().st_size
    with options.file.open("rb") as file:  # pages that are cached already would be charged to nobody in the group
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with tempfile.TemporaryDirectory() as name:
        data, out = Path(name) / "rows.jsonl", Path(name) / "out"
        text = "to be or not to be " * (options.length // 19 + 1)
        data.write_text("".join(json.dumps({"text": f"{n} {text}"[: options.length - 2]}) + "\n" for n in range(4)))
        command = [sys.executable, "-m", "lorafit", "train", str(options.file), str(data), "--out", str(out)]
        command += ["--memory", options.memory, "--max-steps", str(options.steps), "--batch-size", "1"]
        command += ["--eval-fraction", "0", "--threads", str(options.threads)]
        inside, peaks = group(limit), dict.fromkeys(("RssAnon", "RssFile", "VmHWM", "both"), 0)

        def enter() -> None:
            if inside is not None:
                (inside / "cgroup.procs").write_text(str(os.getpid()))

        child = subprocess.Popen(command, preexec_fn=enter)
        while child.poll() is None:
            now = memory(child.pid, rollup=False)
            now["both"] = now.get("RssAnon", 0) + now.get("RssFile", 0)
            peaks = {field: max(value, now.get(field, 0)) for field, value in peaks.items()}
            time.sleep(0.05)
        if inside is not None:
            inside.rmdir()
        assert child.returncode == 0, f"ended with {child.returncode}"
        report = json.loads((out / "report.json").read_text())
    if written and not options.keep:
        options.file.unlink()
    predicted = report["predicted"]
    row = [f"{limit / GB:.2f}", f"{size / GB:.2f}", "control group" if inside else "sampled",
           *(f"{peaks[field] / GB:.2f}" for field in ("RssAnon", "RssFile", "both", "VmHWM")),
           f"{predicted['memory_bytes'] / GB:.2f}", f"{report['tokens_per_second']}",
           f"{report['seconds']:.0f}", f"{predicted['seconds']:.0f}"]  # fmt: skip
    columns = ["limit, GB", "file, GB", "held by", "private, GB", "mapped, GB", "both at once", "VmHWM", "predicted",
               "tokens/s", "seconds", "predicted"]  # fmt: skip
    title = f"Llama of {options.layers} layers at 8B's width under a limit, rows of {options.length} tokens"
    publish([heading(title, options.threads), table(columns, [row])], options.out)


if __name__ == "__main__":
    main()
