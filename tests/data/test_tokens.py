"""Tokens know which text they stand for, and which of them lie in a span."""

from __future__ import annotations

import random

from tokenizers import AddedToken

from builders.chats import assistant, chat, template_tokenizer, text_record, trained_texts, user
from builders.tokenizers_tiny import gappy_tokenizer, tiny_tokenizer
from lorafit.data.chat import encode_record
from lorafit.data.lookalikes import Stretch
from lorafit.data.tokens import Joined, encode_stretches


def test_a_character_of_several_tokens_is_shown_once():
    """The first of a character's tokens shows it, the others show nothing."""
    row = encode_record(chat(user("a"), assistant("🙂")), tiny_tokenizer())
    face = row.texts().index("🙂")
    assert row.texts()[face + 1 : face + 4] == ["", "", ""]
    assert row.trained[face : face + 4] == [True] * 4


def test_a_character_of_no_token_is_shown_with_the_next_one():
    """What the tokenizer leaves out goes to the token after it, at the end to the last; joined they are the text."""
    row = encode_record(text_record("a\x04b\x04"), gappy_tokenizer())
    assert row.texts() == ["a", "\x04b", "\x04<|im_end|>"]
    assert row.rendered == "a\x04b\x04<|im_end|>"
    (piece,) = encode_stretches([Stretch("a\x04", plain=True)], gappy_tokenizer())
    assert Joined([piece]).row(text_record(""), [True], ()).texts() == ["a\x04"]


def test_joined_pieces_are_one_text():
    """Whatever the cuts, the pieces' tokens stand at their places in the joined text, and spans find them there."""
    source, tokenizer = random.Random(0), tiny_tokenizer()
    for _ in range(50):
        words = [source.choice(["the answer ", "日本", "🙂", "", "é"]) for _ in range(source.randrange(6))]
        joined = Joined(encode_stretches([Stretch(word, source.random() < 0.5) for word in words], tokenizer))
        assert joined.text == "".join(words)
        assert joined.offsets.shape == (len(joined.ids), 2)
        assert joined.ids == [token for word in words for token in tokenizer.encode(word).ids]
        start, end = sorted((source.randrange(len(joined.text) + 1), source.randrange(len(joined.text) + 1)))
        expected = [start <= first and last <= end for first, last in joined.offsets.tolist()]
        assert joined.within([(start, end)], set()) == expected


def test_a_token_across_the_span_s_start_is_not_trained():
    """White space that merges with the header is the header's."""
    tokenizer = template_tokenizer(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<e>{% endfor %}", ("<e>",), end="<e>"
    )
    row = encode_record(chat(user("a"), assistant(" b")), tokenizer)
    assert trained_texts(row) == [" b<e>"]
    joined = template_tokenizer(
        "{% for m in messages %}{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %} {% endif %}",
        ("<e>",),
        end="<e>",
    )
    row = encode_record(chat(user("a"), assistant(" the")), joined)
    assert trained_texts(row) == ["<e>"], "the prompt's space and the answer's first word are one token"


def test_an_end_token_that_takes_white_space_along_is_trained():
    """Phi-3's end token swallows the newline after it; it is the end of the turn all the same."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer = template_tokenizer(template, ("<|user|>", "<|assistant|>"))
    tokenizer.backend.add_special_tokens([AddedToken("<|end|>", special=True, rstrip=True, normalized=False)])
    tokenizer.special["<|end|>"] = tokenizer.backend.token_to_id("<|end|>")
    row = encode_record(chat(user("a"), assistant("one"), user("b"), assistant("two")), tokenizer)
    assert [text.rstrip() for text in trained_texts(row)] == ["one<|end|>", "two<|end|>"]


def test_rows_of_equal_text_have_equal_hashes():
    """The hash of a row follows its text, cut or not, and nothing else."""
    one, two = (
        encode_record(chat(user("a"), assistant("b"), place=place), tiny_tokenizer()) for place in ("x:1", "y:2")
    )
    assert one.content_hash() == two.content_hash() != one.shortened(5).content_hash()
