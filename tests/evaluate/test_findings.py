"""The laws of lorafit.evaluate.findings: every row is counted once, in the bin that holds its length."""

from __future__ import annotations

import pytest

from builders.rows import random_rows
from lorafit.data.rows import Rows
from lorafit.evaluate.findings import SHOWN, findings, histogram


@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], [1, 2], [3, 90, 91, 4000], list(range(7, 1234)), [10, 19, 20, 99]])
def test_every_length_stands_in_its_bin(lengths):
    """Against counting bin by bin: widths 1, 2 or 5 x 10^n, a dozen bins or so, the first holding the shortest."""
    found = histogram(lengths)
    start, width = found["start"], found["width"]
    assert str(width).strip("0") in "125"
    assert start % width == 0
    assert start <= min(lengths) < start + width
    assert len(found["counts"]) <= 13
    for number, count in enumerate(found["counts"]):
        low = start + number * width
        assert count == sum(low <= length < low + width for length in lengths)
    assert sum(found["counts"]) == len(lengths)


def test_lengths_and_the_first_problems_are_told():
    """Shortest, median and longest row in tokens; the first problems, and how many there are."""
    problems = [(f"a.jsonl:{n}", "is odd") for n in range(SHOWN + 5)]
    found = findings(Rows(random_rows([9, 3, 4, 30, 8]), problems, {}, [], 30))
    assert {key: found["lengths"][key] for key in ("shortest", "median", "longest")} == {
        "shortest": 3,
        "median": 8,
        "longest": 30,
    }
    assert found["problem_count"] == SHOWN + 5
    assert found["problems"] == [{"place": f"a.jsonl:{n}", "what": "is odd"} for n in range(SHOWN)]
