"""Tiny random models of each supported family, as transformers makes them and as Hugging Face folders."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from builders.tokenizers_tiny import write_tiny_folder
from lorafit.model.architectures import IMAGE_TEXT
from lorafit.model.load import Base, load_base
from lorafit.model.sources import open_source

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "granite", "smollm3")
MOE_FAMILIES = (
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe_text",
    "mixtral",
    "mistral4",
    "deepseek_v3",
    "gpt_oss",
    "gemma4_text",
    "llama4_text",
    "qwen2_moe",
    "olmoe",
    "granitemoe",
)
LINEAR = {  # four layers, of which the last has full attention
    "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MROPE = {
    "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_interleaved": True,
    "mrope_section": [1, 1, 0],
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
SHARED = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
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
    "ministral3": {"head_dim": 8, "rope_parameters": YARN},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "qwen3_next": {**LINEAR, **SHARED},
    "qwen3_5_text": {**LINEAR, "rope_parameters": MROPE},
    "qwen3_5_moe_text": {**LINEAR, **SHARED, "rope_parameters": MROPE},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "mistral4": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "rope_parameters": YARN,
    },
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "final_logit_softcapping": 3.0,
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "llama4_text": {
        "head_dim": 8,
        "intermediate_size_mlp": 40,
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 32,
        "no_rope_layers": [1, 0],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "qwen2_moe": {**SHARED, "decoder_sparse_step": 1},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 2, "logits_scaling": 4.0, "residual_multiplier": 0.5},
}


def tiny_model(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """transformers' own model, fp32, random weights with enough spread that mistakes show."""
    config = AutoConfig.for_model(family, **copy.deepcopy({**COMMON, **OWN[family], **changes}))
    maker = AutoModelForImageTextToText if family in IMAGE_TEXT else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = maker.from_config(config, attn_implementation="eager").float().eval()
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
