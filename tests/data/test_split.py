"""Held-out rows are chosen by content alone, and never trained."""

from __future__ import annotations

import random

import pytest

from builders.chats import text_record
from lorafit.data.records import Record, content_hash
from lorafit.data.split import overlap, split


def texts(*numbers: int, name: str = "d.jsonl") -> list[Record]:
    return [text_record(f"row {number}", place=f"{name}:{line}") for line, number in enumerate(numbers, 1)]


SIZES = [
    (10, 0.05, 5),
    (16, 0.05, 8),
    (100, 0.05, 8),
    (400, 0.05, 20),
    (10_000, 0.05, 200),
    (40, 0.5, 20),
    (1, 0.5, 0),
    (40, 0.0, 0),
]


@pytest.mark.parametrize(("rows", "fraction", "held_out"), SIZES)
def test_the_number_of_held_out_rows(rows, fraction, held_out):
    """A fraction of the rows, at least 8, at most 200, never more than half; 0 holds out none."""
    training, evaluation = split(texts(*range(rows)), fraction, content_hash)
    assert (len(training), len(evaluation)) == (rows - held_out, held_out)


def test_the_choice_is_a_function_of_content():
    """Order and place of the rows change nothing."""
    rows = texts(*range(200))
    shuffled = random.Random(0).sample(rows, len(rows))
    chosen, again = (split(order, 0.1, content_hash)[1] for order in (rows, shuffled))
    assert {record.text for record in chosen} == {record.text for record in again}
    assert chosen == [record for record in rows if record in chosen], "rows stay in their order"
    smallest = sorted(rows, key=content_hash)[:20]
    assert {record.text for record in chosen} == {record.text for record in smallest}


def test_no_copy_of_a_held_out_row_is_trained():
    """With every row twice, contents are split, not rows."""
    rows = texts(*range(60), *range(60))
    training, evaluation = split(rows, 0.1, content_hash)
    assert len(evaluation) == len({record.text for record in evaluation}) == 12
    assert not {record.text for record in training} & {record.text for record in evaluation}
    assert len(training) == 2 * (60 - 12)


def test_planted_overlap_is_counted_exactly():
    """Five evaluation rows that are also trained on are five pairs of places, the first training row of each."""
    pairs = overlap(texts(*range(20), 3), texts(100, 3, 101, 7, 0, 19, 102, 12, name="e.jsonl"))
    assert pairs == [
        ("d.jsonl:4", "e.jsonl:2"),
        ("d.jsonl:8", "e.jsonl:4"),
        ("d.jsonl:1", "e.jsonl:5"),
        ("d.jsonl:20", "e.jsonl:6"),
        ("d.jsonl:13", "e.jsonl:8"),
    ]
