"""Which learning rates are tried, and when the search ends."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lorafit.compare.arms import Arm, Outcome
from lorafit.compare.sweep import MOST, find, rate


def bowl(lowest: float, diverges_above: float = math.inf):
    """Runs whose loss grows with the distance from a rate, and those beyond another give nothing."""
    tried = []

    def run(lr: float) -> Outcome:
        tried.append(lr)
        loss = 1 + abs(math.log10(lr / lowest))
        report = {"adapter_loss": loss} if lr <= diverges_above else None
        return Outcome(Arm("lora", lr), Path("run"), report, "" if report else "diverged")

    return run, tried


@pytest.mark.parametrize(("lowest", "count"), [(1e-3, 3), (3.2e-3, 4), (3.2e-4, 4), (1e-2, 5), (1e-4, 5)])
def test_the_best_rate_has_worse_ones_on_both_sides(lowest, count):
    """From the rule's 1e-3 it goes on towards the better end, one half decade at a time, and tries none twice."""
    run, tried = bowl(lowest)
    best, outcomes, inside = find(1e-3, run)
    assert inside
    assert best.arm.lr == pytest.approx(lowest, rel=0.02)
    assert len(tried) == len(set(tried)) == count == len(outcomes)
    assert [outcome.arm.lr for outcome in outcomes] == sorted(tried)


def test_far_away_it_stops_and_says_so():
    """After MOST rates the best one at the edge is given, as not inside."""
    run, tried = bowl(1.0)
    best, _, inside = find(1e-3, run)
    assert not inside
    assert len(tried) == MOST
    assert best.arm.lr == max(tried)


def test_rates_that_diverge_are_worse_than_any():
    """What diverges bounds the search and is never the best; where all do, the search ends."""
    best, outcomes, inside = find(1e-3, bowl(1e-2, diverges_above=2e-3)[0])
    assert (best.arm.lr, inside) == (1e-3, True)
    assert outcomes[-1].failure == "diverged"
    best, outcomes, inside = find(1e-3, bowl(1e-2, diverges_above=0)[0])
    assert best.report is None
    assert (len(outcomes), inside) == (3, False)


def test_rates_are_half_decades_from_the_rules():
    """Two steps are a factor of ten, and a rate's name is short."""
    assert [rate(1.3e-3, place) for place in (-2, -1, 0, 1, 2)] == [1.3e-4, 4.1e-4, 1.3e-3, 4.1e-3, 1.3e-2]
    assert Arm("full", rate(1.32e-4, 1)).name == "full-lr-0.00042"
