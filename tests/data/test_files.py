"""Whatever a file holds, reading it ends, and says where it is wrong."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest

from lorafit.data.files import Row, read_rows
from lorafit.errors import DataError

ROWS = [{"prompt": f"question {n} é🙂", "completion": 'a "b", c\n' * n} for n in range(6)]


def good_file(folder: Path, suffix: str) -> Path:
    path = folder / f"data{suffix}"
    if suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    else:
        path.write_text("a document é🙂", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_rows_are_read_back(suffix, tmp_path):
    """What Python's own writers wrote is read back equal."""
    rows = list(read_rows(good_file(tmp_path, suffix)))
    assert [row.value for row in rows if isinstance(row, Row)] == ROWS


def test_the_line_of_a_row_is_where_it_begins(tmp_path):
    """In an indented array and in CSV with line ends in cells, places point at the rows' first lines."""
    path = good_file(tmp_path, ".json")
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [row.place for row in read_rows(path)] == [f"{path}:{n}" for n, line in enumerate(lines, 1) if line == " {"]
    path = good_file(tmp_path, ".csv")
    starts = [2]
    for row in ROWS[:-1]:
        starts.append(starts[-1] + 1 + row["completion"].count("\n"))
    assert [row.place for row in read_rows(path)] == [f"{path}:{n}" for n in starts]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_damaged_files_give_faults_with_places(suffix, tmp_path):
    """Random bytes changed, cut or doubled: every fault is a DataError with a line of the file, nothing is raised."""
    source = random.Random(suffix)
    good = good_file(tmp_path, suffix).read_bytes()
    path = tmp_path / f"bad{suffix}"
    for _ in range(250):
        bad = bytearray(good)
        for _ in range(source.randrange(1, 6)):
            at = source.randrange(len(bad))
            bad[at : at + source.randrange(3)] = bytes(
                source.choice(b'{}[]",:\\\n\0u\xff\xd8 9aN') for _ in range(source.randrange(3))
            )
        path.write_bytes(bad[: source.randrange(len(bad)) if source.random() < 0.3 else len(bad)])
        for row in read_rows(path):
            assert row.place.startswith(f"{path}:")
            assert 1 <= int(row.place.rpartition(":")[2]) <= bad.count(b"\n") + 1
            assert isinstance(row, Row) or (isinstance(row, DataError) and row.what)


def test_the_csv_module_keeps_its_own_bound(tmp_path):
    """Long cells are read without changing a setting of the process."""
    bound = csv.field_size_limit()
    list(read_rows(good_file(tmp_path, ".csv")))
    assert csv.field_size_limit() == bound
