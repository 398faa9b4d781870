"""Continued pretraining: raw documents in whole blocks, with either method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lorafit
from builders.commands import World
from lorafit.config import TrainConfig
from lorafit.inputs import read_rows
from lorafit.model.sources import open_source

DOCUMENTS = {
    "sea.txt": "the ship sails over the sea and the sea is wide and the sea is deep\n" * 12,
    "land.txt": "a man walks along the road and the road is long and the road is dry\n" * 9,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    world = World(tmp_path_factory.mktemp("continued"))
    (world.folder / "texts").mkdir()
    for name, text in DOCUMENTS.items():
        (world.folder / "texts" / name).write_text(text)
    return world


def test_blocks_are_whole_and_never_reach_over_a_document(world):
    """Blocks have max_length tokens but for each document's last, hold one document each, and joined they are it (an
    EOS alone in a last block goes, since nothing predicts it); all tokens are trained but a block's first."""
    tokenizer = open_source(world.model).tokenizer(None)
    rows, _ = read_rows((str(world.folder / "texts"),), tokenizer, TrainConfig(max_length=32), 256)
    for name, text in DOCUMENTS.items():
        mine = [row for row in rows.rows if row.record.place.split(":")[0].endswith(name)]
        assert len(mine) > 3
        assert all(len(row.ids) == 32 for row in mine[:-1])
        bos, eos = tokenizer.bos_token if tokenizer.add_bos else "", tokenizer.eos_token
        joined = "".join(row.rendered.removeprefix(bos) for row in mine)
        assert joined in (text, text + eos)
        assert all(list(row.trained) == [False] + [True] * (len(row.ids) - 1) for row in mine)
    assert rows.counts["trained_tokens"] == rows.counts["tokens"] - rows.counts["used"]


@pytest.mark.parametrize("form", ["txt", "jsonl"])
@pytest.mark.parametrize(("method", "lr"), [("lora", 0.01), ("full", 0.003)])
def test_it_trains(method, lr, form, world, tmp_path):
    """On raw .txt documents and on `text` rows alike, the loss on held-out blocks falls by more than a fifth in 12
    steps, beyond its interval."""
    data: Path = world.folder / "texts"
    if form == "jsonl":
        data = tmp_path / "texts.jsonl"
        pieces = [line for text in DOCUMENTS.values() for line in text.splitlines()]
        data.write_text("".join(json.dumps({"text": f"{n} {line}"}) + "\n" for n, line in enumerate(pieces)))
    report = lorafit.train(
        model=world.model, data=data, out=tmp_path / "out", method=method, lr=lr, max_length=32, max_steps=12,
        batch_size=4, save_every=12, threads=1, compute="fp32",
    ).report  # fmt: skip
    assert report["adapter_loss"] < 0.8 * report["base_loss"]
    assert report["difference"]["high"] < 0
    assert report["trained_tokens"] > 0.9 * report["tokens"]
