"""Gemma 4 as llama.cpp's converter writes it: its keys, its names, and the table of rotary divisors, anew."""

from __future__ import annotations

from typing import Any

import numpy as np

RENAMED = {  # what gguf-py's table of names knows, the scales under the names of what they scale
    ".layer_scalar": ".layer_scalar.weight",
    ".router.scale": ".router.proj.scale",
    ".router.per_expert_scale": ".experts.down_proj.scale",
}


def gemma4_name(name: str) -> str:
    """The name that gguf-py's table knows for this parameter."""
    end = next((end for end in RENAMED if name.endswith(end)), "")
    return name.removesuffix(end) + RENAMED.get(end, "")


def gemma4_metadata(config: Any) -> dict[str, Any]:
    """The keys, without the architecture; arrays where layers differ."""
    layers = config.num_hidden_layers
    own = layers - config.num_kv_shared_layers
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    full, sliding = (config.per_layer_config[slides.index(kind)] for kind in (False, True))
    kv = sliding.num_key_value_heads
    ropes, width = config.rope_parameters, config.intermediate_size
    found = {
        "block_count": layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": width,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": kv,
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.key_length_swa": sliding.head_dim,
        "attention.value_length_swa": sliding.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": slides,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input or 0,
        "rope.freq_base": float(ropes["full_attention"]["rope_theta"]),
        "rope.freq_base_swa": float(ropes["sliding_attention"]["rope_theta"]),
        "rope.dimension_count": full.head_dim,
        "rope.dimension_count_swa": sliding.head_dim,
    }
    if full.num_key_value_heads != kv:
        found["attention.head_count_kv"] = [kv if one else full.num_key_value_heads for one in slides]
    if config.use_double_wide_mlp:
        found["feed_forward_length"] = [width if layer < own else 2 * width for layer in range(layers)]
    if config.final_logit_softcapping:
        found["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if config.enable_moe_block:
        found |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.top_k_experts,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    return found


def gemma4_table(config: Any) -> np.ndarray:
    """`rope_freqs.weight`: one for each frequency of full attention that rotates, 1e30 for the rest."""
    width = config.per_layer_config[config.layer_types.index("full_attention")].head_dim
    rotated = int(width * config.rope_parameters["full_attention"]["partial_rotary_factor"] / 2)
    return np.array([1.0] * rotated + [1e30] * (width // 2 - rotated), np.float32)
