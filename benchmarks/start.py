"""From the command to the first step: seconds from `lorafit train` to the first line of metrics.jsonl.

    python -m benchmarks.start [--models smollm2] [--profile]

64 rows and 10,000, these also with their tokens in the cache; otherwise the defaults. The command is ended after its
first step. Beside it: what that step took by its own account, and what Python, torch and lorafit need to be imported,
lorafit as the command does it, without garbage collection. --profile prints the dearest imports.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import ROOT, ROWS, alternate, arguments, heading, model_file, publish, spread, table

LOOK = 0.005  # seconds between looks at metrics.jsonl
LIMIT = 300
SHOWN = 15
FEW, MANY = 64, 10_000  # rows
PARTS = {
    "python": "pass",
    "and torch": "import torch",
    "and lorafit.run": "import gc; gc.disable(); import lorafit.run",
}


def write_rows(file: Path, count: int) -> Path:
    """Rows that all differ, made from the example's."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    many = [{**rows[n % len(rows)], "prompt": f"{rows[n % len(rows)]['prompt']} {n}"} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in many))
    return file


def first_step(model: Path, data: Path, folder: Path, threads: int, keep: bool = True) -> tuple[float, float]:
    """(seconds to the first line, seconds that the first step took); keep: with the tokens of the run before."""
    cache = folder / "cache"
    if not keep:
        shutil.rmtree(cache, ignore_errors=True)
    metrics = folder / "out" / "metrics.jsonl"
    command = [sys.executable, "-m", "lorafit", "train", str(model), str(data), "--out", str(folder / "out"),
               "--threads", str(threads), "--overwrite"]  # fmt: skip
    metrics.unlink(missing_ok=True)
    began = time.perf_counter()
    environment = {**os.environ, "LORAFIT_CACHE": str(cache)}
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        while not (metrics.exists() and "\n" in (text := metrics.read_text())):
            assert child.poll() is None, f"lorafit train ended with {child.returncode}: {' '.join(command)}"
            assert time.perf_counter() - began < LIMIT, f"no step in {LIMIT} s"
            time.sleep(LOOK)
        return time.perf_counter() - began, json.loads(text.splitlines()[0])["seconds"]
    finally:
        child.kill()
        child.wait()


def python(code: str, *flags: str) -> str:
    """Run a piece of Python; what it wrote to standard error."""
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, stderr=subprocess.PIPE, check=True, text=True, cwd=ROOT).stderr


def dearest_imports() -> str:
    """A table of the imports with the largest time of their own."""
    lines = [line.removeprefix("import time:").split("|") for line in python("import lorafit.run", "-X", "importtime")
             .splitlines() if line.startswith("import time:") and "self" not in line]  # fmt: skip
    found = sorted(((int(own), int(whole), name.strip()) for own, whole, name in lines), reverse=True)[:SHOWN]
    return table(["import", "own, ms", "with what it imports, ms"],
                 [[name, f"{own / 1000:.0f}", f"{whole / 1000:.0f}"] for own, whole, name in found])  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["smollm2"], help="names or GGUF files")
    parser.add_argument("--profile", action="store_true", help="print the dearest imports too")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few, many = (write_rows(folder / f"{count}.jsonl", count) for count in (FEW, MANY))
        works = {f"{FEW} rows": (few, True), f"{MANY:,} rows": (many, False), f"{MANY:,} rows again": (many, True)}
        for model in map(model_file, options.models):
            found = alternate(
                {
                    name: lambda number, m=model, d=data, k=keep: first_step(m, d, folder, options.threads, k)
                    for name, (data, keep) in works.items()
                },
                options.repeats,
            )
            for name, rounds in found.items():
                times = [result for _, result in rounds]
                rows.append([f"{model.name}, {name}: to the first line", spread([whole for whole, _ in times], 2)])
                rows.append([f"{model.name}, {name}: of it, the step", spread([step for _, step in times], 2)])
    parts = alternate({name: lambda number, c=code: python(c) for name, code in PARTS.items()}, options.repeats)
    rows += [[f"imports: {name}", spread([second for second, _ in found], 2)] for name, found in parts.items()]
    page = [heading("From command to first step", options.threads), table(["", "seconds"], rows)]
    publish([*page, *([dearest_imports()] if options.profile else [])], options.out)


if __name__ == "__main__":
    main()
