"""From the command to the first step: seconds from `lorafit train` to the first line of metrics.jsonl.

    python -m benchmarks.start [--models smollm2] [--profile]

64 rows, otherwise the defaults; the command is ended after its first step. Beside it: what that step took by its own
account, and what Python, torch and lorafit need to be imported. --profile prints the dearest imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import ROOT, ROWS, alternate, arguments, heading, model_file, publish, spread, table

LOOK = 0.005  # seconds between looks at metrics.jsonl
LIMIT = 300
SHOWN = 15
PARTS = {"python": "pass", "and torch": "import torch", "and lorafit.run": "import lorafit.run"}


def first_step(model: Path, data: Path, folder: Path, threads: int) -> tuple[float, float]:
    """(seconds to the first line, seconds that the first step took)."""
    metrics = folder / "out" / "metrics.jsonl"
    command = [sys.executable, "-m", "lorafit", "train", str(model), str(data), "--out", str(folder / "out"),
               "--threads", str(threads), "--overwrite"]  # fmt: skip
    metrics.unlink(missing_ok=True)
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
        data = folder / "rows.jsonl"
        data.write_text("".join(line + "\n" for line in ROWS.read_text(encoding="utf-8").splitlines()[:64]))
        for model in map(model_file, options.models):
            found = alternate(
                {"": lambda number, m=model: first_step(m, data, folder, options.threads)}, options.repeats
            )
            times = [result for _, result in found[""]]
            rows.append([f"{model.name}: to the first line", spread([whole for whole, _ in times], 2)])
            rows.append([f"{model.name}: of it, the step", spread([step for _, step in times], 2)])
    parts = alternate({name: lambda number, c=code: python(c) for name, code in PARTS.items()}, options.repeats)
    rows += [[f"imports: {name}", spread([second for second, _ in found], 2)] for name, found in parts.items()]
    page = [heading("From command to first step", options.threads), table(["", "seconds"], rows)]
    publish([*page, *([dearest_imports()] if options.profile else [])], options.out)


if __name__ == "__main__":
    main()
