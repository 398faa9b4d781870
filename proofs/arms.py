"""What the proofs of LoRA against full fine-tuning share: runs with a short template, per-row figures that are kept."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from proofs.runs import RESULTS, ROOT, SLICE, fetch, finished

from lorafit import machine
from lorafit.adapter.file import load_adapter
from lorafit.config import TrainConfig
from lorafit.data.records import Record
from lorafit.evaluate.heldout import held_out
from lorafit.inputs import read_rows
from lorafit.model.generate import generate
from lorafit.model.load import Base
from lorafit.tuned import reopen

DATA = ROOT / "proofs" / "data"
TEMPLATE = DATA / "short.jinja"
ANSWER_TOKENS, BATCH = 16, 64
NORMAL_95 = 1.959964


def train(out: Path, **options: Any) -> dict[str, Any]:
    """report.json of one run on SmolLM2, with the short template; its checkpoints are dropped when it is done."""
    report = finished(out, model=fetch("smollm2"), template=TEMPLATE, **options)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # of a whole model 1.6 GB each
    return report


def opened(out: Path | None) -> Base:
    """What a run made; None: the base that it started from."""
    settings = TrainConfig(compute="bf16" if machine.fast_bf16() else "fp32", template=str(TEMPLATE))
    torch.set_num_threads(machine.cores())
    if out is not None and (out / "model").is_dir():
        return reopen(out / "model", settings)
    base = reopen(fetch("smollm2"), settings)
    if out is not None:
        load_adapter(base.model, out / "adapter")
        base.model.eval()
    return base


def measured(kept: Path, out: Path | None, file: Path, answers: bool, rows: int | None = None) -> dict[str, Any]:
    """Per row of `file`: nats, trained tokens, and with `answers` whether the greedy answer is the row's own. Kept as
    JSON and not measured twice. rows: how many, all if None."""
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    base = opened(out)
    tokens, _ = read_rows((str(file),), base.tokenizer, TrainConfig(template=str(TEMPLATE)), 2048)
    chosen = tokens.rows[:rows]
    losses = held_out(base.model, base.head, chosen, 2048)
    found = {"nats": losses.nats.tolist(), "tokens": losses.tokens.tolist()}
    if answers:
        prompts = [list(row.ids[: list(row.trained).index(True)]) for row in chosen]
        said: list[str] = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            ids = generate(base.model, batch, max_tokens=ANSWER_TOKENS, end_ids=base.tokenizer.end_ids)
            said += [base.tokenizer.decode(answer, skip_special=True).strip() for answer in ids]
        found["right"] = [text == _answer(row.record) for text, row in zip(said, chosen, strict=True)]
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found))
    return found


def loss(found: dict[str, Any]) -> float:
    """Nats per trained token."""
    return float(np.sum(found["nats"]) / np.sum(found["tokens"]))


def paired(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """(mean, low, high) of a - b, 95 %: rows are the units, each the mean over its seeds."""
    gaps = np.mean(np.asarray(a, float) - np.asarray(b, float), axis=0)
    error = float(gaps.std(ddof=1)) / math.sqrt(len(gaps))
    return float(gaps.mean()), float(gaps.mean()) - NORMAL_95 * error, float(gaps.mean()) + NORMAL_95 * error


def told(gap: tuple[float, float, float], digits: int = 4) -> str:
    mean, low, high = (f"{value:+.{digits}f}" for value in gap)
    return f"{mean} ({low} to {high})"


def write(name: str, text: str) -> None:
    """proofs/results/NAME.md unless this is only a slice, and the terminal."""
    if not SLICE:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text)
    print(f"\n{text}", flush=True)


def machine_line() -> str:
    about, versions = machine.describe(), machine.versions()
    return f"{about['processor']}, {about['cores']} cores, torch {versions['torch']}"


def _answer(record: Record) -> str:
    assert record.messages is not None, "prompt/completion rows"
    return str(record.messages[-1]["content"]).strip()
