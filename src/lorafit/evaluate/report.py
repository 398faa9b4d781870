"""The report of a run: everything that was found, as report.json; page.py draws it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit import machine
from lorafit.adapter.attach import adapted_layers, enable_adapter
from lorafit.adapter.attach import trained as trained_parameters
from lorafit.config import Resolved, field_types
from lorafit.data.batch import Tokens
from lorafit.data.rows import Rows
from lorafit.errors import ConfigError
from lorafit.evaluate.findings import findings
from lorafit.evaluate.heldout import HeldOut, difference, held_out
from lorafit.evaluate.movement import movement
from lorafit.evaluate.page import page
from lorafit.evaluate.samples import answers, samples
from lorafit.formats.folders import write_text_atomically
from lorafit.model.load import Base, bytes_by_format, frozen_parameters
from lorafit.training.metrics import read_metrics


@dataclass(frozen=True)
class Measured:
    """A model as it stands on the held-out rows: its losses and its answers to the sampled prompts."""

    losses: HeldOut | None
    answers: list[str]


def measure(base: Base, evaluation: Sequence[Tokens], budget: int) -> Measured:
    """Losses and answers of the model as it stands; no losses where there are no rows."""
    if not evaluation:
        return Measured(None, [])
    return Measured(held_out(base.model, base.head, evaluation, budget), answers(base, evaluation))


def measure_base(base: Base, evaluation: Sequence[Tokens], budget: int) -> Measured:
    """The same of the base alone: its adapters are switched off meanwhile."""
    enable_adapter(base.model, False)
    try:
        return measure(base, evaluation, budget)
    finally:
        enable_adapter(base.model, True)


def finish_report(
    out: Path,
    *,
    resolved: Resolved,
    base: Base,
    data: Rows,
    evaluation: Sequence[Tokens],
    budget: int,
    save_seconds: float,
    predicted: dict[str, float],
    started: float,
    tuned: Base | None = None,
    trainable: int | None = None,
) -> dict[str, Any]:
    """Measure the base against its adapter, or against `tuned`, the model that full fine-tuning made; write
    OUT/report.json and OUT/report.html, and return the figures.

    trainable: parameters that were trained; None for those of the base's adapters.
    """
    lines = read_metrics(out / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    training_seconds = sum(line["seconds"] for line in steps) + save_seconds
    tokens = sum(line["tokens"] for line in steps)
    if trainable is None:
        trainable = sum(parameter.numel() for parameter in trained_parameters(base.model).values())
    before, after = measure_base(base, evaluation, budget), measure(tuned or base, evaluation, budget)
    report: dict[str, Any] = {
        "method": "lora" if tuned is None else "full",
        **_compare(before, after),
        "tokens": tokens,
        "trained_tokens": sum(line["trained_tokens"] for line in steps),
        "steps": len(steps),
        "training_seconds": round(training_seconds, 3),
        "tokens_per_second": round(tokens / training_seconds, 1) if steps else None,
        "trainable_parameters": trainable,
        "total_parameters": frozen_parameters(base.model) + (trainable if tuned is None else 0),
        "base": {"bytes_by_format": bytes_by_format(base.model), "kept_in_16_bits": list(base.kept)},
        "adapter_bytes": _bytes(out / "adapter" / "adapter_model.safetensors"),
        "model_bytes": _bytes(out / "model" / "model.safetensors"),
        "data": {**data.counts, "held_out": len(evaluation)},
        "findings": findings(data),
        "updates": movement(base.model),
        "predicted": predicted,
        "samples": samples(base, evaluation, before.answers, after.answers) if evaluation else [],
        "trained": _trained(resolved, base.model),
        "settings": _settings(resolved),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "private_memory_bytes": machine.memory_bytes("RssAnon"),
        "peak_memory_bytes": machine.memory_bytes("VmHWM"),
        "seconds": round(time.perf_counter() - started, 3),
    }
    write_text_atomically(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text_atomically(out / "report.html", page(report, lines))
    return report


def redraw(out: Path) -> Path:
    """OUT/report.html made anew from report.json and metrics.jsonl. Raises ConfigError where the first is not there or
    is an older lorafit's."""
    file = out / "report.json"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        drawn = page(report, read_metrics(out / "metrics.jsonl"))
    except FileNotFoundError:
        raise ConfigError(str(file), "does not exist", "give the folder of a run that has ended") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"is no report that this lorafit draws: {type(error).__name__}: {error}"
        raise ConfigError(str(file), what, "train again, or use the lorafit that wrote it") from None
    write_text_atomically(out / "report.html", drawn)
    return out / "report.html"


def _bytes(file: Path) -> int | None:
    """Size of a file that a run may leave."""
    return file.stat().st_size if file.is_file() else None


def _compare(before: Measured, after: Measured) -> dict[str, Any]:
    """Held-out losses before and after on the same rows, with the interval of their difference."""
    if before.losses is None or after.losses is None:
        return {"base_loss": None, "adapter_loss": None, "difference": None}
    gap = difference(after.losses, before.losses)
    return {"base_loss": before.losses.loss, "adapter_loss": after.losses.loss, "difference": gap}


def _trained(resolved: Resolved, model: Any) -> dict[str, Any]:
    """What was trained on what."""
    config = resolved.config
    layers = [layer.adapter for _, layer in adapted_layers(model)]
    return {
        "model": config.model,
        "architecture": str(model.config.model_type),
        "data": list(config.data),
        "eval": list(config.eval),
        "out": config.out,
        "layers": len(layers),
        "rank": layers[0].rank if layers else None,
        "alpha": layers[0].alpha if layers else None,
    }


def _settings(resolved: Resolved) -> dict[str, Any]:
    """Every setting with where its value came from."""

    def plain(value: object) -> object:
        return list(value) if isinstance(value, tuple) else value

    return {
        name: {"value": plain(getattr(resolved.config, name)), "origin": resolved.origin.get(name, "default")}
        for name in field_types()
    }
