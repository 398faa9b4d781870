"""The examples: the flat file trains, and the bundled data is what it says it is."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import lorafit
from builders.commands import World, one_core
from lorafit.data.records import content_hash, read_records

EXAMPLES = Path(__file__).parent.parent / "examples"
FLAT = EXAMPLES / "train_flat.py"


@pytest.fixture(scope="module", autouse=True)
def _one_core():
    with one_core():
        yield


def test_the_flat_file_trains_an_adapter_that_lorafit_loads(tmp_path, capsys):
    """A few steps on a tiny model: the loss falls, and the adapter it writes gives its answers in lorafit."""
    world = World(tmp_path)
    flat = runpy.run_path(str(FLAT))
    main = flat["main"]
    main.__globals__.update(STEPS=8, LR=1e-2)
    main(str(world.model), str(world.data), str(tmp_path / "adapter"))
    lines = capsys.readouterr().err.splitlines()
    losses = [float(line.split()[-1]) for line in lines if line.startswith("step ")]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.5
    ids_1L = torch.arange(3, 40)[None]
    plain = lorafit.load(world.model, compute="fp32")
    adapted = lorafit.load(world.model, adapter=tmp_path / "adapter", compute="fp32")
    assert not torch.equal(plain(input_ids=ids_1L).logits, adapted(input_ids=ids_1L).logits)


def test_the_flat_file_is_short_and_shows_everything_that_trains():
    """Under 150 lines; of lorafit it takes the loading of the model alone."""
    text = FLAT.read_text()
    assert len(text.splitlines()) < 150
    assert set(re.findall(r"lorafit\.(\w+)\(", text)) == {"load"}


@pytest.mark.parametrize(("name", "rows"), [("train", 1000), ("test", 100)])
def test_the_wikisql_sample_reads_without_faults(name, rows):
    """As many prompt/completion rows as its README says, each with an answer."""
    read = read_records([EXAMPLES / "wikisql" / f"{name}.jsonl"])
    assert (read.faults, read.formats) == ([], {"prompt/completion": rows})
    assert all(record.fields["completion"].startswith("SELECT ") for record in read.records)


def test_no_test_row_of_the_sample_is_trained():
    """The two files share no row and no table."""
    train, test = (read_records([EXAMPLES / "wikisql" / f"{name}.jsonl"]).records for name in ("train", "test"))
    assert {content_hash(record) for record in train}.isdisjoint(map(content_hash, test))

    def tables(records) -> set[str]:
        return {record.fields["prompt"].splitlines()[0] for record in records}

    assert tables(train).isdisjoint(tables(test))
