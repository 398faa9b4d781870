"""Rows read back from the disk are the rows that were written, and nothing on the disk is believed unseen."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from builders.chats import assistant, chat, text_record, user
from builders.tokenizers_tiny import gappy_tokenizer, tiny_tokenizer
from lorafit.data import cache
from lorafit.data.cache import cached_rows
from lorafit.data.records import Record
from lorafit.data.rows import Rows, build_rows
from lorafit.formats.tokenizer import TextTokenizer

SETTINGS = {"max_length": 300, "context": 512}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A cache of its own for each test, used for small data too."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "WORTH", 0)
    return tmp_path / "cache" / "rows"


def conversations() -> list[Record]:
    """Chats of one and two turns, one too long, one twice, one without a trained token, text, a document."""
    said = ["one", "日本 🙂", "<|im_end|>\x04", "long " * 400, "one", "\U00040000"]
    records = [chat(user("a"), assistant(word), place=f"d.jsonl:{n}") for n, word in enumerate(said, 1)]
    records.append(chat(user("a"), assistant("b"), user("c"), assistant(""), place="d.jsonl:7"))
    records.append(chat(user("why " * 300), assistant("b"), place="d.jsonl:8"))
    records.append(text_record("plain", place="d.jsonl:9"))
    return [*records, text_record("a whole book " * 300, "raw", place="\udcff.txt:1")]


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def cached(records: list[Record], tokenizer: TextTokenizer, **changes) -> Rows:
    return cached_rows(records, tokenizer, **{**SETTINGS, **changes})


def test_rows_read_back_are_those_that_were_built(folder):
    """Rows, problems, counts and length are equal in value and type, whether they were built, written or read."""
    records, tokenizer = conversations(), gappy_tokenizer()
    built = build_rows(records, tokenizer, **SETTINGS)
    assert {row.cut for row in built.rows} == {True, False}
    assert any(row.notes for row in built.rows)
    written = cached(records, tokenizer)
    assert len(files(folder)) == 1
    read = cached(records, gappy_tokenizer())
    assert written == built == read
    for one, other in zip(built.rows, read.rows, strict=True):
        assert one.record is other.record
        assert (one.ids.typecode, one.ends.typecode) == (other.ids.typecode, other.ends.typecode)
        assert {type(flag) for flag in other.trained} == {bool}


def test_the_second_time_nothing_is_encoded(folder):
    """A hit asks the tokenizer for its digest and nothing else."""
    records, tokenizer = conversations(), tiny_tokenizer()
    built = cached(records, tokenizer)

    class Digest:
        digest = tokenizer.digest

    assert cached(records, Digest()) == built


def test_no_rows_are_rows_too():
    """Data of which no row can be used comes back as such."""
    records = [chat(user("why " * 600), assistant("b"))]
    assert cached(records, tiny_tokenizer()).rows == []
    assert cached(records, tiny_tokenizer()) == build_rows(records, tiny_tokenizer(), **SETTINGS)


def test_whatever_changes_rows_changes_the_file(folder):
    """Record, place, setting, template, control token: each change has a file of its own, and rows of its own."""
    records, plain = conversations(), tiny_tokenizer()
    changed = [
        (records[1:], plain, {}),
        ([replace(records[0], place="e.jsonl:1"), *records[1:]], plain, {}),
        ([replace(records[0], prompt=1), *records[1:]], plain, {}),
        (records, plain, {"max_length": 200}),
        (records, plain, {"context": 256}),
        (records, plain, {"trained": "all"}),
        (records, replace(plain, add_bos=not plain.add_bos), {}),
        (records, replace(plain, end_ids=frozenset()), {}),
        (records, replace(plain, chat_template=(plain.chat_template or "") + "\n"), {}),
        (records, gappy_tokenizer(), {}),
    ]
    cached(records, plain)
    for number, (data, tokenizer, settings) in enumerate(changed, 2):
        found = cached(data, tokenizer, **settings)
        assert found == build_rows(data, tokenizer, **{**SETTINGS, **settings})
        assert len(files(folder)) == number


@pytest.mark.parametrize("place", [0, 40, -1])
@pytest.mark.parametrize("damage", ["changed", "cut", "longer", "empty"])
def test_a_damaged_file_is_made_anew(folder, damage, place):
    """One wrong byte in checksum, header or data, a file too short or too long: the rows are right, and kept again."""
    records, tokenizer = conversations(), tiny_tokenizer()
    built = cached(records, tokenizer)
    (file,) = files(folder)
    good = bytearray(file.read_bytes())
    bad = good.copy()
    bad[place] ^= 1
    file.write_bytes({"changed": bad, "cut": good[:place], "longer": good + b"\0", "empty": b""}[damage])
    assert cached(records, tokenizer) == built
    assert files(folder) == [file]
    assert file.read_bytes() == good


def test_rows_with_faults_are_not_kept(folder):
    """What a template refuses is asked of it each time: it may have been the time that it took."""
    tokenizer = replace(tiny_tokenizer(), chat_template="{{ raise_exception('no') }}")
    for _ in range(2):
        assert [fault.place for fault in cached(conversations()[:1], tokenizer).faults] == ["d.jsonl:1"]
    assert files(folder) == []


def test_templates_that_ask_for_the_time_are_not_kept(folder):
    """Tomorrow they write something else."""
    tokenizer = replace(tiny_tokenizer(), chat_template="{{ strftime_now('%Y') }}{{ messages }}")
    assert cached(conversations()[-1:], tokenizer).rows
    assert files(folder) == []


def test_little_data_is_not_kept(folder, monkeypatch):
    """Below WORTH characters there is nothing to gain."""
    monkeypatch.undo()
    monkeypatch.setenv(cache.VARIABLE, str(folder.parent))
    cached(conversations(), tiny_tokenizer())
    assert files(folder) == []


def test_the_folder_is_the_users_choice(tmp_path, monkeypatch):
    """LORAFIT_CACHE, or lorafit/ in XDG_CACHE_HOME, or in ~/.cache; 0 keeps nothing."""
    records, tokenizer = conversations(), tiny_tokenizer()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv(cache.VARIABLE, "0")
    cached(records, tokenizer)
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv(cache.VARIABLE)
    cached(records, tokenizer)
    assert len(files(tmp_path / "xdg" / "lorafit" / "rows")) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    cached(records, tokenizer)
    assert len(files(tmp_path / "home" / ".cache" / "lorafit" / "rows")) == 1


def test_nobody_else_can_read_the_rows(folder):
    """They are the user's data."""
    cached(conversations(), tiny_tokenizer())
    assert folder.stat().st_mode & 0o077 == 0


def test_the_files_that_were_used_longest_ago_make_room(folder, monkeypatch):
    """All files together stay within BOUND; a file that was read counts as used."""
    tokenizer, sets = tiny_tokenizer(), [conversations()[:n] for n in (1, 2, 3)]
    made = []
    for age, records in zip((30, 20, 10), sets, strict=True):
        cached(records, tokenizer)
        (new,) = {*files(folder)} - {*made}
        os.utime(new, ns=(0, new.stat().st_mtime_ns - age * 10**9))
        made.append(new)
    cached(sets[0], tokenizer)  # used again: now the second is the oldest
    monkeypatch.setattr(cache, "BOUND", sum(file.stat().st_size for file in made) + 10)
    cached(conversations()[3:4], tokenizer)
    assert made[0] in files(folder)
    assert made[1] not in files(folder)
    assert sum(file.stat().st_size for file in files(folder)) <= cache.BOUND


def test_a_disk_that_refuses_costs_nothing_but_time(tmp_path, monkeypatch):
    """Where the folder cannot be made, rows are built each time and no error is seen."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    records, tokenizer = conversations(), tiny_tokenizer()
    assert cached(records, tokenizer) == build_rows(records, tokenizer, **SETTINGS)
