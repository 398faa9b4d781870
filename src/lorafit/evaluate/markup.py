"""Small pieces of the report's page: text that is safe, tables of facts, drawings for a desk and for a phone."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable

WIDE, NARROW = 860, 360  # of a drawing: a desk's and a phone's


def esc(value: object) -> str:
    """Text for the page: markup is shown, not obeyed, and control characters as their pictures."""
    pictures = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return html.escape(text.translate(pictures))


def both(draw: Callable[[int], str]) -> str:
    """A drawing for a desk and one for a phone; the style shows one of them."""
    drawn = draw(WIDE)
    return f"<div class=wide-only>{drawn}</div><div class=narrow>{draw(NARROW)}</div>" if drawn else ""


def counted(number: int, thing: str) -> str:
    """A number of things, in words."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def plainly(value: object) -> str:
    """A setting's value as people read it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def fact_table(pairs: Iterable[tuple[str, object]]) -> str:
    """A table of two columns."""
    rows = (f"<tr><th>{esc(key.replace('_', ' '))}</th><td>{esc(plainly(value))}</td></tr>" for key, value in pairs)
    return f"<table class=facts>{''.join(rows)}</table>"
