"""Print what the demo's run found: answers before and after, losses, time, memory, paths."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    console = Console(width=max(100, Console().width), highlight=False)
    answers = Table(title="Held-out questions, never trained", show_lines=True)
    for column, width in (("question", 30), ("right answer", 26), ("before", 26), ("after", 26)):
        answers.add_column(column, ratio=width, overflow="fold")
    for sample in report["samples"]:
        question = sample["prompt"].rsplit("Q: ", 1)[-1].split("<|im_end|>")[0].strip()
        before = sample["base"] if len(sample["base"]) < 160 else sample["base"][:160] + " ..."
        answers.add_row(question, sample["expected"], before, sample["adapter"])
    console.print(answers, markup=False)
    figures = Table(show_header=False, box=None)
    rows = [
        ("held-out loss before", f"{report['base_loss']:.3f} nats per answer token"),
        ("held-out loss after", f"{report['adapter_loss']:.3f}"),
        ("training", f"{report['training_seconds']:.0f} s, {report['tokens_per_second']:.0f} tokens/s"),
        ("whole command", f"{report['seconds']:.0f} s"),
        ("peak memory", f"{report['peak_memory_bytes'] / 1e9:.2f} GB"),
        ("adapter", f"{out}/adapter ({report['adapter_bytes'] / 1e6:.1f} MB)"),
        ("report", f"{out}/report.html"),
    ]
    for row in rows:
        figures.add_row(*row)
    console.print(figures)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
