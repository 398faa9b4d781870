"""The laws of lorafit.evaluate.marks: nothing of an answer is lost, and what is marked differs."""

from __future__ import annotations

import random

import pytest

from lorafit.evaluate.marks import marks


def shown(answer: str, expected: str) -> list[tuple[str, str]]:
    return marks(answer, expected)


def test_pieces_joined_are_the_answer_and_the_right_answer():
    """Without the missing pieces the answer, without the other ones the right answer, white space aside, for 200 random
    pairs; most of them have enough in common to be compared."""
    draw = random.Random(0)
    marked = 0
    for _ in range(200):
        right = [draw.choice(["a", "bc", " ", "\n", ",", "é", "日本"]) for _ in range(12)]
        said = [word for word in right if draw.random() > 0.2]
        said.insert(draw.randrange(len(said) + 1), "new")
        answer, expected = "".join(said), "".join(right)
        pieces = marks(answer, expected)
        assert "".join(text for kind, text in pieces if kind != "missing") == answer
        if ("other", answer) != pieces[0]:
            joined = "".join(text for kind, text in pieces if kind != "other")
            assert "".join(joined.split()) == "".join(expected.split())
            marked += 1
    assert marked > 100


def test_equal_answers_have_no_marks():
    """The same text is one piece; nothing said is no piece."""
    assert shown("a b", "a b") == [("same", "a b")]
    assert shown("", "a b") == []


@pytest.mark.parametrize(
    ("answer", "expected", "pieces"),
    [
        ("SELECT b", "SELECT a", [("same", "SELECT "), ("other", "b"), ("missing", "a")]),
        ("one two", "one", [("same", "one"), ("other", " two")]),
        ("x y z w", "completely different words here", [("other", "x y z w")]),
    ],
)
def test_what_is_not_in_the_right_answer_is_marked(answer, expected, pieces):
    """Word by word; where little is common the whole answer is one mark."""
    assert shown(answer, expected) == pieces


def test_long_answers_are_not_compared():
    """Comparing takes the square of the words: above 400 of them the answer is one mark, at once."""
    assert shown("a " * 100_000, "a b") == [("other", "a " * 100_000)]
