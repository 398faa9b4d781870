"""Where an answer differs from the right one, word by word."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher

WORDS, ALIKE = 400, 0.5  # words that are compared at most; below this likeness marks would tell nothing


def marks(answer: str, expected: str) -> list[tuple[str, str]]:
    """The answer in pieces (kind, text): `same`, `other` (not in the right answer) and `missing` (only there).

    Without the missing ones the pieces joined are the answer. One piece `other` where the two have little in common
    or are too long to compare.
    """
    said, right = _words(answer), _words(expected)
    if answer == expected or not answer:
        return [("same", answer)] if answer else []
    if max(len(said), len(right)) > WORDS or _likeness(said, right) < ALIKE:
        return [("other", answer)]
    return list(_joined(_pieces(said, right)))


def _words(text: str) -> list[str]:
    """Words, single marks and white space; joined they are the text."""
    return re.findall(r"\w+|\s+|[^\w\s]", text)


def _likeness(said: list[str], right: list[str]) -> float:
    """Twice the common words over all words, white space aside; 1 for equal ones."""
    a, b = ([word for word in words if not word.isspace()] for words in (said, right))
    return SequenceMatcher(None, a, b, autojunk=False).ratio()


def _pieces(said: list[str], right: list[str]) -> Iterator[tuple[str, str]]:
    for kind, a, b, c, d in SequenceMatcher(None, said, right, autojunk=False).get_opcodes():
        if kind == "equal":
            yield "same", "".join(said[a:b])
            continue
        if a < b:
            yield "other", "".join(said[a:b])
        if c < d:
            yield "missing", "".join(right[c:d])


def _joined(pieces: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """White space alone between two marks is no agreement: it is marked with them."""
    whole = list(pieces)
    for n, (kind, text) in enumerate(whole):
        between = 0 < n < len(whole) - 1 and whole[n - 1][0] == whole[n + 1][0] == "other"
        yield ("other" if kind == "same" and between and not text.strip() else kind), text
