"""A row of tokens: what the model sees, which of it is trained, and which text each token stands for.

Records become rows in two steps. First each is written out as a draft: stretches of text, and what is to be made of
their tokens. Then the stretches of many drafts are encoded at once, which the tokenizer does on all cores.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice
from typing import NamedTuple, Protocol

import numpy as np

from lorafit.data.lookalikes import Stretch
from lorafit.data.records import Record
from lorafit.data.spans import Template

CHUNK = 1 << 19  # characters encoded at once: enough work for every core; their tokens take some 20 MB


class Encoded(Protocol):
    """L token ids and, for each, the characters [start, end) that it stands for, (L, 2) int32."""

    @property
    def ids(self) -> list[int]: ...
    @property
    def offsets(self) -> np.ndarray: ...


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
    def encode_many(self, texts: Sequence[str], parse_special: bool = True) -> Sequence[Encoded]: ...
    def lost(self, text: str) -> list[str]: ...
    def digest(self) -> str | None: ...


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


class Piece(NamedTuple):
    """A stretch's text, its token ids, and for each the characters [start, end) that it stands for, (L, 2) int32."""

    text: str
    ids: list[int]
    offsets: np.ndarray


@dataclass(frozen=True)
class Draft:
    """A record written out; finish: makes its rows of the pieces that the stretches become."""

    stretches: list[Stretch]
    finish: Callable[[list[Piece]], list[TokenRow]]


def encode_drafts(drafts: Iterable[Draft], tokenizer: Tokenizer) -> Iterator[TokenRow]:
    """The rows of the drafts, in order."""
    for chunk in _chunks(drafts):
        pieces = iter(encode_stretches([stretch for draft in chunk for stretch in draft.stretches], tokenizer))
        for draft in chunk:
            yield from draft.finish(list(islice(pieces, len(draft.stretches))))


def encode_stretches(stretches: Sequence[Stretch], tokenizer: Tokenizer) -> list[Piece]:
    """Each stretch encoded."""
    encoded: dict[int, Encoded] = {}
    for plain in (False, True):
        chosen = [number for number, stretch in enumerate(stretches) if stretch.plain == plain]
        texts = [stretches[number].text for number in chosen]
        encoded.update(zip(chosen, tokenizer.encode_many(texts, parse_special=not plain), strict=True))
    return [Piece(stretch.text, encoded[n].ids, encoded[n].offsets) for n, stretch in enumerate(stretches)]


def _chunks(drafts: Iterable[Draft]) -> Iterator[list[Draft]]:
    chunk: list[Draft] = []
    characters = 0
    for draft in drafts:
        chunk.append(draft)
        characters += sum(len(stretch.text) for stretch in draft.stretches)
        if characters >= CHUNK:
            yield chunk
            chunk, characters = [], 0
    yield chunk


class Joined:
    """Pieces laid end to end: `text`, `ids` (a list), and `offsets` into the text, (L, 2) int32."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.text = "".join(piece.text for piece in pieces)
        self.ids = list(chain.from_iterable(piece.ids for piece in pieces))
        begins = accumulate((len(piece.text) for piece in pieces), initial=0)
        parts = [piece.offsets + begin for piece, begin in zip(pieces, begins, strict=False)]
        self.offsets = np.concatenate([np.empty((0, 2), np.int32), *parts])

    def within(self, spans: Iterable[Sequence[int]], special: Set[int]) -> list[bool]:
        """Which tokens lie in a span [start, end) of characters; one that begins before its span does not.

        A special token (of these ids) may take white space after it along, past the span's end.
        """
        starts, ends = self.offsets.T
        inside = np.zeros(len(self.ids), dtype=bool)
        for start, end in spans:
            began = (starts >= start) & (starts < end)
            inside |= began & (ends <= end)
            for token in np.flatnonzero(began & (ends > end)):
                inside[token] = self.ids[token] in special
        return inside.tolist()

    def row(self, record: Record, trained: Sequence[bool], notes: tuple[str, ...]) -> TokenRow:
        """The row; its first token is never trained, since nothing predicts it."""
        ends = np.maximum.accumulate(self.offsets[:, 1])
        ends[-1:] = len(self.text)  # characters of no token go to the token after them, at the end to the last
        flags = [False, *trained[1:]] if trained else []
        return TokenRow(record, self.text, array("i", self.ids), flags, array("i", ends.tobytes()), notes=notes)
