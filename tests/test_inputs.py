"""Files as a command needs them: templates that read and compile, rows that are counted whatever befalls them."""

from __future__ import annotations

import pytest

from builders.commands import write_rows
from builders.tokenizers_tiny import tiny_tokenizer
from lorafit.config import TrainConfig
from lorafit.data import cache
from lorafit.errors import ConfigError, Faults, ModelError
from lorafit.inputs import collect_rows, read_rows, read_template

GOOD = {"prompt": "Who?", "completion": "They."}


def test_a_template_is_its_files_text_and_compiles(tmp_path):
    """No file gives none; what is wrong with one is said of that file."""
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages[0].content }} é", encoding="utf-8")
    assert read_template(None) is None
    assert read_template(str(file)) == "{{ messages[0].content }} é"
    file.write_text("{% if %}")
    with pytest.raises(ModelError, match=r"--template: .*t.jinja: does not compile"):
        read_template(str(file))
    file.write_bytes(b"\xe9")
    with pytest.raises(ConfigError, match=r"--template: .*t.jinja: does not read: 'utf-8'"):
        read_template(str(file))
    with pytest.raises(ConfigError, match="No such file or directory; give a Jinja file"):
        read_template(str(tmp_path / "no"))


def test_rows_are_used_and_skipped(tmp_path):
    """Bad rows count as rows and as skipped; a file that does not read has no rows to count."""
    data = str(write_rows(tmp_path / "data.jsonl", [GOOD, {"prompt": None, "completion": "x"}, [1], GOOD]))
    missing = str(tmp_path / "no.jsonl")
    rows, records, faults = collect_rows((data, missing), tiny_tokenizer(), TrainConfig(), 256)
    assert [fault.place for fault in faults] == [f"{data}:2", f"{data}:3", missing]
    assert (rows.counts["rows"], rows.counts["used"], rows.counts["skipped"]) == (4, 2, 2)
    assert [record.number for record in records] == [1, 4]


def test_faults_stop_unless_rows_are_skipped_and_missing_files_always_do(tmp_path):
    """--skip-bad-rows is about rows."""
    data = str(write_rows(tmp_path / "data.jsonl", [GOOD, {"prompt": None, "completion": "x"}]))
    with pytest.raises(Faults):
        read_rows((data,), tiny_tokenizer(), TrainConfig(), 256)
    skipping = TrainConfig(skip_bad_rows=True)
    rows, _ = read_rows((data,), tiny_tokenizer(), skipping, 256)
    assert (rows.counts["rows"], rows.counts["skipped"]) == (2, 1)
    with pytest.raises(Faults, match="No such file"):
        read_rows((data, str(tmp_path / "no.jsonl")), tiny_tokenizer(), skipping, 256)


def test_rows_counts_and_faults_are_the_same_the_second_time(tmp_path, monkeypatch):
    """What the cache of rows gives is what there was without it, beside rows that do not read too."""
    monkeypatch.setattr(cache, "WORTH", 0)
    data = str(write_rows(tmp_path / "data.jsonl", [GOOD, {"prompt": None, "completion": "x"}, [1], GOOD]))
    found = []
    for wanted in ("0", str(tmp_path / "cache"), str(tmp_path / "cache")):
        monkeypatch.setenv(cache.VARIABLE, wanted)
        rows, records, faults = collect_rows((data,), tiny_tokenizer(), TrainConfig(), 256)
        found.append((rows, records, [str(fault) for fault in faults]))
    assert len(list((tmp_path / "cache" / "rows").iterdir())) == 1
    assert found[0] == found[1] == found[2]
    assert len(found[0][2]) == 2
