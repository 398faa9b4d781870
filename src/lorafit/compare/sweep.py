"""Learning rates to try, half a decade apart, until the best one has worse ones on both sides.

Source: "LoRA Without Regret" (Schulman & Thinking Machines, 2025) and "Learning Rate Matters" (arXiv:2602.04998):
methods differ in the rate they want, so each is compared at its own best one.
"""

from __future__ import annotations

from collections.abc import Callable

from lorafit.compare.arms import Outcome

APART = 10**0.5
MOST = 5  # rates per method


def find(rule: float, run: Callable[[float], Outcome]) -> tuple[Outcome, list[Outcome], bool]:
    """(the best outcome, all of them by rate, whether worse ones lie on both sides of it).

    rule: the rate that the rule gives; it and its two neighbours are tried first, then on from the better end, at most
    MOST in all.
    """
    tried = {place: run(rate(rule, place)) for place in (0, -1, 1)}
    while True:
        best = min(tried, key=lambda place: (tried[place].loss, abs(place)))
        inside = min(tried) < best < max(tried) and tried[best].report is not None
        if inside or len(tried) == MOST or tried[best].report is None:
            return tried[best], [tried[place] for place in sorted(tried)], inside
        place = best + (1 if best == max(tried) else -1)
        tried[place] = run(rate(rule, place))


def rate(rule: float, place: int) -> float:
    """The rate `place` half decades from the rule's, in two digits."""
    return float(f"{rule * APART**place:.2g}")
