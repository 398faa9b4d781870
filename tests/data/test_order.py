"""The order of rows is a pure function of seed, epoch and index."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lorafit.data.order import order

MASK = 2**64 - 1


def mixed(x: int) -> int:
    """SplitMix64's finaliser in Python's whole numbers."""
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (1, 0), (2**63 - 1, 10**6)])
def test_rows_are_sorted_by_a_mix_of_seed_epoch_and_index(seed, epoch):
    """The permutation equals the plain sort by the mixed keys."""
    start = mixed((epoch + mixed(seed)) & MASK)
    wanted = sorted(range(100), key=lambda index: mixed((index + start) & MASK))
    assert order(seed, epoch, 100).tolist() == wanted


@pytest.mark.parametrize("n", [0, 1, 2, 10])
def test_every_epoch_visits_every_row_once(n):
    """However few rows there are, an epoch is a permutation of them."""
    assert sorted(order(5, 2, n)) == list(range(n))


def test_every_epoch_visits_the_rows_in_another_order():
    """No two epochs, nor those of two seeds, are alike."""
    orders = [tuple(order(seed, epoch, 50)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == len(orders)


def test_rows_are_spread_evenly():
    """Over many epochs, each row comes first about equally often (mean 20, 8 standard deviations allowed)."""
    first = [int(order(0, epoch, 50)[0]) for epoch in range(1000)]
    assert max(first.count(row) for row in range(50)) < 20 + 8 * 20**0.5


def test_the_order_does_not_depend_on_python_s_hash_seed():
    """Another process with another hash seed gives the same order."""
    code = "from lorafit.data.order import order; print(order(3, 4, 20).tolist())"
    path = os.pathsep.join(sys.path)
    told = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert told == [f"{order(3, 4, 20).tolist()}\n"] * 2
