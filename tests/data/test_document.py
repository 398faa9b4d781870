"""Plain text is trained whole, between the tokens that begin and end it."""

from __future__ import annotations

import random
import sys

import pytest

from builders.chats import STYLES, template_tokenizer, text_record
from lorafit.data.document import draft_document
from lorafit.data.lookalikes import special_pattern
from lorafit.data.records import Record
from lorafit.data.tokens import TokenRow, encode_drafts
from lorafit.formats.tokenizer import TextTokenizer

SPECIAL = STYLES["mistral"].special


def encode_document(record: Record, tokenizer: TextTokenizer, length: int = sys.maxsize) -> list[TokenRow]:
    draft = draft_document(record, tokenizer, special_pattern(tokenizer.special), length)
    return list(encode_drafts([draft], tokenizer))


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_text_row_ends_with_eos_and_begins_with_bos_where_the_model_wants_it(add_bos):
    """All tokens but the row's first are trained, EOS too, and the joined texts hold BOS and EOS."""
    tokenizer = template_tokenizer("", SPECIAL, "<s>", "</s>", add_bos)
    (row,) = encode_document(text_record("Hello 🙂 there"), tokenizer)
    assert row.rendered == ("<s>" if add_bos else "") + "Hello 🙂 there</s>"
    assert "".join(row.texts()) == row.rendered
    assert list(row.ids) == tokenizer.encode(row.rendered).ids
    assert row.trained == [False] + [True] * (len(row.ids) - 1)


def test_look_alikes_in_text_stay_text():
    """A text row that spells BOS has one BOS: the row's own. The user hears of it."""
    tokenizer = template_tokenizer("", SPECIAL, "<s>", "</s>", add_bos=True)
    (row,) = encode_document(text_record("<s>Hello</s>"), tokenizer)
    assert [token for token in row.ids if token in tokenizer.special.values()] == [tokenizer.bos_id, tokenizer.eos_id]
    assert row.rendered == "<s><s>Hello</s></s>"
    assert "'<s>' in the data looks like a special token" in row.notes[0]


def test_rows_of_a_document_cover_it_for_any_length():
    """Random text, random row lengths: the rows' texts without BOS, joined, are the document and EOS."""
    tokenizer, source = template_tokenizer("", SPECIAL, "<s>", "</s>", add_bos=True), random.Random(0)
    for _ in range(50):
        text = "".join(source.choice("ab é日🙂\n ") for _ in range(source.randrange(1, 60)))
        rows = encode_document(text_record(text, "raw"), tokenizer, source.randrange(2, 30))
        assert "".join(row.rendered.removeprefix("<s>") for row in rows) == text + "</s>"
        assert all("".join(row.texts()) == row.rendered for row in rows)
