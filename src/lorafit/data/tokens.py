"""A row of tokens: what the model sees, which of it is trained, and which text each token stands for."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from lorafit.data.records import Record
from lorafit.data.spans import Template


class Encoded(Protocol):
    """Token ids and, for each, the characters [start, end) that it stands for."""

    @property
    def ids(self) -> list[int]: ...
    @property
    def offsets(self) -> list[tuple[int, int]]: ...


class Tokenizer(Template, Protocol):
    """What encoding needs of a tokenizer; formats/tokenizer.py has it."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def eos_token(self) -> str | None: ...
    @property
    def add_bos(self) -> bool: ...
    @property
    def end_ids(self) -> frozenset[int]: ...
    @property
    def special(self) -> dict[str, int]: ...
    def encode(self, text: str, parse_special: bool = True) -> Encoded: ...


@dataclass(frozen=True)
class TokenRow:
    """One row as the model sees it: L token ids, and which of them are trained (predicted in the loss)."""

    record: Record
    rendered: str
    """The row's text, special tokens included."""
    ids: array[int]
    trained: list[bool]
    ends: array[int]
    """For each token the position in `rendered` up to which the tokens so far reach."""
    cut: bool = False
    """Whether the end was left out (max_length)."""
    notes: tuple[str, ...] = ()
    """What the user should know about the row."""

    def texts(self) -> list[str]:
        """The tokens' texts; joined they are `rendered`. Of a character's several tokens the first has it."""
        return [self.rendered[start:end] for start, end in zip([0, *self.ends], self.ends, strict=False)]

    def shortened(self, length: int) -> TokenRow:
        """The first `length` tokens of the row, with nothing in place of what is lost."""
        ids, ends, trained = self.ids[:length], self.ends[:length], self.trained[:length]
        return replace(self, rendered=self.rendered[: ends[-1]], ids=ids, trained=trained, ends=ends, cut=True)

    def content_hash(self) -> str:
        """SHA-256 (hex) of the rendered text; tells the rows of one document apart, as a record's hash cannot."""
        return hashlib.sha256(self.rendered.encode("utf-8")).hexdigest()


class Pieces:
    """A row in the making: encoded pieces of text, laid end to end."""

    def __init__(self) -> None:
        self.text = ""
        self.ids: list[int] = []
        self.offsets: list[tuple[int, int]] = []

    def add(self, text: str, encoded: Encoded) -> None:
        base = len(self.text)
        self.text += text
        self.ids += encoded.ids
        self.offsets += [(start + base, end + base) for start, end in encoded.offsets] if base else encoded.offsets

    def add_special(self, text: str | None, token: int | None) -> None:
        """A special token by its id; nothing where the tokenizer has no such token."""
        if token is not None:
            self.ids.append(token)
            self.offsets.append((len(self.text), len(self.text) + len(text or "")))
            self.text += text or ""

    def within(self, spans: Sequence[Sequence[int]], special: set[int]) -> list[bool]:
        """Which tokens lie in a span [start, end) of characters; one that begins before its span does not.

        A special token (of these ids) may take white space after it along, past the span's end.
        """
        starts, ends = np.asarray(self.offsets, dtype=np.int64).reshape(-1, 2).T
        inside = np.zeros(len(self.ids), dtype=bool)
        for start, end in spans:
            began = (starts >= start) & (starts < end)
            inside |= began & (ends <= end)
            for token in np.flatnonzero(began & (ends > end)):
                inside[token] = self.ids[token] in special
        return inside.tolist()

    def row(self, record: Record, trained: Sequence[bool], notes: tuple[str, ...]) -> TokenRow:
        """The row; its first token is never trained, since nothing predicts it."""
        ends = np.maximum.accumulate(np.asarray(self.offsets, dtype=np.int32).reshape(-1, 2)[:, 1])
        ends[-1:] = len(self.text)  # characters of no token go to the token after them, at the end to the last
        flags = [flag and place > 0 for place, flag in enumerate(trained)]
        return TokenRow(record, self.text, array("i", self.ids), flags, array("i", ends.tolist()), notes=notes)
