"""The laws of lorafit.training.metrics: one line per step, none twice, none missing, none misread."""

from __future__ import annotations

import json

import pytest

from builders.crashes import largest_file
from lorafit.errors import ConfigError, ResumeError
from lorafit.training.metrics import Metrics, read_metrics


def write(path, steps, tail=""):
    """A line per step, an evaluation at each even one, then `tail` as it is."""
    lines = [{"step": s, "loss": s / 3} for s in steps]
    lines += [{"step": s, "eval_loss": s / 7} for s in steps if s % 2 == 0]
    lines.sort(key=lambda line: line["step"])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return lines


def test_lines_come_back_as_they_were_written(tmp_path):
    """Every number keeps its bits through the file, and lines follow one another across reopening."""
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        metrics = Metrics(path, keep_to_step=step - 1)
        metrics.add(step=step, loss=step / 3, lr=1e-300)
        metrics.sync()
        metrics.close()
    assert read_metrics(path) == [{"step": s, "loss": s / 3, "lr": 1e-300} for s in (1, 2)]


def test_a_line_is_on_its_way_to_the_disk_at_once(tmp_path):
    """A reader, or a process that dies, finds the line as soon as it is added."""
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.add(step=1, loss=2.0)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    metrics.close()


@pytest.mark.parametrize("step", range(7))
def test_the_file_is_cut_back_to_the_step(tmp_path, step):
    """Steps and evaluations after the checkpoint go, those up to it stay byte for byte, and a torn line is no bar."""
    path = tmp_path / "metrics.jsonl"
    lines = write(path, range(1, 7), tail='{"step": 7, "lo')
    kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
    Metrics(path, step).close()
    assert path.read_text() == "".join(kept)


def test_no_file_is_no_line(tmp_path):
    """A run that was killed before its first line has none."""
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    Metrics(tmp_path / "metrics.jsonl", 3).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("torn", ["{", '{"step": 4, "loss": 1.', "\0" * 50, "\ufffd"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    """Whatever stands after the last line end was being written when the process died."""
    lines = write(tmp_path / "metrics.jsonl", range(1, 4), tail=torn)
    assert read_metrics(tmp_path / "metrics.jsonl") == lines


@pytest.mark.parametrize("damaged", ["", "{", "\0\0", "[]", "7", '{"loss": 1}', '{"step": "2"}', "[" * 10**5])
def test_a_damaged_line_within_is_named(tmp_path, damaged):
    """One line, with file and line number, not a traceback."""
    path = tmp_path / "metrics.jsonl"
    write(path, (1,))
    with path.open("a") as file:
        file.write(damaged + '\n{"step": 3, "loss": 1.0}\n')
    with pytest.raises(ResumeError, match=r"metrics.jsonl:2: is no line of metrics: .*; put the line back") as caught:
        Metrics(path, 3)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_bytes_that_are_no_text_are_named(tmp_path):
    """A line that is not UTF-8 is damaged like any other."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n')
    with pytest.raises(ResumeError, match=r"metrics.jsonl:2"):
        read_metrics(path)


def test_what_is_not_finite_is_never_written(tmp_path):
    """NaN is no JSON; the loop stops before it could come here."""
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics.add(step=1, loss=float("nan"))
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_full_disk_is_one_line_and_loses_no_earlier_line(tmp_path):
    """Path, cause, exit code 2, at adding and again at closing; what was written before reads."""
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    metrics.add(step=1, loss=0.5)
    with largest_file(path.stat().st_size + 5):
        for action in (lambda: metrics.add(step=2, loss=0.25), metrics.close):
            with pytest.raises(ConfigError, match=r"metrics.jsonl: cannot be written: File too large") as caught:
                action()
            assert caught.value.exit_code == 2
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}]
