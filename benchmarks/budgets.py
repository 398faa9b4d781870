"""A budget swept from too small to ample: what `--memory` chooses, what the run then takes, and its loss.

    python -m benchmarks.budgets [--models smollm2 gemma3] [--budgets 0.6 0.8 1.0 1.5 2.0] [--out budgets.md]

Each is a `lorafit train --memory` of its own. Exit code 3 says that nothing fits. The measured peak (VmHWM, mapped
pages included) must stay under the budget, tokens/s rise with it, and the losses be equal within rounding.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROWS, arguments, heading, model_file, publish, say, table
from lorafit.config import read_yaml

BUDGETS = 0.55, 0.65, 0.75, 0.9, 1.1, 1.4, 2.0
CHOSEN = "micro_batch_tokens", "checkpointed_layers", "loss_chunk", "paging"


def run(model: Path, data: Path, budget: float, steps: int, threads: int, folder: Path) -> list[Any]:
    """A row of the table."""
    command = [sys.executable, "-m", "lorafit", "train", str(model), str(data), "--out", str(folder), "--overwrite"]
    command += ["--max-steps", str(steps), "--memory", f"{budget}GB", "--threads", str(threads), "--lr", "1e-3"]
    environment = {**os.environ, "LORAFIT_CACHE": str(folder.parent)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode:
        said = next((text for text in ended.stderr.splitlines() if text.startswith("error")), "")
        return [f"{budget:.2f}", f"exit {ended.returncode}", "", "", "", "", said.removeprefix("error: ")]
    report = json.loads((folder / "report.json").read_text())
    peak, settings = report["peak_memory_bytes"] / 1e9, read_yaml(folder / "run.yaml")
    lowered = "lowered" in ended.stderr
    chosen = ", ".join(f"{name} {settings[name]}" for name in CHOSEN) + (", lowered" if lowered else "")
    under = "yes" if peak <= budget else "NO"
    losses = f"{report['base_loss']:.4f}, {report['adapter_loss']:.4f}"
    predicted = report["predicted"]["memory_bytes"] / 1e9
    return [
        f"{budget:.2f}",
        under,
        f"{peak:.3f}",
        f"{predicted:.3f}",
        f"{report['tokens_per_second']:.0f}",
        losses,
        chosen,
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["smollm2", "gemma3"])
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS, help="GB")
    parser.add_argument("--data", type=Path, default=ROWS)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    parts = [heading("A budget swept", options.threads)]
    columns = ["budget, GB", "inside", "peak, GB", "predicted", "tokens/s", "losses, base and adapter", "chosen"]
    with tempfile.TemporaryDirectory() as name:
        for model in options.models:
            file, rows = model_file(model), []
            for budget in options.budgets:
                rows.append(
                    run(file, options.data.resolve(), budget, options.steps, options.threads, Path(name) / "out")
                )
                say(f"{model} " + "  ".join(map(str, rows[-1])))
            parts.append(f"## {file.name}\n\n" + table(columns, rows))
    publish(parts, options.out)


if __name__ == "__main__":
    main()
