"""The report as one HTML page that needs nothing else: made of report.json and metrics.jsonl alone."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lorafit import console
from lorafit.evaluate import charts
from lorafit.evaluate.advice import advise
from lorafit.evaluate.marks import marks

WIDE, NARROW = 860, 360  # of a drawing: a desk's and a phone's
MOVED = 8  # layers that are listed


def esc(value: object) -> str:
    """Text for the page: markup is shown, not obeyed, and control characters as their pictures."""
    pictures = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return html.escape(text.translate(pictures))


def page(report: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    """The report as HTML. lines: of metrics.jsonl."""
    trained = report["trained"]
    parts = [
        _head(report),
        _section("What to do next", _advice(report, lines)),
        _section("Loss by step", _curves(report, lines)),
        _section("Answers before and after", _samples(report["samples"])),
        _section("What was trained on what", _facts(_trained(report))),
        _section("The data", _data(report)),
        _section("Memory and time", _costs(report)),
        _section("Which layers moved", _movement(report)),
        _section("Settings, machine, versions", _settings(report)),
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
    gap, tuned = report["difference"], "The adapter" if report["adapter_bytes"] else "Training"
    if gap is None:
        return "Not known", "No rows were held out, so whether training helped is not known."
    told = f"held-out loss went from {report['base_loss']:.4f} to {report['adapter_loss']:.4f} nats per trained token"
    if gap["low"] is None:
        return "Too few rows to say", f"One row was held out, too few to say whether training helped: {told}."
    interval = f"difference {gap['mean']:+.4f}, 95 % interval {gap['low']:+.4f} to {gap['high']:+.4f}"
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
        _tile(console.gigabytes(report["peak_memory_bytes"]), "memory at the peak"),
    ]
    if report["adapter_bytes"]:
        tiles.append(_tile(console.gigabytes(report["adapter_bytes"]), "adapter file"))
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
    drawn = _both(lambda width: charts.loss_curve(training, held, report["base_loss"], width))
    return f"<p class=note>Nats per trained token.</p>{drawn}<p class=key>{key}</p>"


def _both(draw: Any) -> str:
    """A drawing for a desk and one for a phone; the style shows one of them."""
    drawn = draw(WIDE)
    return f"<div class=wide-only>{drawn}</div><div class=narrow>{draw(NARROW)}</div>" if drawn else ""


def _samples(samples: Sequence[dict[str, str]]) -> str:
    if not samples:
        return "<p>None: no rows were held out.</p>"
    note = (
        "<p class=note>The first held-out rows, answered greedily. <mark>Marked</mark> words are not in the right "
        "answer, <ins>underlined</ins> ones are only there.</p>"
    )
    return note + "".join(map(_sample, samples))


def _sample(sample: dict[str, str]) -> str:
    prompt, expected = sample["prompt"], sample["expected"]
    short = " ".join(sample.get("question", prompt).split())
    short = short if len(short) <= 120 else "... " + short[-116:]
    answers = "".join(
        f"<div class='answer{' hit' if sample[who].strip() == expected.strip() else ''}'><h4><span>{title}</span>"
        f"{'<span class=badge>the right answer</span>' if sample[who].strip() == expected.strip() else ''}</h4>"
        f"<p dir=auto>{_marked(sample[who], expected)}</p></div>"
        for who, title in (("base", "Before: the base"), ("adapter", "After: trained"))
    )
    return (
        f"<div class=sample><details><summary>{esc(short)}</summary>"
        f"<div class=prompt dir=auto>{esc(prompt)}</div></details>"
        f"<div class=answers><div class='answer right'><h4>The right answer</h4><p dir=auto>{esc(expected)}</p></div>"
        f"{answers}</div></div>"
    )


def _marked(answer: str, expected: str) -> str:
    tags = {"same": ("", ""), "other": ("<mark>", "</mark>"), "missing": ("<ins>", "</ins>")}
    pieces = [f"{tags[kind][0]}{esc(text)}{tags[kind][1]}" for kind, text in marks(answer, expected)]
    return "".join(pieces) or "<span class=note>nothing</span>"


def _trained(report: dict[str, Any]) -> list[tuple[str, object]]:
    trained, base = report["trained"], report["base"]
    own = report["total_parameters"] - (report["trainable_parameters"] if trained["layers"] else 0)
    stored = ", ".join(f"{name} {console.gigabytes(size)}" for name, size in base["bytes_by_format"].items())
    facts = [
        ("model", trained["model"]),
        ("architecture", f"{trained['architecture']}, {own:,} parameters"),
        ("frozen weights", stored),
        ("method", trained["method"]),
        ("trained parameters", f"{report['trainable_parameters']:,}"
         f" ({report['trainable_parameters'] / report['total_parameters']:.2%} of all)"),
    ]  # fmt: skip
    if trained["layers"]:
        facts.append(("adapter", f"rank {trained['rank']}, alpha {trained['alpha']:g}, {trained['layers']} layers"))
    if base["kept_in_16_bits"]:
        facts.append(("kept in 16 bits", ", ".join(base["kept_in_16_bits"])))
    return [
        *facts,
        ("data", ", ".join(trained["data"])),
        ("evaluated on", ", ".join(trained["eval"]) or "rows held out of the data"),
        ("tokens seen", f"{report['tokens']:,} ({report['trained_tokens']:,} trained)"),
        ("folder", trained["out"]),
    ]


def _data(report: dict[str, Any]) -> str:
    data, lengths = report["data"], report["findings"]["lengths"]
    share = data["trained_tokens"] / data["tokens"] if data["tokens"] else 0.0
    facts = [
        ("rows", f"{data['rows']:,}, {data['used']:,} used, {data['held_out']:,} held out"),
        ("tokens", f"{data['tokens']:,}"),
        ("trained share", f"{share:.1%} of the tokens ({data['trained_tokens']:,})"),
        ("length", f"{lengths['shortest']:,} to {lengths['longest']:,} tokens, median {lengths['median']:,}"),
        ("cut", _count(data["truncated"], "row")),
        ("left out", _count(data["skipped"], "row")),
        ("duplicates", _count(data["duplicates"], "row")),
    ]
    drawn = _both(lambda width: charts.histogram(lengths, width))
    problems, count = report["findings"]["problems"], report["findings"]["problem_count"]
    found = "".join(f"<li>{esc(one['place'])}: {esc(one['what'])}</li>" for one in problems)
    more = (
        f"<li>and {count - len(problems):,} more; lorafit preview lists them all</li>" if count > len(problems) else ""
    )
    listed = f"<summary>{_count(count, 'thing')} to look at</summary><ul class=plain>{found}{more}</ul>"
    noted = f"<details class=more>{listed}</details>"
    return _facts(facts) + f"<h3>Rows by length</h3>{drawn}" + (noted if problems else "")


def _costs(report: dict[str, Any]) -> str:
    predicted = report["predicted"]
    rows = [
        ("memory at the peak", predicted["memory_bytes"], report["peak_memory_bytes"], console.gigabytes),
        ("whole command", predicted["seconds"], report["seconds"], console.duration),
    ]
    body = ""
    for name, guess, real, shown in rows:
        off = "" if not guess or not real else f"{guess / real - 1:+.0%}"
        told = "not predicted" if guess is None else shown(guess)
        body += f"<tr><th>{name}</th><td>{esc(told)}</td><td>{esc(shown(real))}</td><td>{off}</td></tr>"
    more = [
        ("training alone", f"{console.duration(report['training_seconds'])}, steps and saves"),
        (
            "private memory",
            f"{console.gigabytes(report['private_memory_bytes'])} at the end, the mapped model file not counted",
        ),
    ]
    return (
        "<table class=num><thead><tr><th></th><th>predicted</th><th>measured</th><th>off by</th></tr></thead>"
        f"<tbody>{body}</tbody></table>{_facts(more)}"
    )


def _movement(report: dict[str, Any]) -> str:
    updates = report["updates"]
    if not updates:
        return "<p>No adapter: every weight was trained.</p>"
    measure = "relative" if all(update["relative"] is not None for update in updates) else "norm"
    ordered = sorted(updates, key=lambda update: -update[measure])
    what = "the size of the update beside the weight that it is added to" if measure == "relative" else "its norm"
    listed = "".join(
        f"<li>{esc(update['layer'])}: {esc(charts.amount(update, measure))}</li>" for update in ordered[:MOVED]
    )
    return (
        f"<p class=note>The stronger the colour, the further a matrix moved: {what} (Frobenius norms). From "
        f"{esc(charts.amount(ordered[-1], measure))} to {esc(charts.amount(ordered[0], measure))}.</p>"
        f"{_both(lambda width: charts.layer_map(updates, measure, width))}"
        f"<details class=more><summary>The layers that moved most</summary><ul class=plain>{listed}</ul></details>"
    )


def _settings(report: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{esc(name)}</th><td>{esc(_plain(entry['value']))}</td><td class=why>{esc(entry['origin'])}</td></tr>"
        for name, entry in report["settings"].items()
    )
    chosen = (
        "<details class=more open><summary>Settings, each with where it came from</summary><table class=num>"
        "<thead><tr><th>setting</th><th>value</th><th>from</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></details>"
    )
    pair = "".join(f"<div><h3>{title}</h3>{_facts(list(report[key].items()))}</div>"
                   for key, title in (("machine", "Machine"), ("versions", "Versions")))  # fmt: skip
    return f"{chosen}<div class=two>{pair}</div>"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def _plain(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _facts(pairs: Iterable[tuple[str, object]]) -> str:
    rows = (f"<tr><th>{esc(key.replace('_', ' '))}</th><td>{esc(_plain(value))}</td></tr>" for key, value in pairs)
    return f"<table class=facts>{''.join(rows)}</table>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"
