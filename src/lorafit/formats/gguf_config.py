"""A GGUF file's metadata as the fields of a transformers configuration.

What a file leaves out has the value that llama.cpp takes for it; what would make another model than the file means is
refused. Sources: llama.cpp's loader and its conversion of each family, for defaults; transformers' configurations.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lorafit.formats.gguf import GgufFile
from lorafit.formats.gguf_experts import YARN, with_experts
from lorafit.formats.gguf_gemma4 import with_gemma4
from lorafit.formats.gguf_linear import with_linear
from lorafit.formats.names import (
    ROPE_FACTORS,
    architecture_of,
    count,
    counts,
    family_of,
    fault,
    layer_count,
    positive,
)

LATENT_ATTENTION = ("deepseek2", "mistral4")
LINEAR_ATTENTION = ("qwen3next", "qwen35", "qwen35moe")
OWN_WIDTHS = (*LINEAR_ATTENTION, "gemma4")  # whose heads need not share the model's width out
VARYING = ("gemma4",)  # families with layers of several shapes
UNSUPPORTED = "use another model"
TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
MAX_CONTEXT = 1 << 31  # tokens
GEMMA3_27B_LAYERS = 62  # llama.cpp knows this size by its layers: its queries are scaled by the model's width
NO_ROPE_EVERY = 4  # layers of SmolLM 3 between those without rotation, as llama.cpp has it
LLAMA3_CONTEXT, LLAMA3_LOW, LLAMA3_HIGH = 8192, 1.0, 4.0  # the same in every model of the Llama 3 series


def hf_config(gguf: GgufFile) -> dict[str, Any]:
    """The fields of the transformers configuration, `model_type` among them, from the file's metadata.

    Raises ModelError for a key that is missing, of the wrong type, impossible, or not supported.
    """
    architecture = architecture_of(gguf)
    key = f"{architecture}.{{}}".format
    if "token_embd.weight" not in gguf.tensors:
        raise fault(gguf, "token_embd.weight", "is missing", "the file holds no whole model")
    layers, hidden = layer_count(gguf, architecture), count(gguf, key("embedding_length"))
    heads = _of_all(gguf, key("attention.head_count"), layers)
    kv_heads = _of_all(gguf, key("attention.head_count_kv"), layers, heads)
    for name, total, parts in (("head_count", hidden, heads), ("head_count_kv", heads, kv_heads)):
        if total % parts and not (name == "head_count" and architecture in OWN_WIDTHS):
            raise fault(gguf, key(f"attention.{name}"), f"is {parts}, which does not divide {total}")
    head_dim, vocabulary = _head_dim(gguf, hidden // heads), gguf.tensors["token_embd.weight"].shape[0]
    config: dict[str, Any] = {
        "model_type": family_of(gguf).model_type,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": _of_all(gguf, key("feed_forward_length"), layers, _no_dense_layers(gguf, architecture)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": count(gguf, key("context_length"), most=MAX_CONTEXT),
        "rms_norm_eps": positive(gguf, key("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(gguf, architecture, head_dim),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        **{f"{token}_token_id": _token(gguf, name, vocabulary) for token, name in TOKENS.items()},
    }
    if architecture != "qwen2":  # whose attention always has biases
        config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
    if architecture in ("llama", "granite", "smollm3"):
        config["mlp_bias"] = "blk.0.ffn_up.bias" in gguf.tensors
    own = {"gemma3": _gemma3, "gemma4": with_gemma4, "granite": _granite, "granitemoe": _granite,
           "mistral3": _mistral3, "olmo2": _olmo2, "phi3": _phi3,
           **dict.fromkeys(LINEAR_ATTENTION, with_linear)}.get(architecture)  # fmt: skip
    more = {"no_rope_layer_interval": NO_ROPE_EVERY} if architecture == "smollm3" else {}
    return with_experts(gguf, architecture, config | more | (own(gguf, config) if own else {}))


def _of_all(gguf: GgufFile, key: str, layers: int, default: int | None = None) -> int:
    """What all layers have, or in a family whose layers differ, the first."""
    found = counts(gguf, key, layers, default)
    if len(set(found)) > 1 and architecture_of(gguf) not in VARYING:
        raise fault(gguf, key, "differs between layers, which is not supported in this family", UNSUPPORTED)
    return found[0]


def _no_dense_layers(gguf: GgufFile, architecture: str) -> int | None:
    """What stands for the width of dense layers in a file that has none and need not say it."""
    key = f"{architecture}.expert_feed_forward_length"
    return gguf.value(key, int, None) if architecture == "qwen35moe" and key in gguf.metadata else None


def _granite(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """The factors that Granite multiplies with, and the one that it divides its logits by."""
    fields = {
        "attention_multiplier": ("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": ("embedding_scale", 1.0),
        "residual_multiplier": ("residual_scale", 1.0),
        "logits_scaling": ("logit_scale", 1.0),
    }
    prefix = architecture_of(gguf)
    return {field: positive(gguf, f"{prefix}.{key}", default) for field, (key, default) in fields.items()}


def _mistral3(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Ministral 3, whose queries grow with their position; Mistral Small 3, whose do not, is a plain Mistral."""
    scale = gguf.value("mistral3.attention.temperature_scale", float, 0.0)
    rope = config["rope_parameters"]
    if rope["rope_type"] != "yarn":
        if scale:
            key = "mistral3.attention.temperature_scale"
            raise fault(gguf, key, f"is {scale} without the rotary scaling yarn", UNSUPPORTED)
        return {"model_type": "mistral", "sliding_window": None}
    return {"sliding_window": None, "rope_parameters": {**rope, "llama_4_scaling_beta": float(str(np.float32(scale)))}}


def _olmo2(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """OLMo 3 where there is a sliding window, which every fourth layer has not if the file does not say which. Layers
    with a window rotate without scaling, in llama.cpp as in transformers."""
    window = gguf.value("olmo2.attention.sliding_window", int, 0)
    if not window:
        return {}
    layers = config["num_hidden_layers"]
    key = "olmo2.attention.sliding_window_pattern"
    slides = gguf.metadata.get(key, [(n + 1) % 4 != 0 for n in range(layers)])
    if not isinstance(slides, list) or len(slides) != layers or not all(type(one) is bool for one in slides):
        raise fault(gguf, key, f"holds no truth value for each of the {layers} layers")
    return {
        "model_type": "olmo3",
        "sliding_window": count(gguf, "olmo2.attention.sliding_window"),
        "layer_types": ["sliding_attention" if one else "full_attention" for one in slides],
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]},
        },
    }


def _phi3(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Phi 3 and 4: a window of 0 is none, and a head may be rotated in part."""
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if name in gguf.tensors:
            raise fault(gguf, name, "rotary scaling by tables is not supported yet", UNSUPPORTED)
    share = gguf.value("phi3.rope.dimension_count", int, config["head_dim"]) / config["head_dim"]
    rope = {**config["rope_parameters"], "partial_rotary_factor": share}
    return {
        "sliding_window": gguf.value("phi3.attention.sliding_window", int, 0) or None,
        "rope_parameters": rope,
        "original_max_position_embeddings": count(
            gguf, "phi3.rope.scaling.original_context_length", config["max_position_embeddings"], MAX_CONTEXT
        ),
    }


def _gemma3(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    period = count(gguf, "gemma3.attention.sliding_window_pattern", 6)
    local = {"rope_type": "default", "rope_theta": positive(gguf, "gemma3.rope.freq_base_swa", 10000.0)}
    softcap = "gemma3.final_logit_softcapping"
    return {
        "sliding_window": count(gguf, "gemma3.attention.sliding_window"),
        "layer_types": ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)],
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
        "query_pre_attn_scalar": config["hidden_size"] // heads if layers == GEMMA3_27B_LAYERS else config["head_dim"],
        "final_logit_softcapping": positive(gguf, softcap) if softcap in gguf.metadata else None,
    }


def _token(gguf: GgufFile, name: str, vocabulary: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in gguf.metadata:
        return None
    value = gguf.value(key, int)
    if not 0 <= value < vocabulary:
        raise fault(gguf, key, f"is {value}, and the vocabulary has {vocabulary} tokens")
    return value


def _head_dim(gguf: GgufFile, usual: int) -> int:
    """Features of a head; queries, keys and values must have the same number, all of them rotated."""
    architecture = gguf.metadata["general.architecture"]
    if architecture in LATENT_ATTENTION:  # the part that is rotated; the rest of its heads is another matter
        return count(gguf, f"{architecture}.rope.dimension_count")
    head_dim = count(gguf, f"{architecture}.attention.key_length", usual)
    partly = ("rope.dimension_count",) if architecture not in ("phi3", *LINEAR_ATTENTION) else ()
    for name in ("attention.value_length", *partly):
        value = count(gguf, f"{architecture}.{name}", head_dim)
        if value != head_dim:
            what = f"is {value} where a key has {head_dim} features, which is not supported yet"
            raise fault(gguf, f"{architecture}.{name}", what, UNSUPPORTED)
    if head_dim % 2:
        raise fault(gguf, f"{architecture}.attention.key_length", f"is {head_dim}, which is odd")
    return head_dim


def _rope(gguf: GgufFile, architecture: str, head_dim: int) -> dict[str, Any]:
    """transformers' `rope_parameters`."""
    prefix = f"{architecture}.rope."
    theta = positive(gguf, f"{prefix}freq_base", 10000.0)
    kind = gguf.value(f"{prefix}scaling.type", str, "linear")
    factor = positive(gguf, f"{prefix}scaling.factor", 1.0)
    known: tuple[str, ...] = ("type", "factor", "original_context_length", "finetuned")
    if architecture in ("mistral3", "olmo2", "gpt-oss", *LATENT_ATTENTION):  # their converters write all of it
        known += YARN
    read = {f"{prefix}scaling.{name}" for name in known}
    other = sorted(key for key in gguf.metadata if key.startswith(f"{prefix}scal") and key not in read)
    if other and kind != "none":
        raise fault(gguf, other[0], "this part of rotary scaling is not supported yet", UNSUPPORTED)
    if kind == "none" or (kind == "linear" and factor == 1):
        if architecture == "llama" and ROPE_FACTORS in gguf.tensors:
            return _llama3_rope(gguf, theta, head_dim)
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn") or ROPE_FACTORS in gguf.tensors:
        what = f"rotary scaling {kind[:40]!r} is not supported yet"
        raise fault(gguf, f"{prefix}scaling.type", what, UNSUPPORTED)
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        key = f"{prefix}scaling.original_context_length"
        rope["original_max_position_embeddings"] = count(gguf, key, most=MAX_CONTEXT)
        fields = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}
        for field, name in fields.items():
            if f"{prefix}scaling.{name}" in gguf.metadata:
                rope[field] = positive(gguf, f"{prefix}scaling.{name}")
        if f"{prefix}scaling.yarn_log_multiplier" in gguf.metadata:
            every = gguf.value(f"{prefix}scaling.yarn_log_multiplier", float)
            rope |= {"mscale": 1.0, "mscale_all_dim": float(str(np.float32(every)))}
    return rope


def _llama3_rope(gguf: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling, which a file holds as the divisor of each frequency; the largest one is its factor.

    Raises ModelError when the divisors are not those that the factor gives.
    """
    tensor = gguf.tensors[ROPE_FACTORS]
    if tensor.type.name != "F32" or tensor.shape != (head_dim // 2,):
        what = f"has type {tensor.type.name} and shape {list(tensor.shape)}, not F32 and [{head_dim // 2}]"
        raise fault(gguf, ROPE_FACTORS, what)
    stored = tensor.data[0].view("<f4")
    factor = float(stored.max(initial=1.0))
    turns = LLAMA3_CONTEXT * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = ((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)).clip(0, 1)
    if not np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        what = "is not the rotary scaling of Llama 3, the only table that is supported yet"
        raise fault(gguf, ROPE_FACTORS, what, UNSUPPORTED)
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }
