"""The report of a run: figures as report.json, and the same as one self-contained page."""

from __future__ import annotations

import html
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafit import console, machine
from lorafit.adapter.attach import adapted_layers, enable_adapter
from lorafit.data.batch import Tokens
from lorafit.data.rows import Rows
from lorafit.evaluate.heldout import HeldOut, held_out, paired_difference
from lorafit.formats.folders import write_text_atomically
from lorafit.model.generate import generate
from lorafit.model.load import Base, bytes_by_format, frozen_parameters
from lorafit.training.metrics import read_metrics

SAMPLES, SAMPLE_TOKENS = 4, 64


def finish_report(
    out: Path, *, base: Base, data: Rows, evaluation: Sequence[Tokens], budget: int, save_seconds: float, started: float
) -> dict[str, Any]:
    """Measure base against adapter, write OUT/report.json and OUT/report.html, and return the figures."""
    lines = read_metrics(out / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    training_seconds = sum(line["seconds"] for line in steps) + save_seconds
    tokens = sum(line["tokens"] for line in steps)
    trainable = sum(p.numel() for _, layer in adapted_layers(base.model) for p in layer.adapter.parameters())
    report: dict[str, Any] = {
        **_compare(base, evaluation, budget),
        "tokens": tokens,
        "trained_tokens": sum(line["trained_tokens"] for line in steps),
        "steps": len(steps),
        "training_seconds": round(training_seconds, 3),
        "tokens_per_second": round(tokens / training_seconds, 1) if steps else None,
        "trainable_parameters": trainable,
        "total_parameters": frozen_parameters(base.model) + trainable,
        "base": {"bytes_by_format": bytes_by_format(base.model), "kept_in_16_bits": list(base.kept)},
        "adapter_bytes": (out / "adapter" / "adapter_model.safetensors").stat().st_size,
        "data": {**data.counts, "held_out": len(evaluation)},
        "predicted": {"memory_bytes": None, "seconds": None},
        "samples": _samples(base, evaluation),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "private_memory_bytes": machine.memory_bytes("RssAnon"),
        "peak_memory_bytes": machine.memory_bytes("VmHWM"),
        "seconds": round(time.perf_counter() - started, 3),
    }
    write_text_atomically(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text_atomically(out / "report.html", page(report, lines))
    return report


def _compare(base: Base, evaluation: Sequence[Tokens], budget: int) -> dict[str, Any]:
    """Held-out losses of base and adapter on the same rows, with the interval of their difference."""
    if not evaluation:
        return {"base_loss": None, "adapter_loss": None, "difference": None}
    adapted = held_out(base.model, base.head, evaluation, budget)
    enable_adapter(base.model, False)
    plain = held_out(base.model, base.head, evaluation, budget)
    enable_adapter(base.model, True)
    return {"base_loss": plain.loss, "adapter_loss": adapted.loss, "difference": difference(adapted, plain)}


def difference(adapted: HeldOut, plain: HeldOut) -> dict[str, float | None]:
    """Loss of adapter minus base and its 95 % interval, in nats per token; one row has no interval: null."""
    mean, low, high = paired_difference(adapted, plain)
    bounded = math.isfinite(low)
    return {"mean": mean, "low": low if bounded else None, "high": high if bounded else None}


def _samples(base: Base, rows: Sequence[Tokens]) -> list[dict[str, str]]:
    """Answers of base and adapter to the first held-out prompts, beside the right ones."""
    shown = [pair for pair in map(prompt_and_answer, rows[:SAMPLES]) if all(pair)]
    prompts, expected = [prompt for prompt, _ in shown], [answer for _, answer in shown]
    told = {"expected": expected}
    for name, enabled in (("base", False), ("adapter", True)):
        enable_adapter(base.model, enabled)
        told[name] = generate(base.model, prompts, max_tokens=SAMPLE_TOKENS, end_ids=base.tokenizer.end_ids)
    return [
        {"prompt": base.tokenizer.decode(prompt)}
        | {name: base.tokenizer.decode(ids[number], True).strip() for name, ids in told.items()}
        for number, prompt in enumerate(prompts)
    ]


def prompt_and_answer(row: Tokens) -> tuple[list[int], list[int]]:
    """Token ids before the first trained one, and the trained ones that follow it without a gap."""
    trained = list(row.trained)
    start = trained.index(True)
    end = next((i for i in range(start, len(trained)) if not trained[i]), len(trained))
    return list(row.ids[:start]), list(row.ids[start:end])


def page(report: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    """The report as one HTML page without scripts or links to elsewhere."""
    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    evals = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    before = [] if report["base_loss"] is None else [(0, report["base_loss"])]
    return _PAGE.format(
        verdict=html.escape(verdict(report)),
        curve=_curve(steps, before + evals),
        figures=_rows(_figures(report)),
        samples="".join(map(_sample, report["samples"])) or "<p>None.</p>",
        facts=_rows([(part, _listed(report[part])) for part in ("data", "machine", "versions")]),
    )


def verdict(report: dict[str, Any]) -> str:
    """Whether the adapter helped, in one sentence."""
    gap = report["difference"]
    if gap is None:
        return "No rows were held out, so whether the adapter helped is not known."
    told = f"held-out loss went from {report['base_loss']:.4f} to {report['adapter_loss']:.4f} nats per trained token"
    if gap["low"] is None:
        return f"One row was held out, too few to say whether the adapter helped: {told}."
    interval = f"difference {gap['mean']:+.4f}, 95 % interval {gap['low']:+.4f} to {gap['high']:+.4f}"
    if gap["high"] < 0:
        return f"The adapter helped: {told} ({interval})."
    if gap["low"] > 0:
        return f"The adapter made it worse: {told} ({interval})."
    return f"No difference beyond noise: {told} ({interval})."


def _figures(report: dict[str, Any]) -> list[tuple[str, str]]:
    losses = [("base", report["base_loss"]), ("adapter", report["adapter_loss"])]
    speed = report["tokens_per_second"]
    return [
        *((f"held-out loss, {name}", "not measured" if loss is None else f"{loss:.4f}") for name, loss in losses),
        ("steps", f"{report['steps']:,}"),
        ("tokens", f"{report['tokens']:,} ({report['trained_tokens']:,} trained)"),
        ("training time", console.duration(report["training_seconds"])),
        ("whole command", console.duration(report["seconds"])),
        ("speed", "not measured" if speed is None else f"{speed:,.0f} tokens/s"),
        ("peak memory", console.gigabytes(report["peak_memory_bytes"])),
        ("private memory", console.gigabytes(report["private_memory_bytes"])),
        ("trainable parameters", f"{report['trainable_parameters']:,} of {report['total_parameters']:,}"),
        ("adapter file", console.gigabytes(report["adapter_bytes"])),
    ]


def _listed(facts: dict[str, Any]) -> str:
    shown = {name: " ".join(value) if isinstance(value, list) else value for name, value in facts.items()}
    return "\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in shown.items())


def _rows(pairs: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in pairs)


def _sample(sample: dict[str, str]) -> str:
    parts = _rows([(key, sample[key]) for key in ("prompt", "expected", "base", "adapter")])
    return f"<table class=sample>{parts}</table>"


def _curve(steps: Sequence[tuple[int, float]], evals: Sequence[tuple[int, float]]) -> str:
    """Loss by step as inline SVG: training loss as a line, held-out loss (the base's at step 0) as dots."""
    points = [*steps, *evals]
    if not points:
        return ""
    last = max(x for x, _ in points)
    xs, ys = _ticks(0, last, min(last, 6)), _ticks(min(y for _, y in points), max(y for _, y in points), 5)

    def across(x: float) -> float:
        return round(55 + 625 * x / xs[-1], 1)

    def up(y: float) -> float:
        return round(250 - 230 * (y - ys[0]) / (ys[-1] - ys[0]), 1)

    def path(line: Sequence[tuple[int, float]]) -> str:
        return " ".join(f"{across(x)},{up(y)}" for x, y in line)

    grid = "".join(f"<path d='M55 {up(y)}H680'/><text x=48 y={up(y) + 4} class=y>{y:.6g}</text>" for y in ys)
    marks = "".join(f"<text x={across(x)} y=268 class=x>{x:.6g}</text>" for x in xs)
    dots = "".join(f"<circle cx={across(x)} cy={up(y)} r=4 />" for x, y in evals)
    return (
        f"<svg viewBox='0 0 700 300' role=img aria-label='loss by step'>{grid}{marks}"
        f"<text x=368 y=290 class=x>step</text><text x=55 y=10>loss, nats per trained token</text>"
        f"<polyline points='{path(steps)}' /><polyline points='{path(evals)}' class=held />{dots}</svg>"
        "<p class=key><i></i> training &nbsp; <i class=held></i> held out (step 0: the base)</p>"
    )


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers 1, 2 or 5 x 10^n apart that enclose low and high; `about` as many."""
    rough = (high - low) / about or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / apart), math.ceil(high / apart)
    return [apart * number for number in range(first, max(last, first + 1) + 1)]


_PAGE = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>lorafit report</title><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}}
h1{{font-size:1.5rem}}h2{{font-size:1.1rem;margin-top:2rem}}table{{border-collapse:collapse;width:100%}}
th{{text-align:left;vertical-align:top;padding:.25rem 1rem .25rem 0;font-weight:600;white-space:nowrap;width:9rem}}
td{{padding:.25rem 0;white-space:pre-wrap;overflow-wrap:anywhere}}tr{{border-bottom:1px solid #ddd}}
.sample{{margin:1.5rem 0;border-left:3px solid #2a7f62}}.sample th{{padding-left:1rem}}
svg{{width:100%;margin-top:1rem}}svg path{{stroke:#ddd}}polyline{{fill:none;stroke:#999;stroke-width:1.5}}
polyline.held{{stroke:#2a7f62;stroke-dasharray:3 3}}circle{{fill:#2a7f62}}
text{{font:12px system-ui,sans-serif;fill:#555}}.x{{text-anchor:middle}}.y{{text-anchor:end}}
.key{{margin:0 0 0 3.5rem;font-size:.85rem;color:#555}}
.key i{{display:inline-block;width:1.2rem;border-top:2px solid #999;vertical-align:middle}}
.key i.held{{width:8px;height:8px;border:0;border-radius:4px;background:#2a7f62}}
</style><h1>lorafit report</h1><p>{verdict}</p>{curve}
<h2>Figures</h2><table>{figures}</table><h2>Held-out samples</h2>{samples}
<h2>Data, machine, versions</h2><table>{facts}</table></html>
"""
