"""Packing rows without pad tokens."""

from __future__ import annotations

import numpy as np

from builders.rows import Row, random_rows
from lorafit.data.batch import pack_rows


def test_every_row_is_in_one_pack_once_and_whole():
    """Ids, positions and bounds of the packs give back each row."""
    rows = random_rows([5, 9, 2, 7, 3, 9, 4])
    numbers = [6, 0, 3, 1, 5]
    packs = pack_rows(rows, numbers, budget=14)
    seen = {}
    for pack in packs:
        assert len(pack.ids_T) <= 14
        for number, start, end in zip(pack.numbers, pack.documents, pack.documents[1:], strict=False):
            seen[number] = pack.ids_T[start:end].tolist()
            assert pack.positions_T[start:end].tolist() == list(range(end - start))
            assert set(pack.rows_T[start:end].tolist()) == {number}
    assert seen == {n: rows[n].ids for n in numbers}


def test_targets_are_the_trained_tokens_and_predictors_stand_before_them():
    """A trained token is predicted from the place before it; a row's first token from nowhere."""
    rows = [Row([10, 11, 12], [True, False, True]), Row([20, 21], [True, True])]
    (pack,) = pack_rows(rows, [0, 1], budget=100)
    assert pack.ids_T.tolist() == [10, 11, 12, 20, 21]
    assert pack.predictors_N.tolist() == [1, 3]
    assert pack.targets_N.tolist() == [12, 21]


def test_a_row_longer_than_the_budget_is_alone():
    """Nothing is cut and nothing is refused: a long row is a pack of its own."""
    packs = pack_rows(random_rows([30, 4, 4]), [0, 1, 2], budget=10)
    assert sorted(len(p.ids_T) for p in packs) == [8, 30]


def test_packing_off_gives_one_row_per_pack():
    """together=False: as many packs as rows."""
    packs = pack_rows(random_rows([3, 4, 5]), [2, 0, 1], budget=100, together=False)
    assert sorted(len(p.ids_T) for p in packs) == [3, 4, 5]


def test_packs_do_not_depend_on_the_order_given():
    """The same set of rows is cut alike: a pure function of the set."""
    rows = random_rows([5, 9, 2, 7, 3, 9, 4])
    first, second = pack_rows(rows, range(7), 14), pack_rows(rows, [3, 6, 1, 0, 2, 5, 4], 14)
    assert all(np.array_equal(a.ids_T, b.ids_T) for a, b in zip(first, second, strict=True))
