"""The laws of lorafit.model.paging: pages are dropped behind and read ahead, and no bit changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from builders.gguf_experts import write_moe_gguf
from builders.gguf_files import write_tiny_gguf
from builders.models import tiny_model
from builders.rows import random_rows
from builders.tokenizers_tiny import tiny_gguf_metadata
from lorafit.adapter.attach import attach
from lorafit.data.batch import pack_rows
from lorafit.evaluate.movement import movement
from lorafit.model.load import load_base
from lorafit.model.sources import open_source
from lorafit.training.step import accumulate

MIXTURES = {"experts": "qwen3_moe", "Llama 4": "llama4_text"}
LLAMA4 = {"no_rope_layers": None, "attention_chunk_size": 8192, "intermediate_size": 256, "intermediate_size_mlp": 256}
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


def trained(path: Path, paged: bool, **adapter: Any) -> tuple[float, list[torch.Tensor], int, int]:
    """(loss, gradients, bytes resident after loading, and at the end) of one step on the packed file, and the report's
    look at how far layers moved, which reads every weight once more."""
    source = open_source(path)
    base = load_base(source, source.tokenizer(None), "packed", "fp32", paged=paged)
    del source
    loaded = resident(path)
    attach(base.model, 4, **adapter)
    (pack,) = pack_rows(random_rows([16] * 4), range(4), 64)
    base.model.train()
    loss = accumulate(base.model, base.head, [pack], checkpointed=6)
    grads = [p.grad for p in base.model.parameters() if p.requires_grad]
    movement(base.model)
    return loss, grads, loaded, resident(path)


@pytest.mark.parametrize("kind", ["plain", "DoRA", *MIXTURES])
def test_a_paged_base_gives_the_same_bits_and_holds_few_layers(kind, tmp_path):
    """Loss and gradients are equal to the bit; after a step at most three of six layers are in memory. So it is where
    layers are ours, and where they are transformers'."""
    file = tmp_path / "m.gguf"
    adapter: dict[str, Any] = {"use_dora": True} if kind == "DoRA" else {}
    if kind in MIXTURES:
        own = LLAMA4 if kind == "Llama 4" else {"moe_intermediate_size": 256}
        write_moe_gguf(file, tiny_model(MIXTURES[kind], **{**SIZES, **own}))
        adapter = {"targets": ["all-linear", "experts"]}
    else:
        write_tiny_gguf(file, tiny_model("llama", **SIZES), "llama", tiny_gguf_metadata())
    loss, grads, loaded, after = trained(file, paged=False, **adapter)
    paged_loss, paged_grads, paged_loaded, paged_after = trained(file, paged=True, **adapter)
    assert loss == paged_loss
    assert all(torch.equal(one, other) for one, other in zip(grads, paged_grads, strict=True))
    whole = file.stat().st_size
    assert loaded > 0.9 * whole
    assert paged_loaded < 0.5 * whole
    assert paged_after < 0.75 * whole <= after
