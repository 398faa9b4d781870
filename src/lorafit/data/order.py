"""The order of rows: a pure function of seed, epoch and index, so that resuming needs no random state."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, SplitMix64's increment


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which epoch `epoch` (from 0) visits n rows: a permutation of 0..n-1, int64, read-only.

    Rows are sorted by a 64-bit mix of (seed, epoch, index) in integer arithmetic: the same on every machine.
    """
    keys = _mix(np.arange(n, dtype=np.uint64) + _mix(np.uint64(epoch) + _mix(np.uint64(seed))))
    permutation = np.argsort(keys, kind="stable")
    permutation.setflags(write=False)
    return permutation


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """SplitMix64's finaliser, a bijection of 64-bit integers. Source: Steele, Lea and Flood, OOPSLA 2014."""
    with np.errstate(over="ignore"):
        z = np.asarray(x, dtype=np.uint64) + np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
