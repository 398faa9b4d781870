"""The laws of lorafit.evaluate.samples: which rows are shown, and what of them is the prompt."""

from __future__ import annotations

from builders.rows import Row
from lorafit.evaluate.samples import SAMPLES, prompt_and_answer, sampled


def test_prompt_and_answer_are_cut_at_the_first_trained_span():
    """What stands before the first trained token is the prompt; the answer ends where training does."""
    row = Row([1, 2, 3, 4, 5, 6], [False, False, True, True, False, True])
    assert prompt_and_answer(row) == ([1, 2], [3, 4])
    assert prompt_and_answer(Row([1, 2], [False, True])) == ([1], [2])


def test_the_first_rows_with_a_prompt_are_shown():
    """A row that is trained from its first token has nothing to be asked; at most SAMPLES rows are looked at."""
    rows = [Row([1, 2], [True, True]), *(Row([n, n + 1], [False, True]) for n in range(SAMPLES))]
    assert sampled(rows) == [(n + 1, ([n], [n + 1])) for n in range(SAMPLES - 1)]
