"""Tiny models through GGUF files: written by gguf-py, read by lorafit, built and filled again by the plainest code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from builders.gguf_files import ARCHITECTURES, write_tiny_gguf
from builders.tokenizers_tiny import tiny_gguf_metadata
from lorafit.formats.gguf import GgufFile, read_gguf
from lorafit.formats.gguf_config import hf_config
from lorafit.formats.gguf_linear import arrange
from lorafit.formats.names import entries

GGUF_FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
IDS = torch.tensor([[1, 7, 300, 5, 9, 301, 2, 11, 4]])


def as_gguf(model: PreTrainedModel, folder: Path, tensor_type: str = "F32", **metadata: Any) -> GgufFile:
    """The model through a GGUF file; metadata: keys to add or change."""
    arch = ARCHITECTURES[model.config.model_type]
    keys = {**tiny_gguf_metadata(), "tokenizer.ggml.padding_token_id": 0, **metadata}
    return read_gguf(write_tiny_gguf(folder / "model.gguf", model, arch, keys, tensor_type))


def from_gguf(file: GgufFile) -> PreTrainedModel:
    """transformers' model, built and filled from the file."""
    config = AutoConfig.for_model(**hf_config(file))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    state = {name: entry.load(file) for name, entry in arrange(entries(file), hf_config(file), file.path).items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model
