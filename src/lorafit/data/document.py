"""Plain text -> token rows: a `text` row is one, a raw document is cut into as many as it needs."""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from lorafit.data.lookalikes import Stretch, first_look_alike
from lorafit.data.records import Record
from lorafit.data.tokens import Draft, Joined, Piece, Tokenizer, TokenRow

STAYS_TEXT = "{!r} in the data looks like a special token and stays text"
NO_TOKEN = "the tokenizer has no token for {!r}: it is left out"


def draft_document(record: Record, tokenizer: Tokenizer, special: re.Pattern[str], length: int = sys.maxsize) -> Draft:
    """A text record as consecutive rows of at most `length` tokens that lose none.

    Each begins with BOS where the model wants one, the last ends with EOS; every token but a row's first is trained.
    Look-alikes of special tokens (which `special` matches) stay text.
    """
    text = record.text or ""
    notes = tuple(text_notes(text, first_look_alike(text, special), tokenizer))
    return Draft([Stretch(text, plain=True)], partial(_rows, record, tokenizer, length, notes))


def text_notes(text: str, look_alike: str | None, tokenizer: Tokenizer) -> Iterator[str]:
    """What the user should know about a row's text."""
    if look_alike:
        yield STAYS_TEXT.format(look_alike)
    yield from map(NO_TOKEN.format, tokenizer.lost(text))


def _rows(
    record: Record, tokenizer: Tokenizer, length: int, notes: tuple[str, ...], pieces: list[Piece]
) -> list[TokenRow]:
    joined = Joined([*pieces, *_special(tokenizer.eos_token, tokenizer.eos_id)])
    whole = joined.row(record, [True] * len(joined.ids), notes)
    bos = Joined(_special(tokenizer.bos_token, tokenizer.bos_id) if tokenizer.add_bos else [])
    step = length - len(bos.ids)
    return [_stretch(whole, first, first + step, bos) for first in range(0, max(len(whole.ids), 1), step)]


def _special(text: str | None, token: int | None) -> list[Piece]:
    """A special token by its id; nothing where the tokenizer has no such token."""
    return [] if token is None else [Piece(text or "", [token], np.array([[0, len(text or "")]], np.int32))]


def _stretch(whole: TokenRow, first: int, last: int, bos: Joined) -> TokenRow:
    """Tokens [first, last) of a document after `bos`."""
    begin = whole.ends[first - 1] if first else 0
    kept = whole.ends[first:last]
    ids = array("i", [*bos.ids, *whole.ids[first:last]])
    ends = array("i", [len(bos.text)] * len(bos.ids) + [end - begin + len(bos.text) for end in kept])
    rendered = bos.text + whole.rendered[begin : kept[-1] if kept else begin]
    trained, notes = [place > 0 for place in range(len(ids))], whole.notes if first == 0 else ()
    return replace(whole, rendered=rendered, ids=ids, ends=ends, trained=trained, notes=notes)
