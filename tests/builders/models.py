"""Tiny random models of each supported family, as transformers makes them and as Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from builders.tokenizers_tiny import write_tiny_folder
from lorafit.model.load import Base, load_base
from lorafit.model.sources import open_source

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "granite", "smollm3")
COMMON = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN = {
    "llama": {},
    "mistral": {"sliding_window": 6, "head_dim": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 3.0,
    },
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 0},
}


def tiny_model(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """transformers' own model, fp32, random weights with enough spread that mistakes show."""
    config = AutoConfig.for_model(family, **{**COMMON, **OWN[family], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.1 if "norm" in name else 0.3
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


def save_folder(model: PreTrainedModel, folder: Path) -> Path:
    """The model as a Hugging Face folder with the tiny tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    write_tiny_folder(folder)
    return folder


def frozen(model: PreTrainedModel, folder: Path) -> Base:
    """Our frozen fp32 model with the same weights, through a folder on disk."""
    source = open_source(save_folder(model, folder))
    return load_base(source, source.tokenizer(None), "fp32", "fp32")
