"""Tiny random models of every architecture that we know, experts included, as transformers makes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from builders.models import COMMON, FAMILIES, LINEAR, OWN, YARN, save_folder
from builders.tokenizers_tiny import write_tiny_folder

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LATENT: dict[str, Any] = {  # multi-head latent attention, as DeepSeek-V3 has it
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: OWN[name] for name in (*FAMILIES, "ministral3", "qwen3_5_text")},
    "llama": {"rope_parameters": LLAMA3_ROPE},
    "ministral": {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 6},
    "olmo2": {},
    "olmo3": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {
        "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 16, "sliding_window": 6,
        "num_global_key_value_heads": 1, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0, "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "llama4_text": {
        "num_hidden_layers": 4, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4,
        "interleave_moe_layer_step": 2, "attention_chunk_size": 5, "floor_scale": 4, "no_rope_layer_interval": 4,
        "use_qk_norm": True, "rope_parameters": PLAIN_ROPE,
    },
    "deepseek_v3": {**LATENT, **EXPERTS, "rope_parameters": {k: YARN[k] for k in YARN if k != "llama_4_scaling_beta"}},
    "mistral4": {**LATENT, **EXPERTS, "rope_parameters": YARN},
    "qwen3_next": {
        **LINEAR, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_5_moe_text": OWN["qwen3_5_moe_text"],
}  # fmt: skip


GEMMA4 = {  # changes of gemma4_text: as its dense models, its small ones and its mixture of experts are
    "dense": {},
    "small": {
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True, "attention_k_eq_v": False,
    },
    "experts": {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 24},
}  # fmt: skip
DENSE = (
    "llama", "smollm3", "granite", "phi3", "olmo2", "olmo3", "mistral", "ministral", "ministral3", "qwen2", "qwen3",
    "qwen3_5_text", "gemma3_text", "gemma4_text",
)  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
PATCHES = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
    "num_position_embeddings": 16,
}  # fmt: skip
# A multimodal model's text part and vision tower, by its model_type, and its text part's too where one has several.
WRAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"model_type": "siglip_vision_model", **TOWER}),
    "gemma4": ("gemma4_text", {"model_type": "gemma4_vision", **TOWER, "num_key_value_heads": 2, "head_dim": 8}),
    "mistral3": ("ministral3", {"model_type": "pixtral", **TOWER}),
    "llama4": ("llama4_text", {
        "model_type": "llama4_vision_model", **TOWER, "pixel_shuffle_ratio": 0.5, "projector_input_dim": 16,
        "projector_output_dim": 16, "vision_output_dim": 16,
    }),
    "qwen3_5": ("qwen3_5_text", PATCHES),
    "qwen3_5_moe": ("qwen3_5_moe_text", PATCHES),
    "mistral3-mistral": ("mistral", {"model_type": "pixtral", **TOWER}),  # as Mistral Small 3
    "mistral3-mistral4": ("mistral4", {"model_type": "pixtral", **TOWER}),  # as Mistral Large 3
}  # fmt: skip


def tiny_wrapper(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """transformers' multimodal model, fp32, with a tower whose linear layers have the names of the text part's."""
    text, tower = WRAPPED[name]
    inner = {"model_type": text, **COMMON, **CONFIGS[text], **changes}
    if name == "gemma3":
        inner["final_logit_softcapping"] = None  # which transformers' wrapper, other than its text model, leaves out
    given = copy.deepcopy({"text_config": inner, "vision_config": tower})
    kind, tied = name.partition("-")[0], inner.get("tie_word_embeddings", False)
    config = AutoConfig.for_model(kind, **given, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    return fill(AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float().eval())


def tiny(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """transformers' own text model, fp32, eager attention, random weights with enough spread that mistakes show."""
    torch.manual_seed(seed)
    return fill(empty(name, **changes))


def empty(name: str, **changes: object) -> PreTrainedModel:
    """The same, with transformers' first weights."""
    maker = AutoModelForImageTextToText if name == "mistral4" else AutoModelForCausalLM
    config = AutoConfig.for_model(name, **copy.deepcopy({**COMMON, **CONFIGS[name], **changes}))
    return maker.from_config(config, attn_implementation="eager").float().eval()


def fill(model: PreTrainedModel) -> PreTrainedModel:
    """More spread in the weights that a model begins with."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            spread = 0.1 if "norm" in name or parameter.dim() == 1 else 0.3
            parameter.add_(torch.randn_like(parameter) * spread)
        for module in model.modules():
            if isinstance(module, nn.Module) and "layer_scalar" in module._buffers:
                module.layer_scalar.fill_(0.9)
    return model


def reference(name: str, **changes: object) -> PreTrainedModel:
    """transformers' own tiny model of this name, a text model or a multimodal one; changes: of the text part."""
    return tiny_wrapper(name, **changes) if name in WRAPPED else tiny(name, **changes)


def folder_of(name: str, folder: Path) -> Path:
    """The same as a Hugging Face folder; a multimodal one as transformers saves it."""
    model = reference(name)
    return save_wrapper(model, folder) if name in WRAPPED else save_folder(model, folder)


def save_wrapper(model: PreTrainedModel, folder: Path) -> Path:
    """A multimodal model as transformers saves it, with the tiny tokenizer."""
    model.save_pretrained(folder)
    write_tiny_folder(folder)
    return folder
