"""Predicted beside measured: peak memory and seconds of `lorafit train` under many settings, each in a process.

    python -m benchmarks.predict [--data FILE ...] [--steps 6] [--out predict.md]

The first file is trained on under every setting, the others under the defaults alone, as data that nobody tuned on.
Predicted is what report.json has under `predicted`, made before the weights were loaded; measured is its
peak_memory_bytes (VmHWM, mapped pages included) and seconds (the whole command). Memory may be believed on a busy
machine, times may not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, ROWS, arguments, heading, model_file, publish, say, table
from benchmarks.rows import read

SETTINGS: dict[str, list[str]] = {
    "smollm2": [
        "",
        "--rank 64",
        "--rank 8 --targets q_proj,v_proj",
        "--base bf16",
        "--base nf4",
        "--base int8 --micro-batch-tokens 512",
        "--compute fp32",
        "--use-dora",
        "--use-dora --checkpointing all",
        "--init pissa",
        "--init eva",
        "--init loftq --base nf4",
        "--modules-to-save embed_tokens",
        "--checkpointing all",
        "--checkpointing all --micro-batch-tokens 2048",
        "--micro-batch-tokens 2048",
        "--batch-size 32 --max-length 128",
        "--packing off --batch-size 4",
    ],
    "gemma3": ["", "--base bf16", "--rank 64", "--checkpointing all --micro-batch-tokens 512", "--base nf4"],
}
MEMORY, TIME = 0.10, 0.20  # errors to stay inside
COUNT = 400  # rows of each file


def run(model: Path, data: Path, options: Sequence[str], steps: int, folder: Path) -> dict[str, Any]:
    """report.json of one run, and the settings that were chosen."""
    command = [sys.executable, "-m", "lorafit", "train", str(model), str(data), "--out", str(folder), "--overwrite"]
    command += ["--max-steps", str(steps), "--eval-fraction", "0.02", *options]
    ended = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "LORAFIT_CACHE": str(folder.parent)}
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def line(names: Sequence[str], report: Mapping[str, Any]) -> list[object]:
    """A row of the table."""
    found: list[object] = [*names]
    for measured, predicted, most, unit in (
        ("peak_memory_bytes", "memory_bytes", MEMORY, 1e6),
        ("seconds", "seconds", TIME, 1),
    ):
        real, said = report[measured], report["predicted"][predicted]
        error = said / real - 1
        found += [f"{said / unit:,.0f}", f"{real / unit:,.0f}", f"{error:+.0%}{'' if abs(error) <= most else ' !'}"]
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", nargs="+", type=Path, default=[ROWS], help="files of rows (default: the example's)")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for model in options.models:
            file = model_file(model)
            jobs = [(options.data[0], text) for text in SETTINGS[model]] + [(data, "") for data in options.data[1:]]
            for data, text in jobs:
                say(f"{model} {data.parent.name}/{data.name} {text}")
                words = [*text.split(), "--threads", str(options.threads)]
                taken = Path(read(str(data), COUNT, name))
                report = run(file, taken, words, options.steps, Path(name) / "out")
                rows.append(line([model, f"{data.parent.name}/{data.name}", text or "defaults"], report))
                say("  " + "  ".join(map(str, rows[-1][3:])))
    columns = [
        "model",
        "data",
        "settings",
        "peak predicted, MB",
        "measured",
        "error",
        "seconds predicted",
        "measured",
        "error",
    ]
    misses = sum("!" in str(cell) for row in rows for cell in row)
    end = f"{len(rows)} runs of {options.steps} steps; {misses} errors over {MEMORY:.0%} (memory), {TIME:.0%} (time)."
    publish([heading("Predicted and measured", options.threads), table(columns, rows), end], options.out)


if __name__ == "__main__":
    assert ROOT.exists()
    main()
