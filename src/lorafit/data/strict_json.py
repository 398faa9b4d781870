"""JSON as the standard has it and no more: Python's own reader lets duplicate keys, NaN and half characters pass.

The two places where JSON stands are the rows of a file and strings inside a row (`tools`, tool calls' arguments).
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 64  # levels of lists and objects; templates and canonical JSON walk a row recursively
MAX_DIGITS = 4300  # Python's own bound on reading a whole number, whose cost grows with the square


class JsonError(ValueError):
    """Text that is no JSON; `position`: the character at which reading stopped, None when it could be read on."""

    def __init__(self, what: str, position: int | None = None) -> None:
        super().__init__(what)
        self.position = position


def read_value(text: str, start: int = 0) -> tuple[Any, int, str | None]:
    """The JSON value that begins at `start`, the position after it, and what is wrong inside it (None: nothing).

    Raises JsonError with a position where the text is no JSON at all, so that nothing after it can be read.
    """
    decoder = _Decoder()
    try:
        value, end = decoder.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise JsonError(f"invalid JSON at column {error.colno}: {_lower(error.msg)}", error.pos) from None
    except RecursionError:
        raise JsonError(f"nesting deeper than {MAX_DEPTH} levels", start) from None
    return value, end, decoder.wrong or _unsound(value, text[start:end])


def parse(text: str) -> Any:
    """The one JSON value that `text` is. Raises JsonError for anything else, trailing text included."""
    start = len(text) - len(text.lstrip())
    value, end, wrong = read_value(text, start)
    if text[end:].strip():
        raise JsonError(f"invalid JSON at column {end + 1}: text after the value", end)
    if wrong:
        raise JsonError(wrong)
    return value


class _Decoder(json.JSONDecoder):
    """Notes the first fault in `wrong` and reads on, so that the end of a faulty value is known."""

    def __init__(self) -> None:
        self.wrong: str | None = None
        super().__init__(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._int, parse_float=self._float
        )

    def _note(self, what: str) -> None:
        self.wrong = self.wrong or what

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            self._note(f"the key {_quoted(next(k for k in keys if keys.count(k) > 1))} stands twice")
        return found

    def _constant(self, name: str) -> None:
        self._note(f"{name} is no JSON number")

    def _int(self, digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            self._note(f"a number of {len(digits)} digits")
            return 0
        return int(digits)

    def _float(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            self._note(f"the number {digits[:40]} is too large")
        return value


_ESCAPED_NUL_OR_SURROGATE = re.compile(r"\\u(0000|[dD][89a-fA-F])")


def _unsound(value: Any, text: str) -> str | None:
    """Deep nesting, NUL and half surrogate pairs, looked for only where the text may hold them."""
    if text.count("[") + text.count("{") <= MAX_DEPTH and not _ESCAPED_NUL_OR_SURROGATE.search(text):
        return None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH and any(isinstance(item, (dict, list)) for item in level):
            return f"nesting deeper than {MAX_DEPTH} levels"
        strings = [item for item in level if isinstance(item, str)]
        if any("\0" in item for item in strings):
            return "a NUL character (\\u0000) in a string"
        if any("\ud800" <= character <= "\udfff" for item in strings for character in item):
            return "half of a surrogate pair (a broken \\u escape) in a string"
        level = [child for item in level if isinstance(item, (dict, list)) for child in _children(item)]
    return None


def _children(item: dict[str, Any] | list[Any]) -> list[Any]:
    return [*item.keys(), *item.values()] if isinstance(item, dict) else item


def _quoted(text: str) -> str:
    return json.dumps(text if len(text) <= 40 else text[:37] + "...", ensure_ascii=False)


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
