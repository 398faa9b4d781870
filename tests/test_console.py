"""What reaches the screen: as it was said, on the stream where it belongs."""

from __future__ import annotations

import io

import pytest

from lorafit import console
from lorafit.errors import ConfigError

ODD = "[bold]x[/] :memo: \\[red] {'a': 1} " + "long " * 60 + "日本"


def test_messages_are_one_unchanged_line_each_on_standard_error(capsys):
    """No markup, no emoji names, no folding: what a file or a path says stays as it is."""
    console.say(ODD)
    console.warn(ODD)
    console.fail([ODD, "b"])
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err == f"{ODD}\nwarning: {ODD}\nerror: {ODD}\nerror: b\n"


def test_results_are_unchanged_on_standard_output(capsys):
    """Text as it is, control characters too; JSON on one line, not escaped, and never NaN."""
    console.result(ODD + "\r\x1b")
    console.result_json({"text": "日本\n", "none": None})
    found = capsys.readouterr()
    assert (found.out, found.err) == (ODD + "\r\x1b\n" + '{"text": "日本\\n", "none": null}\n', "")
    with pytest.raises(ValueError, match="not JSON compliant"):
        console.result_json(float("nan"))


def test_a_tables_columns_are_as_wide_as_their_cells(capsys):
    """Wide characters count twice, long cells are not folded, and nothing trails."""
    long = "/path" * 30
    console.table("title", ("name", "value"), [("日本", "1"), (long, "[2]")])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["title", f"{'name':<150}  value", f"日本{'':146}  1", f"{long}  [2]"]


def test_control_characters_of_data_are_pictures(capsys):
    """A terminal must not obey what stands in a training file; new lines stay."""
    console.coloured([("a\x1b[31m", False), ("b\r\nc\x07\0", True)])
    assert capsys.readouterr().out == "a␛[31mb␍\nc␇␀\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
        (3599.7, "1 h 00 min"),
    ],
)
def test_durations_read_as_people_say_them(seconds, text):
    """Seconds, minutes with seconds, hours with minutes; rounding never gives 60."""
    assert console.duration(seconds) == text


@pytest.mark.parametrize(("size", "text"), [(1.5e9, "1.50 GB"), (1e8, "0.10 GB"), (9.9e7, "99.0 MB"), (5e4, "0.1 MB")])
def test_bytes_are_decimal(size, text):
    """GB is 10^9 bytes, MB 10^6."""
    assert console.gigabytes(size) == text


def test_progress_in_a_log_is_a_line_per_tenth(capsys):
    """No bar without a terminal: the first step, every tenth of the run, and every evaluation."""
    with console.Steps(40, lambda step: 0.5 * (40 - step)) as steps:
        for step in range(1, 41):
            steps.line({"step": step, "loss": 2.0, "seconds": 0.5, "tokens_per_second": 100.0})
        steps.line({"step": 40, "eval_loss": 1.25})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == [f"{step}/40" for step in (1, *range(4, 41, 4))]
    assert lines[1] == "step 4/40  loss 2.0000  100 tokens/s  18 s left"
    assert lines[-1] == "step 40/40  held-out loss 1.2500"


def test_facts_are_lines_or_json(capsys):
    """The same facts: a line each with nested ones indented, or one JSON document."""
    found = {"kind": "model", "bytes": {"F32": 12, "inner": {"a": [1, 2]}}, "empty": []}
    console.facts(found, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["kind", "model"], ["bytes"], ["F32", "12"], ["inner"], ["a", "1,", "2"], ["empty"]
    ]  # fmt: skip
    assert [len(line) - len(line.lstrip()) for line in lines] == [0, 0, 2, 2, 4, 0]
    console.facts(found, as_json=True)
    assert capsys.readouterr().out == '{"kind": "model", "bytes": {"F32": 12, "inner": {"a": [1, 2]}}, "empty": []}\n'


def test_standard_input_that_is_closed_has_no_lines(monkeypatch):
    """`lorafit chat <&-`: Python has no standard input then."""
    monkeypatch.setattr("sys.stdin", None)
    assert list(console.lines("> ")) == []


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input_that_is_not_utf_8_is_one_line(errors, monkeypatch):
    """In either way that a locale has Python read it; the lines before it were given."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n" * 9000 + b"caf\xe9\n"), "utf-8", errors))
    lines = console.lines("> ")
    assert next(lines) == "Hi"
    with pytest.raises(ConfigError, match=r"standard input: is not UTF-8: .*; send it as UTF-8"):
        list(lines)
