"""A run's end, as the comparison hears of it."""

from __future__ import annotations

import sys

import pytest

from lorafit.compare.arms import _run


@pytest.mark.parametrize(
    ("end", "code"),
    [("sys.exit(3)", 3), ("sys.exit(130)", 130), ("os.kill(os.getpid(), 15)", 143), ("os.kill(os.getpid(), 9)", 137)],
)
def test_exit_codes_and_errors_come_through(end, code):
    """Its code, or 128 and the signal that ended it as shells say, and its error lines without their word."""
    script = f"import os, sys; print('news', file=sys.stderr); print('error: a: b', file=sys.stderr, flush=True); {end}"
    assert _run([sys.executable, "-c", script], "lora") == (code, ["a: b"])
