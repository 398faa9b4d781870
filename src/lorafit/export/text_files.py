"""The files beside the weights of an exported Hugging Face folder: configuration, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafit.adapter.merge import grown
from lorafit.export.opened import Opened
from lorafit.model import save_plain

PER_LAYER = "model.embed_tokens_per_layer.weight"  # of Gemma 4's small models
NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def write_config(opened: Opened, folder: Path, dtype: str, tied: bool) -> None:
    """config.json, with the dtype of the weights beside it, the rows of their embedding and no quantisation, and
    generation_config.json."""
    changes: dict[str, Any] = {"dtype": NAMES[dtype]}
    if opened.model.config.tie_word_embeddings and not tied:
        changes["tie_word_embeddings"] = False
    rows = grown(opened.model)
    if rows:
        changes["vocab_size"] = max(rows.values())
    if PER_LAYER in rows:
        changes["vocab_size_per_layer_input"] = rows[PER_LAYER]
    part_of = opened.source.part_of
    save_plain.write_config(folder, opened.model, opened.tokenizer, opened.path, changes, part_of=part_of)


def write_tokenizer(opened: Opened, folder: Path) -> None:
    """The tokenizer's files as the base has them, or made from a GGUF file's; the trained chat template beside them."""
    save_plain.write_tokenizer(folder, opened.tokenizer, opened.path, opened.template)
