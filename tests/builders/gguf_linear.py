"""Linear attention as llama.cpp's converter writes it: the forward changes, anew, on plain arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

KINDS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
ROUNDED = ("A_log", "norm.weight")  # in fp32, by the exponential and by the one that is added
PER_HEAD = ("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias")


def converted(name: str, values: np.ndarray, config: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that the converter makes of this parameter, under the names that gguf-py's table knows."""
    if config.model_type not in KINDS:
        yield name, values
        return
    keys, width = config.linear_num_key_heads, config.linear_value_head_dim
    each = config.linear_num_value_heads // keys
    start = 2 * keys * config.linear_key_head_dim
    own = name.rpartition("linear_attn.")[2]

    def tiled(heads: np.ndarray, of: int) -> np.ndarray:
        """Rows of heads (key head, its value heads) as rows of (value head, key heads)."""
        return np.concatenate([heads[(key * each + value) * of :][:of] for value in range(each) for key in range(keys)])

    if own == "conv1d.weight":
        values = values[:, 0]
    if config.model_type != "qwen3_next" and ".linear_attn." in name:
        if own in PER_HEAD:
            values = tiled(values, 1)
        elif own == "in_proj_z.weight":
            values = tiled(values, width)
        elif own in ("in_proj_qkv.weight", "conv1d.weight"):
            values = np.concatenate([values[:start], tiled(values[start:], width)])
        elif own == "out_proj.weight":
            values = np.ascontiguousarray(tiled(values.T, width).T)
    if own == "A_log":
        values = -np.exp(values)
    elif own == "dt_bias":
        name = name.replace("dt_bias", "dt_proj.bias")
    elif name.endswith("norm.weight") and own != "norm.weight":
        values = values + np.float32(1)
    if own == "in_proj_qkvz.weight":
        sizes = np.cumsum([config.linear_key_head_dim] * 2 + [each * width])
        parts = [np.split(head, sizes) for head in np.split(values, keys)]
        q, k, v, z = (np.concatenate([part[n] for part in parts]) for n in range(4))
        yield name.replace("in_proj_qkvz", "in_proj_qkv"), np.concatenate([q, k, v])
        yield name.replace("in_proj_qkvz", "in_proj_z"), z
    else:
        yield name, values


def linear_metadata(config: Any) -> dict[str, Any]:
    """The keys, without the architecture, of these families; none of others."""
    if config.model_type not in KINDS:
        return {}
    rope = config.rope_parameters
    found = {
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        "full_attention_interval": 4,
        "rope.dimension_count": int(config.head_dim * rope["partial_rotary_factor"]),
    }
    if config.model_type != "qwen3_next":
        found["rope.dimension_sections"] = [*rope["mrope_section"], 0]
    return found
