"""The report as one HTML page that needs nothing else: made of report.json and metrics.jsonl alone."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lorafit import console
from lorafit.evaluate import charts, sections
from lorafit.evaluate.advice import advise
from lorafit.evaluate.markup import both, esc


def page(report: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    """The report as HTML. lines: of metrics.jsonl."""
    trained = report["trained"]
    parts = [
        _head(report),
        _section("What to do next", _advice(report, lines)),
        _section("Loss by step", _curves(report, lines)),
        _section("Answers before and after", sections.answers(report["samples"])),
        _section("What was trained on what", sections.trained_on(report)),
        _section("The data", sections.data_found(report)),
        _section("Memory and time", sections.costs(report)),
        _section("Which layers moved", sections.movement(report)),
        _section("Settings, machine, versions", sections.settings(report)),
        f"<footer>lorafit {esc(report['versions'].get('lorafit', ''))}: made on this machine, nothing is loaded "
        "from elsewhere</footer>",
    ]
    style = files("lorafit.evaluate").joinpath("report.css").read_text(encoding="utf-8")
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{esc(trained['out'])}: lorafit report</title><style>{style}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def verdict(report: dict[str, Any]) -> tuple[str, str]:
    """Whether training helped: (headline, one sentence with the figures)."""
    gap, tuned = report["difference"], "The adapter" if report["method"] == "lora" else "Training"
    if gap is None:
        return "Not known", "No rows were held out, so whether training helped is not known."
    told = f"held-out loss went from {report['base_loss']:.4f} to {report['adapter_loss']:.4f} nats per trained token"
    if gap["low"] is None:
        return "Too few rows to say", f"One row was held out, too few to say whether training helped: {told}."
    interval = f"difference {gap['mean']:+.4f}, 95\N{NO-BREAK SPACE}% interval {gap['low']:+.4f} to {gap['high']:+.4f}"
    told = f"{told[0].upper()}{told[1:]} ({interval})."
    if gap["high"] < 0:
        return f"{tuned} helped", told
    if gap["low"] > 0:
        return f"{tuned} made it worse", told
    return "No difference beyond noise", told


def _head(report: dict[str, Any]) -> str:
    headline, sentence = verdict(report)
    trained, gap = report["trained"], report["difference"]
    what = f"{Path(trained['model']).name}, trained on {', '.join(Path(file).name for file in trained['data'])}"
    tiles = []
    if gap is not None:
        kind = "good" if gap["mean"] < 0 else "poor"
        drawn = "" if gap["low"] is None else charts.interval(gap["mean"], gap["low"], gap["high"])
        after = f"<em class={kind}>{report['adapter_loss']:.3f}</em>"
        losses = f"{report['base_loss']:.3f} <i>to</i> {after}"
        tiles.append(f"<div class='tile wide'><b>{losses}</b><span>held-out loss, {report['data']['held_out']:,} rows"
                     f"</span>{drawn}</div>")  # fmt: skip
    speed = report["tokens_per_second"]
    tiles += [
        _tile(console.duration(report["training_seconds"]), f"training, {report['steps']:,} steps"),
        _tile("not measured" if speed is None else f"{speed:,.0f}", "tokens per second"),
        _tile(console.gigabytes(report["peak_memory_bytes"]), "peak memory"),
    ]
    for key, words in (("adapter_bytes", "adapter file"), ("model_bytes", "model file")):
        if report[key] is not None:
            tiles.append(_tile(console.gigabytes(report[key]), words))
    return (
        f"<header><p class=eyebrow>{esc(what)}</p>"
        f"<h1>{esc(headline)}</h1><p class=lead>{esc(sentence)}</p></header><div class=tiles>{''.join(tiles)}</div>"
    )


def _tile(figure: str, words: str) -> str:
    return f"<div class=tile><b>{esc(figure)}</b><span>{esc(words)}</span></div>"


def _advice(report: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    found = [f"<li><b>{esc(one['do'])}</b>{esc(one['why'])}</li>" for one in advise(report, lines)]
    return (
        f"<ul class=advice>{''.join(found)}</ul>"
        if found
        else "<p>Nothing in the curves or the data asks for a change.</p>"
    )


def _curves(report: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    if not training and not held:
        return "<p>No step was written down.</p>"
    key = "<span class=k-train><i></i>training</span>" if training else ""
    key += "<span class=k-held><i></i>held out; the ring is the best, which was kept</span>" if held else ""
    key += "<span class=k-base><i></i>the base, held out</span>" if report["base_loss"] is not None else ""
    drawn = both(lambda width: charts.loss_curve(training, held, report["base_loss"], width))
    return f"<p class=note>Nats per trained token.</p>{drawn}<p class=key>{key}</p>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"
