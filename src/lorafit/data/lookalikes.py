"""Text in the data that looks like a special token ("<|im_end|>" typed by a user) stays text.

Look-alikes are broken before rendering by a mark, a character that the row does not hold. Every special token left in
the rendering is then the template's own, and the stretches that hold marks are encoded as plain text without them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple


class Stretch(NamedTuple):
    """Text to encode; plain: what looks like a special token in it is text."""

    text: str
    plain: bool


def special_pattern(special: Iterable[str]) -> re.Pattern[str]:
    """Matches special tokens, the longest first; a token of one character cannot be broken and is left out."""
    tokens = sorted((token for token in special if len(token) > 1), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, tokens)) if tokens else r"(?!)")


def first_look_alike(value: Any, special: re.Pattern[str]) -> str | None:
    """The first special token that stands in any string of `value`."""
    return next((found.group() for text in _strings(value) if (found := special.search(text))), None)


def broken(value: Any, special: re.Pattern[str]) -> tuple[Any, str]:
    """(a copy of `value` with a mark inside every look-alike in its strings, the mark)."""
    mark = next(absent("".join(_strings(value))))
    return _each_string(value, lambda text: _broken(text, special, mark)), mark


def stretches(text: str, mark: str, special: re.Pattern[str]) -> Iterator[Stretch]:
    """A rendering with marks in stretches, in order and without the marks.

    Plain are the stretches between special tokens that hold a look-alike; all between two of them is one stretch.
    """
    begun = 0
    bounds = [at for found in special.finditer(text) for at in found.span()]
    for start, end in zip([0, *bounds], [*bounds, len(text)], strict=True):
        if mark in text[start:end]:
            if begun < start:
                yield Stretch(text[begun:start], plain=False)
            yield Stretch(text[start:end].replace(mark, ""), plain=True)
            begun = end
    if begun < len(text):
        yield Stretch(text[begun:], plain=False)


def absent(text: str) -> Iterator[str]:
    """Characters that `text` does not hold: Unicode's noncharacters, then private use."""
    held = set(text)
    return (one for one in map(chr, chain(range(0xFDD0, 0xFDF0), range(0xF0000, 0xFFFFE))) if one not in held)


def _broken(text: str, special: re.Pattern[str], mark: str) -> str:
    """The mark goes after the first character of each look-alike, also of those that overlap."""
    parts, at = [], 0
    while found := special.search(text, at):
        parts.append(text[at : found.start() + 1])
        at = found.start() + 1
    return mark.join([*parts, text[at:]])


def _strings(value: Any) -> Iterator[str]:
    """Every string in `value`, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _each_string(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _each_string(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each_string(item, change) for item in value]
    return value
