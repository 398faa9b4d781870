"""Plain text -> token rows: a `text` row is one, a raw document is cut into as many as it needs."""

from __future__ import annotations

import sys
from array import array
from dataclasses import replace

from lorafit.data.lookalikes import first_look_alike, special_pattern
from lorafit.data.records import Record
from lorafit.data.tokens import Pieces, Tokenizer, TokenRow

STAYS_TEXT = "{!r} in the data looks like a special token and stays text"


def encode_document(record: Record, tokenizer: Tokenizer, length: int = sys.maxsize) -> list[TokenRow]:
    """A text record as consecutive rows of at most `length` tokens that lose none.

    Each begins with BOS where the model wants one, the last ends with EOS; every token but a row's first is trained.
    Look-alikes of special tokens stay text.
    """
    text = record.text or ""
    pieces = Pieces()
    pieces.add(text, tokenizer.encode(text, parse_special=False))
    pieces.add_special(tokenizer.eos_token, tokenizer.eos_id)
    look_alike = first_look_alike(text, special_pattern(tokenizer.special))
    notes = (STAYS_TEXT.format(look_alike),) if look_alike else ()
    whole = pieces.row(record, [True] * len(pieces.ids), notes)
    bos = Pieces()
    if tokenizer.add_bos:
        bos.add_special(tokenizer.bos_token, tokenizer.bos_id)
    step = length - len(bos.ids)
    return [_stretch(whole, first, first + step, bos) for first in range(0, max(len(whole.ids), 1), step)]


def _stretch(whole: TokenRow, first: int, last: int, bos: Pieces) -> TokenRow:
    """Tokens [first, last) of a document after `bos`."""
    begin = whole.ends[first - 1] if first else 0
    kept = whole.ends[first:last]
    ids = array("i", [*bos.ids, *whole.ids[first:last]])
    ends = array("i", [*(end for _, end in bos.offsets), *(end - begin + len(bos.text) for end in kept)])
    rendered = bos.text + whole.rendered[begin : kept[-1] if kept else begin]
    trained, notes = [place > 0 for place in range(len(ids))], whole.notes if first == 0 else ()
    return replace(whole, rendered=rendered, ids=ids, ends=ends, trained=trained, notes=notes)
