"""Errors are one line for the user; every class prints."""

from __future__ import annotations

import inspect

from lorafit import errors
from lorafit.errors import DataError, Faults, Interrupted, LorafitError


def test_every_error_prints_place_fault_and_remedy_on_one_line():
    """Also when a value from a file holds newlines."""
    seen = 0
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        if not issubclass(kind, LorafitError) or kind is Faults:
            continue
        extra = (15,) if kind is Interrupted else ()
        error = kind("file.jsonl:3", "completion is\n'x'", "mend it", *extra)
        assert error.lines() == ["file.jsonl:3: completion is 'x'; mend it"]
        seen += 1
    assert seen >= 9


def test_exit_codes_are_those_of_the_specification():
    """2 for input, 3 for memory, 128 + signal for an interruption."""
    assert DataError("a", "b").exit_code == 2
    assert errors.MemoryLimitError("a", "b").exit_code == 3
    assert Interrupted("a", "b", "c", 15).exit_code == 143
    assert Interrupted("a", "b", "c", 2).exit_code == 130


def test_faults_show_twenty_and_count_the_rest():
    """One line per fault, the first 20, then how many more."""
    lines = Faults([DataError(f"f.jsonl:{i}", "is bad") for i in range(33)]).lines()
    assert len(lines) == 21
    assert lines[0] == "f.jsonl:0: is bad"
    assert lines[-1].endswith("and 13 more")


def test_errors_are_standard_kinds_too():
    """A caller that catches ValueError catches wrong input."""
    assert issubclass(DataError, ValueError)
    assert issubclass(errors.MemoryLimitError, MemoryError)
