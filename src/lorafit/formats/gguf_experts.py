"""What a GGUF file with experts holds in transformers' terms: stacks, joined tensors, fields of the configuration.

    blk.3.ffn_gate_exps.weight, blk.3.ffn_up_exps.weight    mlp.experts.gate_up_proj, by parts
    blk.3.ffn_gate_exps.bias, blk.3.ffn_up_exps.bias        mlp.experts.gate_up_proj_bias, joined (gpt-oss)
    blk.3.attn_k_b.weight, blk.3.attn_v_b.weight            self_attn.kv_b_proj.weight, joined, the first transposed

Rows of experts are used as they lie; what is joined has to be unpacked. Sources: llama.cpp's loaders and conversions of
`qwen3moe`, `llama`, `gpt-oss`, `llama4`, `deepseek2`, `mistral4`, `qwen2moe`, `olmoe`, `granitemoe`, `qwen3next`,
`qwen35moe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafit.errors import ModelError
from lorafit.formats import place
from lorafit.formats.gguf import GgufFile
from lorafit.formats.names import ROPE_FACTORS, Entry, count, family_of, fault
from lorafit.formats.stacks import Stack, stack
from lorafit.kernels.ops import Stored

SOFTMAX, SIGMOID = 1, 2  # of llama.cpp's gating functions
LLAMA4_CHUNK, LLAMA4_NO_ROPE, LLAMA4_LARGE = 8192, 4, 128  # the last: experts of Maverick, which norms no heads
YARN = ("yarn_beta_fast", "yarn_beta_slow", "yarn_log_multiplier", "yarn_attn_factor", "yarn_ext_factor")


@dataclass(frozen=True)
class Joined:
    """A parameter that the file has in two tensors, behind Entry's face; no bytes of the file are all of it."""

    first: Entry
    second: Entry
    shape: tuple[int, ...]
    alternate: bool = False
    """The two are interleaved in the last dimension, not one behind the other."""
    heads: int = 0
    """Of kv_b: rows of each head come from `first`, transposed, and from `second`. 0: a bias."""

    @property
    def tensor(self) -> str:
        """The GGUF name that stands for both."""
        return self.first.tensor

    def matrix(self, gguf: GgufFile) -> Stored | None:
        """None: it can only be loaded."""
        return None

    def load(self, gguf: GgufFile) -> Tensor:
        """The parameter, fp32, in its shape."""
        first, second = self.first.load(gguf), self.second.load(gguf)
        if self.heads:
            return torch.cat([first.transpose(1, 2), second], dim=1).reshape(self.shape)
        return torch.stack([first, second], -1).flatten(-2) if self.alternate else torch.cat([first, second], -1)


def join(entries: Mapping[str, Entry], alternate: bool, path: Path) -> dict[str, Entry | Joined]:
    """The entries with those that transformers has as one put together, but for the stacks of experts.

    alternate: gate's and up's biases take turns. Raises ModelError, of the file `path`, where one of two is missing or
    they do not fit.
    """
    found: dict[str, Entry | Joined] = dict(entries)
    for name, entry in entries.items():
        if name.endswith(".experts.gate_proj_bias"):
            other = _partner(path, entries, entry, name.replace(".gate_proj_bias", ".up_proj_bias"))
            shape = (*entry.shape[:-1], entry.shape[-1] + other.shape[-1])
            del found[name], found[name.replace(".gate_proj_bias", ".up_proj_bias")]
            whole = name.replace(".gate_proj_bias", ".gate_up_proj_bias")
            found[whole] = Joined(entry, other, shape, alternate)
        elif name.endswith(".k_b_proj.weight"):
            value = name.replace(".k_b_proj", ".v_b_proj")
            other = _partner(path, entries, entry, value)
            if len(entry.shape) != 3 or entry.shape[::2] != (other.shape[0], entry.shape[2]):
                raise _misshaped(path, entry, f" beside {list(other.shape)}")
            heads, rank, rows = entry.shape
            if other.shape[2] != rank:
                raise _misshaped(path, other, f", not columns of {rank}")
            del found[name], found[value]
            shape = (heads * (rows + other.shape[1]), rank)
            found[name.replace(".k_b_proj", ".kv_b_proj")] = Joined(entry, other, shape, heads=heads)
    return found


def _partner(path: Path, entries: Mapping[str, Entry], entry: Entry, name: str) -> Entry:
    if name not in entries:
        raise ModelError(place(path, entry.tensor), f"stands without {name}", "the file is incomplete")
    return entries[name]


def _misshaped(path: Path, entry: Entry, what: str) -> ModelError:
    return ModelError(place(path, entry.tensor), f"has shape {list(entry.shape)}{what}", "convert the model again")


def stacks_of(gguf: GgufFile, entries: Mapping[str, Entry | Joined]) -> dict[str, Stack]:
    """The stacks of experts, by their parameter's name. Raises ModelError where gate and up do not fit."""
    alternate = family_of(gguf).gates_alternate
    found: dict[str, Stack] = {}
    shapes = {name: entry.shape for name, entry in entries.items()}
    for name, entry in entries.items():
        if name.endswith(".experts.down_proj"):
            gate, up = (name.replace(".down_proj", f".{part}_proj") for part in ("gate", "up"))
            whole = name.replace(".down_proj", ".gate_up_proj")
            if whole in entries:
                found |= {one: stack([[one]], shapes, entry.shape[0]) for one in (whole, name)}
                continue
            for part in (gate, up):
                if part not in shapes:
                    raise fault(gguf, entry.tensor, f"stands without {part}", "the file is incomplete")
            if not len(entry.shape) == 3 or shapes[gate] != shapes[up] or len(shapes[gate]) != 3:
                raise fault(gguf, entry.tensor, f"has shape {list(entry.shape)} beside {list(shapes[gate])}")
            experts = entry.shape[0]
            found[whole] = stack([[gate], [up]], shapes, experts, interleaved=alternate)
            found[name] = stack([[name]], shapes, experts)
    return found


def shapes_of(
    gguf: GgufFile, entries: Mapping[str, Entry | Joined], stacks: Mapping[str, Stack]
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """The shape of every parameter as transformers has it."""
    parts = {name for stack in stacks.values() for part in stack.parts for name in part.names}
    last = family_of(gguf).experts_last
    whole = {name: (one.shape[0], one.shape[2], one.shape[1]) if last else one.shape for name, one in stacks.items()}
    return {name: entry.shape for name, entry in entries.items() if name not in parts} | whole


def with_experts(gguf: GgufFile, architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with what the file says of experts, and of the rest of these families."""
    own = {"qwen3_moe": _qwen3, "mixtral": _mixtral, "gpt_oss": _gpt_oss, "llama4_text": _llama4}
    own |= {"deepseek_v3": _deepseek, "qwen2_moe": _qwen2, "olmoe": _olmoe, "granitemoe": _granite}
    own |= {"mistral4": _mistral4, "qwen3_next": _qwen3_next, "qwen3_5_moe_text": _qwen35}
    kind = config["model_type"]
    return config if kind not in own else config | own[kind](gguf, f"{architecture}.{{}}".format, config)


def _counts(gguf: GgufFile, key: Any, experts: str = "num_local_experts") -> dict[str, Any]:
    """How many experts there are, and how many a token passes; experts: the field's name for the first."""
    return {experts: count(gguf, key("expert_count")), "num_experts_per_tok": count(gguf, key("expert_used_count"))}


def _qwen3(gguf: GgufFile, key: Any, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_counts(gguf, key, "num_experts"),
        "moe_intermediate_size": count(gguf, key("expert_feed_forward_length")),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    }


def _qwen2(gguf: GgufFile, key: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Scores of the chosen experts do not sum to one in llama.cpp's; a shared expert stands beside them."""
    return _qwen3(gguf, key, config) | {
        "shared_expert_intermediate_size": count(gguf, key("expert_shared_feed_forward_length")),
        "norm_topk_prob": False,
        "qkv_bias": config["attention_bias"],
    }


def _qwen35(gguf: GgufFile, key: Any, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_counts(gguf, key, "num_experts"),
        "moe_intermediate_size": count(gguf, key("expert_feed_forward_length")),
        "shared_expert_intermediate_size": count(gguf, key("expert_shared_feed_forward_length")),
    }


def _qwen3_next(gguf: GgufFile, key: Any, config: dict[str, Any]) -> dict[str, Any]:
    return _qwen3(gguf, key, config) | _qwen35(gguf, key, config)


def _olmoe(gguf: GgufFile, key: Any, config: dict[str, Any]) -> dict[str, Any]:
    return {**_counts(gguf, key, "num_experts"), "norm_topk_prob": False}


def _granite(gguf: GgufFile, key: Any, config: dict[str, Any]) -> dict[str, Any]:
    return _counts(gguf, key)


def _mixtral(gguf: GgufFile, key: Any, config: dict[str, Any]) -> dict[str, Any]:
    return {**_counts(gguf, key), "sliding_window": None}


def _gpt_oss(gguf: GgufFile, key: Any, config: dict[str, Any]) -> dict[str, Any]:
    """transformers' gpt-oss does not round the bounds of its rotary scaling; llama.cpp cannot say it."""
    rope = config["rope_parameters"]
    return {
        **_counts(gguf, key),
        "intermediate_size": count(gguf, key("expert_feed_forward_length")),
        "sliding_window": count(gguf, key("attention.sliding_window")),
        "rope_parameters": {**rope, "truncate": False} if rope["rope_type"] == "yarn" else rope,
    }


def _llama4(gguf: GgufFile, key: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Chunks, layers without rotation and temperature are what llama.cpp has for them; heads are normed but in the
    largest model."""
    experts = count(gguf, key("expert_count"))
    if key("attention.sliding_window") in gguf.metadata:
        raise fault(
            gguf, key("attention.sliding_window"), "another attention is not supported yet", "use another model"
        )
    rope = config["rope_parameters"]
    if ROPE_FACTORS in gguf.tensors:
        rope = _stepped_rope(gguf, rope, config["head_dim"])
    return {
        "num_local_experts": experts,
        "num_experts_per_tok": count(gguf, key("expert_used_count")),
        "intermediate_size": count(gguf, key("expert_feed_forward_length")),
        "intermediate_size_mlp": config["intermediate_size"],
        "interleave_moe_layer_step": count(gguf, key("interleave_moe_layer_step")),
        "use_qk_norm": experts != LLAMA4_LARGE,
        "no_rope_layer_interval": LLAMA4_NO_ROPE,
        "attention_chunk_size": LLAMA4_CHUNK,
        "rope_parameters": rope,
    }


def _stepped_rope(gguf: GgufFile, rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Llama 4 Scout's scaling: waves longer than the context it was first trained on are divided by a factor, others
    not at all, so that both bounds of Llama 3's rule are 1."""
    tensor = gguf.tensors[ROPE_FACTORS]
    if tensor.type.name != "F32" or tensor.shape != (head_dim // 2,):
        raise fault(gguf, ROPE_FACTORS, f"has type {tensor.type.name} and shape {list(tensor.shape)}")
    stored = tensor.data[0].view("<f4")
    factor = float(stored.max(initial=1.0))
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    if not np.allclose(stored, np.where(waves > LLAMA4_CHUNK, factor, 1.0), rtol=1e-4):
        what = "is not the rotary scaling of Llama 4, the only table that is supported here"
        raise fault(gguf, ROPE_FACTORS, what, "use another model")
    bounds = {"low_freq_factor": 1.0, "high_freq_factor": 1.0, "original_max_position_embeddings": LLAMA4_CHUNK}
    return {"rope_type": "llama3", "rope_theta": rope["rope_theta"], "factor": factor, **bounds}


def _deepseek(gguf: GgufFile, key: Any, config: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek-V3, which chooses experts by sigmoids; Mistral Large 3, whose queries grow with their position, is
    llama.cpp's `deepseek2` too."""
    if key("attention.temperature_scale") in gguf.metadata:
        return {"model_type": "mistral4", **_mistral4(gguf, key, config)}
    if gguf.value(key("expert_gating_func"), int, SOFTMAX) != SIGMOID:
        what = "is not sigmoid: DeepSeek-V2 is not supported yet"
        raise fault(gguf, key("expert_gating_func"), what, "use DeepSeek-V3 or a model of its kind")
    rope, scale = config["rope_parameters"], _scale(gguf, key)
    return {
        **_latent(gguf, key, config),
        "rope_parameters": rope if scale is None else {**rope, "mscale": scale, "mscale_all_dim": scale},
    }


def _mistral4(gguf: GgufFile, key: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Experts by softmax, and queries that grow with the logarithm of their position: by nothing where a file does not
    say by how much, as llama.cpp's converter of Mistral Small 4 leaves it out."""
    if gguf.value(key("expert_gating_func"), int, SOFTMAX) != SOFTMAX:
        raise fault(gguf, key("expert_gating_func"), "is not softmax", "use another model")
    rope, every = config["rope_parameters"], _scale(gguf, key)
    if rope["rope_type"] != "yarn":
        what = f"is {rope['rope_type']!r}, and Mistral 4's is yarn"
        raise fault(gguf, key("rope.scaling.type"), what, "use another model")
    growth, length = gguf.value(key("attention.temperature_scale"), float, 0.0), key("attention.temperature_length")
    first = rope["original_max_position_embeddings"]
    if growth and gguf.value(length, int, first) != first:
        raise fault(gguf, length, f"is {gguf.metadata[length]}, not the first context's {first}", "use another model")
    latent = _latent(gguf, key, config)
    width = latent["qk_rope_head_dim"] + latent["qk_nope_head_dim"]
    return {
        **latent,
        "head_dim": width,
        "rope_parameters": {
            **rope,
            "mscale": 1.0,
            "mscale_all_dim": every or 0.0,
            "llama_4_scaling_beta": float(str(np.float32(growth))),
            "partial_rotary_factor": latent["qk_rope_head_dim"] / width,
        },
    }


def _scale(gguf: GgufFile, key: Any) -> float | None:
    """mscale_all_dim, of which the file has a tenth."""
    name = key("rope.scaling.yarn_log_multiplier")
    return float(str(np.float32(10 * gguf.value(name, float)))) if name in gguf.metadata else None


def _latent(gguf: GgufFile, key: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Latent attention: keys of a head are `key_length_mla` wide, `rope.dimension_count` of them rotated."""
    rotated = count(gguf, key("rope.dimension_count"))
    width = count(gguf, key("attention.key_length_mla"))
    if width <= rotated:
        raise fault(gguf, key("attention.key_length_mla"), f"is {width}, of which {rotated} are rotated")
    q_rank = key("attention.q_lora_rank")
    return {
        **_counts(gguf, key, "n_routed_experts"),
        "n_shared_experts": count(gguf, key("expert_shared_count")),
        "moe_intermediate_size": count(gguf, key("expert_feed_forward_length")),
        "first_k_dense_replace": gguf.value(key("leading_dense_block_count"), int, 0),
        "n_group": count(gguf, key("expert_group_count"), 1),
        "topk_group": count(gguf, key("expert_group_used_count"), 1),
        "routed_scaling_factor": gguf.value(key("expert_weights_scale"), float, 1.0),
        "norm_topk_prob": gguf.value(key("expert_weights_norm"), bool, False),
        "q_lora_rank": count(gguf, q_rank) if q_rank in gguf.metadata else None,
        "kv_lora_rank": count(gguf, key("attention.kv_lora_rank")),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": width - rotated,
        "v_head_dim": count(gguf, key("attention.value_length_mla")),
        "num_key_value_heads": config["num_attention_heads"],
        "rope_interleave": True,
        "head_dim": rotated,
    }
