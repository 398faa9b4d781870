"""Tiny models with experts as GGUF files, as llama.cpp's converter would write them: names by gguf-py, changes anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from torch import Tensor
from transformers import PreTrainedModel

from builders.gguf_files import _add, _interleaved
from builders.gguf_gemma4 import gemma4_metadata, gemma4_name, gemma4_table
from builders.gguf_linear import KINDS as LINEAR
from builders.gguf_linear import converted, linear_metadata
from builders.stored_weights import random_weight
from builders.tokenizers_tiny import tiny_gguf_metadata

ARCHITECTURES = {
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
    "gpt_oss": "gpt-oss",
    "llama4_text": "llama4",
    "deepseek_v3": "deepseek2",
    "mistral4": "mistral4",
    "qwen2_moe": "qwen2moe",
    "olmoe": "olmoe",
    "granitemoe": "granitemoe",
    "qwen3_next": "qwen3next",
    "qwen3_5_moe_text": "qwen35moe",
    "gemma4_text": "gemma4",
}


def write_moe_gguf(
    path: Path, model: PreTrainedModel, tensor_type: str = "F32", *, fused: bool = False, arch: str = "", **changes: Any
) -> Path:
    """The model as a GGUF file with matrices of this type, where their rows divide into its blocks; else F16. In Q4_K,
    which gguf-py does not write, they hold random blocks.

    arch: another architecture than the model's own, which says it in other words. fused: gate and up in one tensor, as
    Mistral 4's always are. changes: metadata keys to change, without the architecture; None takes one away.
    """
    kind = model.config.model_type
    arch = arch or ARCHITECTURES[kind]
    fused = fused or arch == "mistral4"
    writer = GGUFWriter(path, arch)
    writer.add_type("model")
    metadata = {key: value for key, value in {**_metadata(model), **changes}.items() if value is not None}
    for key, value in ({f"{arch}.{key}": value for key, value in metadata.items()} | tiny_gguf_metadata()).items():
        _add(writer, key, value)
    (named,) = (one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(named, model.config.num_hidden_layers)
    changed = (
        (told, torch.from_numpy(array))
        for name, values in _tensors(model, fused)
        for told, array in converted(name, values.numpy(), model.config)
    )
    for name, values in changed:
        found = names.get_name(name, try_suffixes=(".weight", ".bias", ".scale"))
        assert found, f"{name} has no name in {arch}"
        array = values.contiguous().numpy()
        small = array.ndim == 1 or not found.endswith(".weight") or "ffn_gate_inp" in found or "conv1d" in found
        own = GGMLQuantizationType["F32" if small else tensor_type]
        if array.shape[-1] % gguf.GGML_QUANT_SIZES[own][0]:
            own = GGMLQuantizationType.F16
        writer.add_tensor(found, _packed(array, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _packed(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    if kind != GGMLQuantizationType.Q4_K:
        return quants.quantize(values, kind)
    rows, columns = values.size // values.shape[-1], values.shape[-1]
    data = random_weight("Q4_K", rows, columns, seed=rows + columns).data.numpy()
    return data.reshape(*values.shape[:-1], -1)


def _tensors(model: PreTrainedModel, fused: bool) -> Iterator[tuple[str, Tensor]]:
    config, kind = model.config, model.config.model_type
    last = kind in ("gpt_oss", "llama4_text")
    if kind == "gemma4_text":
        fused = True
        yield "rope_freqs.weight", torch.from_numpy(gemma4_table(config))
    for name, parameter in model.state_dict().items():
        if kind == "gemma4_text" and name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.detach().float()
        if kind == "granitemoe":  # names as they were published
            name = name.replace("block_sparse_moe.router", "block_sparse_moe.router.layer")
            name = name.replace("block_sparse_moe.experts", "mlp.experts")
        if kind in ("mixtral", "granitemoe") and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            values = torch.from_numpy(_interleaved(values.numpy(), heads))
        if fused and name.endswith(".experts.gate_up_proj"):
            yield f"{name}.weight", values
        elif name.endswith((".experts.gate_up_proj", ".experts.gate_up_proj_bias")):
            bias = name.endswith("_bias")
            if last and not bias:
                values = values.transpose(1, 2)
            parts = (values[:, ::2], values[:, 1::2]) if kind == "gpt_oss" else values.chunk(2, dim=1)
            for part, matrix in zip(parts, ("gate_proj", "up_proj"), strict=True):
                yield f"{name.rpartition('.')[0]}.{matrix}.{'bias' if bias else 'weight'}", part
        elif name.endswith(".experts.down_proj"):
            yield f"{name}.weight", values.transpose(1, 2) if last else values
        elif name.endswith(".experts.down_proj_bias"):
            yield name.replace("down_proj_bias", "down_proj.bias"), values
        elif name.endswith(".kv_b_proj.weight"):
            heads = values.view(config.num_attention_heads, -1, config.kv_lora_rank)
            key, value = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
            yield name.replace("kv_b_proj", "k_b_proj"), key.transpose(1, 2)
            yield name.replace("kv_b_proj", "v_b_proj"), value
        elif name.endswith(".sinks"):
            yield f"{name}.weight", values
        else:
            yield gemma4_name(name.replace("e_score_correction_bias", "e_score_correction.bias")), values


def _metadata(model: PreTrainedModel) -> dict[str, Any]:
    config, kind = model.config, model.config.model_type
    if kind == "gemma4_text":
        return gemma4_metadata(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "expert_count": getattr(config, "num_local_experts", None) or config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
    }
    if kind in ("qwen3_moe", "qwen2_moe", *LINEAR):
        found["expert_feed_forward_length"] = config.moe_intermediate_size
    if kind in ("qwen2_moe", *LINEAR):
        found["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    found |= linear_metadata(config)
    if kind == "granitemoe":
        found |= {
            "attention.scale": config.attention_multiplier,
            "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    if kind == "gpt_oss":
        found["expert_feed_forward_length"] = config.intermediate_size
        found["attention.sliding_window"] = config.sliding_window
    if kind == "llama4_text":
        found["expert_feed_forward_length"] = config.intermediate_size
        found["feed_forward_length"] = config.intermediate_size_mlp
        found["interleave_moe_layer_step"] = config.interleave_moe_layer_step
        found["leading_dense_block_count"] = 0
    if kind in ("deepseek_v3", "mistral4"):
        found |= _latent_metadata(config)
    return found


def _latent_metadata(config: Any) -> dict[str, Any]:
    found = {
        "attention.head_count_kv": 1,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "rope.dimension_count": config.qk_rope_head_dim,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_gating_func": 1 if config.model_type == "mistral4" else 2,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
    }
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn":
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": rope["beta_fast"],
            "rope.scaling.yarn_beta_slow": rope["beta_slow"],
            "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
        }
    if "llama_4_scaling_beta" in rope:
        found["attention.temperature_scale"] = rope["llama_4_scaling_beta"]
        found["attention.temperature_length"] = rope["original_max_position_embeddings"]
    return found
