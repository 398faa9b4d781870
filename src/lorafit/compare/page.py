"""A comparison as tables: on the terminal, as Markdown, and as one self-contained page."""

from __future__ import annotations

import html
from typing import Any

from lorafit import console
from lorafit.compare.advice import interval

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def tables(found: dict[str, Any]) -> list[Table]:
    """(title, header, rows) of each table of compare.json."""
    made = [_methods(found)]
    if found["sweep"] is not None:
        rates: list[tuple[str, ...]] = [
            (name, f"{point['lr']:g}", _loss(point["loss"]), "best" if point["lr"] == sweep["best"] else point["note"])
            for name, sweep in found["sweep"].items()
            for point in sweep["rates"]
        ]
        made.append(("learning rates", ("method", "lr", "held-out loss", ""), rates))
    if found["forget"] is not None:
        losses, gaps = found["forget"]["losses"], found["forget"]["differences"]
        rows: list[tuple[str, ...]] = [
            (who, _loss(loss), "" if who == "base" else interval(gaps[f"{who} - base"])) for who, loss in losses.items()
        ]
        made.append((f"forgetting: {found['forget']['file']}", ("", "loss", "against the base, 95 % interval"), rows))
    return made


def markdown(found: dict[str, Any]) -> str:
    """The tables and the advice as Markdown."""
    parts = [f"# {_title(found)}\n"]
    for title, header, rows in tables(found):
        lines = [header, ("---",) * len(header), *rows]
        parts.append(f"## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    parts.append("## What it means\n\n" + "".join(f"- {one['say']} ({one['because']})\n" for one in found["advice"]))
    return "\n".join(parts)


def page(found: dict[str, Any]) -> str:
    """The same as one HTML page, without scripts or links to elsewhere."""
    parts = []
    for title, header, rows in tables(found):
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        table = f"<div><table><tr>{head}</tr>{body}</table></div>"
        parts.append(f"<h2>{html.escape(title)}</h2>{table}")
    told = "".join(
        f"<li>{html.escape(one['say'])} <small>{html.escape(one['because'])}</small></li>" for one in found["advice"]
    )
    return _PAGE.format(title=html.escape(_title(found)), told=told, tables="".join(parts))


def _title(found: dict[str, Any]) -> str:
    return f"{' against '.join(found['methods'])}: {found['steps']} steps, {found['rows']} held-out rows"


def _methods(found: dict[str, Any]) -> Table:
    header = ("method", "held-out loss", "against the base, 95 % interval", "lr", "training", "tokens/s", "peak memory",
              "trained", "on disk")  # fmt: skip
    rows: list[tuple[str, ...]] = [("base", _loss(found["base_loss"]), *[""] * 7)]
    for name, arm in found["methods"].items():
        if "loss" not in arm:
            rows.append((name, arm["failure"], *[""] * 7))
            continue
        rows.append((
            name, _loss(arm["loss"]), interval(found["differences"][f"{name} - base"]), f"{arm['lr']:g}",
            console.duration(arm["training_seconds"]), f"{arm['tokens_per_second']:.0f}",
            console.gigabytes(arm["peak_memory_bytes"]), f"{arm['trainable_parameters']:,}",
            console.gigabytes(arm["bytes_on_disk"]),
        ))  # fmt: skip
    return "methods", header, rows


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def show(found: dict[str, Any]) -> None:
    """The tables and the advice on standard output."""
    for number, (title, header, rows) in enumerate(tables(found)):
        console.table(title if number == 0 else f"\n{title}", header, rows)
    console.result("")
    for one in found["advice"]:
        console.result(f"{one['say']} ({one['because']})")


_PAGE = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>lorafit compare</title><style>
:root{{color-scheme:light dark}}
body{{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}}
h1{{font-size:1.4rem}}h2{{font-size:1.1rem;margin-top:2rem}}div{{overflow-x:auto}}table{{border-collapse:collapse}}
th,td{{text-align:left;padding:.3rem 1rem .3rem 0;white-space:nowrap;border-bottom:1px solid #8886}}
li{{margin:.4rem 0}}small{{opacity:.75}}
</style><h1>{title}</h1><ul>{told}</ul>{tables}</html>
"""
