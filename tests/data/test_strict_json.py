"""JSON as the standard has it: what Python's reader lets pass is refused, what it reads is read alike."""

from __future__ import annotations

import json
import random

import pytest

from lorafit.data.strict_json import JsonError, parse, read_value


def value(source: random.Random, depth: int = 0) -> object:
    kind = source.randrange(8 if depth < 4 else 6)
    if kind == 6:
        return [value(source, depth + 1) for _ in range(source.randrange(4))]
    if kind == 7:
        return {str(n) + source.choice("aé🙂"): value(source, depth + 1) for n in range(source.randrange(4))}
    return [None, True, source.randrange(10**30), source.random(), "日本\n\"'\\ 🙂", ""][kind]


@pytest.mark.parametrize("ascii_only", [True, False])
def test_good_json_is_read_as_python_reads_it(ascii_only):
    """Any value written by Python's json is read back equal, escapes of whole characters included."""
    source = random.Random(0)
    for _ in range(300):
        written = json.dumps(value(source), ensure_ascii=ascii_only, indent=source.choice([None, 1]))
        assert parse(f" {written}\n") == json.loads(written)


BAD = [
    "", " ", "{", '{"a": 1, "a": 2}', '[{"b": {"a": 1, "a": 2}}]', "NaN", "[Infinity]", "-1e999", '"\\ud800"',
    '"a\\u0000"', "[" * 65 + "]" * 65, "[" * 10**5, '{"a":' * 10**5, "1 2", "{'a': 1}", "[1,]", "9" * 5000,
    '"a\nb"', "\ufeff1",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_bad_json_is_refused(text):
    """Duplicate keys, numbers that are none, half characters, endless nesting: JsonError, whatever the depth."""
    with pytest.raises(JsonError):
        parse(text)


def test_64_levels_are_read():
    """The bound on nesting is the one that the message names."""
    assert parse("[" * 64 + "]" * 64)


def test_reading_goes_on_after_a_fault_inside_a_value():
    """A duplicate key spoils a value, not the one after it."""
    first, end, wrong = read_value('{"a": 1, "a": 2} {"b": 3}')
    assert (first, wrong) == ({"a": 2}, 'the key "a" stands twice')
    assert read_value('{"a": 1, "a": 2} {"b": 3}', end + 1) == ({"b": 3}, 25, None)
