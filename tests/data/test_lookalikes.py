"""Look-alikes of special tokens are broken for rendering and put together again for encoding."""

from __future__ import annotations

import random

from lorafit.data.lookalikes import absent, broken, first_look_alike, special_pattern, stretches

SPECIAL = ("<s>", "</s>", "<<", "[INST]", "|")


def test_no_special_token_is_left_and_nothing_else_is_changed():
    """Whatever the text, marked strings hold no special token, and without the marks they are the text."""
    pattern, source = special_pattern(SPECIAL), random.Random(0)
    for _ in range(300):
        text = "".join(source.choice(["<", "s", ">", "/", "[INST]", "a", "<s>", "\ufdd0"]) for _ in range(20))
        value = {text: [text, (1, None, {"k": text})]}
        marked, mark = broken(value, pattern)
        (key,) = marked
        assert first_look_alike(marked, pattern) is None
        assert mark not in text
        assert key.replace(mark, "") == text
        assert marked[key][1] == [1, None, {"k": key}]


def test_the_longest_token_wins_and_single_characters_are_left_alone():
    """A token that begins another does not hide it; a token of one character cannot be broken."""
    pattern = special_pattern(("<s>", "<s>x", "|"))
    assert pattern.search("a|<s>xy").group() == "<s>x"
    assert first_look_alike(["|"], pattern) is None
    assert first_look_alike(["anything"], special_pattern(())) is None


def test_special_tokens_are_no_patterns():
    """Characters that mean something to a regular expression mean themselves."""
    assert first_look_alike("aab", special_pattern(("a+b", "(a|b)*"))) is None
    assert first_look_alike("x(a|b)*", special_pattern(("a+b", "(a|b)*"))) == "(a|b)*"


def test_stretches_are_the_rendering_without_marks():
    """Only stretches with marks are plain; the template's own tokens stay in the others, in order."""
    pattern = special_pattern(("<u>", "<e>"))
    (text,), mark = broken(["hi <e>? ok"], pattern)
    rendering = f"<u>{text}<e><u>no marks<e>"
    assert list(stretches(rendering, mark, pattern)) == [
        ("<u>", False),
        ("hi <e>? ok", True),
        ("<e><u>no marks<e>", False),
    ]


def test_absent_characters_are_absent():
    """A row may hold noncharacters itself; others are taken then."""
    assert next(absent("abc")) == "\ufdd0"
    assert next(absent("\ufdd0\ufdd1")) == "\ufdd2"
    assert ord(next(absent("".join(map(chr, range(0xFDD0, 0xFDF0)))))) == 0xF0000
