"""The laws of lorafit.model.paging: pages are dropped behind and read ahead, and no bit changes."""

from __future__ import annotations

from pathlib import Path

import torch

from builders.gguf_files import write_tiny_gguf
from builders.models import tiny_model
from builders.rows import random_rows
from builders.tokenizers_tiny import tiny_gguf_metadata
from lorafit.adapter.attach import adapted_layers, attach
from lorafit.data.batch import pack_rows
from lorafit.model.load import load_base
from lorafit.model.sources import open_source
from lorafit.training.step import accumulate

SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}


def resident(path: Path) -> int:
    """Bytes of the file's mapping that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and not line.split(" ")[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def trained(path: Path, paged: bool) -> tuple[float, list[torch.Tensor], int, int]:
    """(loss, gradients, bytes resident after loading, after a step) of one step on the packed file."""
    source = open_source(path)
    base = load_base(source, source.tokenizer(None), "packed", "fp32", paged=paged)
    del source
    loaded = resident(path)
    attach(base.model, 4)
    (pack,) = pack_rows(random_rows([16] * 4), range(4), 64)
    base.model.train()
    loss = accumulate(base.model, base.head, [pack], checkpointed=6)
    grads = [p.grad for _, layer in adapted_layers(base.model) for p in layer.adapter.parameters()]
    return loss, grads, loaded, resident(path)


def test_a_paged_base_gives_the_same_bits_and_holds_few_layers(tmp_path):
    """Loss and gradients are equal to the bit; after a step at most three of six layers are in memory."""
    file = tmp_path / "m.gguf"
    write_tiny_gguf(file, tiny_model("llama", **SIZES), "llama", tiny_gguf_metadata())
    loss, grads, loaded, after = trained(file, paged=False)
    paged_loss, paged_grads, paged_loaded, paged_after = trained(file, paged=True)
    assert loss == paged_loss
    assert all(torch.equal(one, other) for one, other in zip(grads, paged_grads, strict=True))
    whole = file.stat().st_size
    assert loaded > 0.9 * whole
    assert paged_loaded < 0.5 * whole
    assert paged_after < 0.75 * whole <= after
