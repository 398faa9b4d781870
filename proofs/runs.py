"""What the proofs by training share: models by hash, runs that are begun, resumed or read, tables that are written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lorafit
from lorafit.run import resume

ROOT = Path(__file__).parent.parent
KEPT = ROOT / ".cache" / "proofs"
RESULTS = ROOT / "proofs" / "results"
WIKISQL = ROOT / "examples" / "wikisql"
WIKITEXT = ROOT / "proofs" / "data" / "wikitext2.txt"
SLICE = os.environ.get("PROOF_SLICE") == "1"
"""Whether the proof is only tried: a few steps, one seed, nothing judged, nothing written to proofs/results."""


def fetch(model: str) -> Path:
    """The real model's file."""
    command = [sys.executable, ROOT / "scripts" / "fetch_model.py", model]
    return Path(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.strip())


def finished(out: Path, **options: Any) -> dict[str, Any]:
    """report.json of the run in `out`: begun, gone on with, or read."""
    if not (out / "report.json").exists():
        if (out / "run.yaml").exists():
            resume(out)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            lorafit.train(out=out, overwrite=True, **options)
    return json.loads((out / "report.json").read_text())


def write_table(name: str, title: str, header: Sequence[str], rows: Sequence[Sequence[object]], notes: str) -> str:
    """The table as Markdown, printed, and kept as proofs/results/NAME.md unless this is only a slice."""
    lines = [f"# {title}", "", notes.strip(), "", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    text = "\n".join(lines) + "\n"
    print(f"\n{text}")
    if not SLICE:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text)
    return text
