"""Tiny models through GGUF files: written by gguf-py, read by lorafit, built and filled again by the plainest code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from builders.architectures import tiny, tiny_wrapper
from builders.gguf_experts import ARCHITECTURES as MIXTURES
from builders.gguf_experts import write_moe_gguf
from builders.gguf_files import ARCHITECTURES, write_tiny_gguf
from builders.models import OWN, YARN, tiny_model
from builders.tokenizers_tiny import VOCABULARY, tiny_gguf_metadata
from lorafit.formats.gguf import GgufFile, read_gguf
from lorafit.formats.gguf_config import hf_config
from lorafit.formats.gguf_linear import arrange
from lorafit.formats.names import entries

GGUF_FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
LATENT = ("deepseek_v3", "mistral4")  # whose attention takes no adapter in llama.cpp
FAMILIES = (
    "llama", "qwen3", "gemma3_text", "ministral3", "qwen2", "mistral", "smollm3", "granite", "qwen3_5_text", "phi3",
    "olmo2", "olmo3", "qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "granitemoe", "llama4_text", "qwen3_5_moe_text",
    "qwen3_next", "gpt_oss", "gemma4_text", *LATENT,
)  # fmt: skip
"""What GGUF knows, and is exported to."""
OLMO3_ROPE = {
    "full_attention": {key: value for key, value in YARN.items() if "mscale" not in key and "llama_4" not in key},
    "sliding_attention": {"rope_type": "default", "rope_theta": YARN["rope_theta"]},
}
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


def tiny_of(family: str, **changes: Any) -> PreTrainedModel:
    """A tiny model as llama.cpp has it, which has its own windows, chunks, key heads, layers without rotation."""
    own = {
        "llama4_text": {"attention_chunk_size": 8192, "floor_scale": 8192},
        "mistral": {"sliding_window": None},
        "olmo3": {"rope_parameters": OLMO3_ROPE},
        "olmoe": {"num_key_value_heads": 4},
        "phi3": {"sliding_window": None},
        "smollm3": {"num_hidden_layers": 4, "no_rope_layers": None},
    }
    make = tiny_model if family in OWN and family != "llama4_text" else tiny
    return weaker(make(family, **own.get(family, {}), **changes))


def wrapper_of(name: str) -> PreTrainedModel:
    """A tiny multimodal model, likewise."""
    own = {
        "llama4": {"attention_chunk_size": 8192, "floor_scale": 8192},
        "mistral3-mistral": {"sliding_window": None},
    }
    return weaker(tiny_wrapper(name, vocab_size=VOCABULARY, **own.get(name, {})))


def weaker(model: PreTrainedModel) -> PreTrainedModel:
    """The same with weaker decays in linear attention: the logarithms of transformers' first ones add up to hundreds
    within a chunk, and their fp32 sums would be the largest error by far (docs/export.md)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".A_log"):
                parameter.sub_(4)
    return model


def written(model: PreTrainedModel, path: Path, arch: str = "") -> Path:
    """The model as a GGUF file, by the builder of its family; arch: another one that says it too."""
    kind = model.config.model_type
    if kind in MIXTURES:
        return write_moe_gguf(path, model, arch=arch)
    return write_tiny_gguf(path, model, arch or ARCHITECTURES[kind], tiny_gguf_metadata())
