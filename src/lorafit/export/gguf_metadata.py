"""A Hugging Face folder's configuration and tokenizer as the keys of a GGUF file.

Nothing is guessed: the file that is written is read back, and its configuration and token ids must be the folder's. The
name by which llama.cpp cuts text into words is the one of its names that cuts this tokenizer's way.
Sources: llama.cpp's conversion of each family, the GGUF specification.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorafit.errors import ModelError
from lorafit.formats.gguf_experts import SIGMOID, SOFTMAX
from lorafit.formats.gguf_gemma4 import UNUSED
from lorafit.formats.gguf_tokenizer import (
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SHOWN,
    UNKNOWN,
    USER_DEFINED,
    from_metadata,
)
from lorafit.formats.tokenizer import TextTokenizer

UNUSED_TOKEN, BYTE = 5, 6
GGML = "tokenizer.ggml."
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # of experts, by family
YARN_BOUNDS = ("mistral3", "olmo2", "gpt-oss", "deepseek2", "mistral4")  # whose bounds are read from the file here
GRANITE = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
Metadata = dict[str, tuple[Any, str]]
"""(value, type) by key."""
PROBES = (
    "The harbour was quiet at 6:45; 12 ships, 12345 people, naïve café e\u0301.\n\n\tdef f(x):\n    return x  # fin",
    "It's WE'LL they've I'm 3.14159 100,000 x=y+1 ... !!! ??? http://a.b/c?d=e&f=g",
    "東京は日本の首都です。 Привет, мир! مرحبا 안녕하세요 🚢🚢 camelCaseWord HTTPServer",
    "  two spaces   three\r\n\r\n  and\ttabs \n \n end ",
)


def model_metadata(architecture: str, config: Mapping[str, Any], name: str) -> Metadata:
    """general.* and the architecture's own keys; config: the model's, with every default in it."""
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default"}
    full = rope.get("full_attention", rope)
    keys: Metadata = {
        "block_count": (config["num_hidden_layers"], "uint32"),
        "context_length": (config.get("max_position_embeddings", 2048), "uint32"),
        "embedding_length": (config["hidden_size"], "uint32"),
        "feed_forward_length": (config.get("intermediate_size") or config["moe_intermediate_size"], "uint32"),
        "attention.head_count": (heads, "uint32"),
        "attention.head_count_kv": (kv_heads, "uint32"),
        "attention.key_length": (width, "uint32"),
        "attention.value_length": (width, "uint32"),
        "attention.layer_norm_rms_epsilon": (config.get("rms_norm_eps", 1e-6), "float32"),
        "rope.freq_base": (full.get("rope_theta", 10000.0), "float32"),
        "rope.dimension_count": (width, "uint32"),
        "vocab_size": (config["vocab_size"], "uint32"),
    }
    keys |= _scaling(architecture, full) | _experts(config) | _linear(config, rope, width)
    if architecture == "gemma3":
        keys |= _gemma3(config, rope)
    if architecture == "gemma4":
        keys |= _gemma4(config, rope)
    if architecture == "mistral3":
        keys |= _mistral3(full)
    if architecture == "llama4":
        keys |= _llama4(config)
    if architecture in ("deepseek2", "mistral4"):
        keys |= _latent(config, full)
    if architecture == "phi3":
        keys |= _phi3(config, full, width)
    if architecture in ("olmo2", "gpt-oss") and config.get("sliding_window"):
        keys["attention.sliding_window"] = (config["sliding_window"], "uint32")
    if config["model_type"] == "olmo3":
        slides = [kind == "sliding_attention" for kind in config["layer_types"]]
        keys["attention.sliding_window_pattern"] = (slides, "array of bool")
    if architecture in ("granite", "granitemoe"):
        keys |= {key: (config[field], "float32") for field, key in GRANITE.items() if field in config}
    general: Metadata = {"general.type": ("model", "string"), "general.name": (name, "string")}
    return general | {f"{architecture}.{key}": value for key, value in keys.items()}


def _scaling(architecture: str, rope: Mapping[str, Any]) -> Metadata:
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3", "proportional"):  # the last two are a tensor of the file
        return {}
    keys: Metadata = {
        "rope.scaling.type": (kind, "string"),
        "rope.scaling.factor": (rope.get("factor", 1.0), "float32"),
    }
    if kind == "yarn":
        usual = 0.1 * math.log(rope["factor"]) + 1
        if rope.get("attention_factor") and abs(rope["attention_factor"] - usual) > 1e-4:
            what = f"is {rope['attention_factor']}, and llama.cpp's is {usual:.4f}"
            raise ModelError("config.json: rope_parameters.attention_factor", what, "merge to a folder")
        if "original_max_position_embeddings" in rope:
            keys["rope.scaling.original_context_length"] = (rope["original_max_position_embeddings"], "uint32")
        if architecture in YARN_BOUNDS:
            keys["rope.scaling.yarn_beta_fast"] = (rope.get("beta_fast") or 32.0, "float32")
            keys["rope.scaling.yarn_beta_slow"] = (rope.get("beta_slow") or 1.0, "float32")
    return keys


def _mistral3(rope: Mapping[str, Any]) -> Metadata:
    """How Ministral 3's attention is scaled, and how its queries grow with their position."""
    return {
        "rope.scaling.yarn_log_multiplier": (rope.get("mscale_all_dim") or 0.0, "float32"),
        "attention.temperature_scale": (rope.get("llama_4_scaling_beta") or 0.0, "float32"),
    }


def _latent(config: Mapping[str, Any], rope: Mapping[str, Any]) -> Metadata:
    """Latent attention: llama.cpp computes it with one key head, as wide as the latent and the rotated part."""
    rank, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    keys: Metadata = {
        "attention.head_count_kv": (1, "uint32"),
        "attention.key_length": (rank + rotated, "uint32"),
        "attention.value_length": (rank, "uint32"),
        "attention.key_length_mla": (config["qk_nope_head_dim"] + rotated, "uint32"),
        "attention.value_length_mla": (config["v_head_dim"], "uint32"),
        "attention.kv_lora_rank": (rank, "uint32"),
        "rope.dimension_count": (rotated, "uint32"),
        "leading_dense_block_count": (config["first_k_dense_replace"], "uint32"),
        "expert_shared_count": (config["n_shared_experts"], "uint32"),
        "expert_weights_scale": (config["routed_scaling_factor"], "float32"),
        "expert_weights_norm": (config["norm_topk_prob"], "bool"),
        "expert_gating_func": (SOFTMAX if config["model_type"] == "mistral4" else SIGMOID, "uint32"),
        "expert_group_count": (config["n_group"], "uint32"),
        "expert_group_used_count": (config["topk_group"], "uint32"),
    }
    if config.get("q_lora_rank"):
        keys["attention.q_lora_rank"] = (config["q_lora_rank"], "uint32")
    if rope.get("mscale_all_dim"):
        keys["rope.scaling.yarn_log_multiplier"] = (0.1 * rope["mscale_all_dim"], "float32")
    if rope.get("llama_4_scaling_beta"):
        keys["attention.temperature_scale"] = (rope["llama_4_scaling_beta"], "float32")
        keys["attention.temperature_length"] = (rope["original_max_position_embeddings"], "uint32")
    return keys


def _phi3(config: Mapping[str, Any], rope: Mapping[str, Any], width: int) -> Metadata:
    """A window of 0 is none."""
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    return {
        "rope.dimension_count": (int(width * share), "uint32"),
        "rope.scaling.original_context_length": (config["original_max_position_embeddings"], "uint32"),
        "attention.sliding_window": (config.get("sliding_window") or 0, "uint32"),
    }


def _experts(config: Mapping[str, Any]) -> Metadata:
    count = next((config[field] for field in COUNTS if config.get(field)), None)
    if not count or config.get("enable_moe_block") is False:
        return {}
    keys: Metadata = {
        "expert_count": (count, "uint32"),
        "expert_used_count": (config.get("num_experts_per_tok") or config["top_k_experts"], "uint32"),
        "expert_feed_forward_length": (config.get("moe_intermediate_size") or config["intermediate_size"], "uint32"),
    }
    if config.get("shared_expert_intermediate_size"):
        keys["expert_shared_feed_forward_length"] = (config["shared_expert_intermediate_size"], "uint32")
    return keys


def _llama4(config: Mapping[str, Any]) -> Metadata:
    """Its experts' width is the configuration's, and dense layers have another."""
    return {
        "feed_forward_length": (config["intermediate_size_mlp"], "uint32"),
        "interleave_moe_layer_step": (config["interleave_moe_layer_step"], "uint32"),
    }


def _linear(config: Mapping[str, Any], rope: Mapping[str, Any], width: int) -> Metadata:
    """Linear attention, and the part of a head that is rotated beside it."""
    if "linear_num_key_heads" not in config:
        return {}
    values, kinds = config["linear_num_value_heads"], config.get("layer_types") or []
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.25))
    sections = rope.get("mrope_section")
    return {
        "ssm.conv_kernel": (config["linear_conv_kernel_dim"], "uint32"),
        "ssm.state_size": (config["linear_key_head_dim"], "uint32"),
        "ssm.group_count": (config["linear_num_key_heads"], "uint32"),
        "ssm.time_step_rank": (values, "uint32"),
        "ssm.inner_size": (values * config["linear_value_head_dim"], "uint32"),
        "full_attention_interval": (kinds.index("full_attention") + 1 if "full_attention" in kinds else 4, "uint32"),
        "rope.dimension_count": (int(width * share), "uint32"),
        **({"rope.dimension_sections": ([*sections, 0], "array of int32")} if sections else {}),
    }


def _gemma3(config: Mapping[str, Any], rope: Mapping[str, Any]) -> Metadata:
    kinds = config.get("layer_types") or []
    period = kinds.index("full_attention") + 1 if "full_attention" in kinds else 6
    keys: Metadata = {
        "attention.sliding_window": (config["sliding_window"], "uint32"),
        "attention.sliding_window_pattern": (period, "uint32"),
    }
    local = rope.get("sliding_attention", {}).get("rope_theta", config.get("rope_local_base_freq"))
    if local is not None:
        keys["rope.freq_base_swa"] = (local, "float32")
    if config.get("final_logit_softcapping"):
        keys["final_logit_softcapping"] = (config["final_logit_softcapping"], "float32")
    return keys


def _gemma4(config: Mapping[str, Any], rope: Mapping[str, Any]) -> Metadata:
    """Layers of two kinds; numbers that differ between them are arrays, as the converter writes them."""
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    full = config["per_layer_config"].get(str(slides.index(False)), {})  # what full attention has of its own
    heads, width, layers = config["num_key_value_heads"], config["head_dim"], len(slides)
    wide = full.get("head_dim", width)
    shared = config["num_kv_shared_layers"]
    keys: Metadata = {
        "attention.key_length": (wide, "uint32"),
        "attention.value_length": (wide, "uint32"),
        "attention.key_length_swa": (width, "uint32"),
        "attention.value_length_swa": (width, "uint32"),
        "attention.sliding_window": (config["sliding_window"], "uint32"),
        "attention.sliding_window_pattern": (slides, "array of bool"),
        "attention.shared_kv_layers": (shared, "uint32"),
        "embedding_length_per_layer_input": (config["hidden_size_per_layer_input"] or 0, "uint32"),
        "final_logit_softcapping": (config["final_logit_softcapping"] or 0.0, "float32"),  # left out, it would be 30
        "rope.freq_base_swa": (rope["sliding_attention"]["rope_theta"], "float32"),
        "rope.dimension_count": (wide, "uint32"),
        "rope.dimension_count_swa": (width, "uint32"),
    }
    if full.get("num_key_value_heads", heads) != heads:
        by_layer = [heads if one else full["num_key_value_heads"] for one in slides]
        keys["attention.head_count_kv"] = (by_layer, "array of int32")
    if config["use_double_wide_mlp"] and shared:
        own, width = layers - shared, config["intermediate_size"]
        keys["feed_forward_length"] = ([width] * own + [2 * width] * shared, "array of int32")
    return keys


def rope_factors(config: Mapping[str, Any], frequencies: np.ndarray) -> np.ndarray | None:
    """`rope_freqs.weight`: of a Llama 3 model the plain rotary frequencies over those in use, of Gemma 4 what those in
    full attention are divided by; None for others."""
    rope = config.get("rope_parameters") or {}
    if rope.get("full_attention", {}).get("rope_type") == "proportional":
        return np.where(frequencies > 0, rope["full_attention"].get("factor", 1.0), UNUSED).astype(np.float32)
    if rope.get("rope_type") != "llama3":
        return None
    plain = float(rope["rope_theta"]) ** -(np.arange(len(frequencies)) / len(frequencies))
    return (plain / frequencies).astype(np.float32)


def tokenizer_metadata(tokenizer: TextTokenizer, rows: int, template: str, architecture: str = "") -> Metadata:
    """tokenizer.* of a folder's tokenizer; rows: of the embedding; architecture: GGUF's, of which some have a kind of
    their own. Raises ModelError for one that GGUF cannot say."""
    content = json.loads(tokenizer.backend.to_str())
    if content["model"]["type"] != "BPE":
        what = f"is a {content['model']['type']} tokenizer"
        raise ModelError(f"{tokenizer.place}: tokenizer.json", what, "convert the merged folder with llama.cpp")
    byte_level = not content["model"].get("byte_fallback")
    kind = "gpt2" if byte_level else "gemma4" if architecture == "gemma4" else "llama"
    tokens, types = _tokens(tokenizer, content, rows)
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"]]
    keys: Metadata = {
        "tokenizer.ggml.model": (kind, "string"),
        "tokenizer.ggml.tokens": (tokens, "array of string"),
        "tokenizer.ggml.token_type": (types, "array of int32"),
        "tokenizer.chat_template": (template, "string"),
        "tokenizer.ggml.add_bos_token": (tokenizer.add_bos, "bool"),
    }
    for name, number in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if number is not None:
            keys[f"tokenizer.ggml.{name}_token_id"] = (number, "uint32")
    if kind != "llama":
        keys["tokenizer.ggml.merges"] = ([" ".join(pair) for pair in pairs], "array of string")
    if byte_level:
        keys["tokenizer.ggml.pre"] = ("gpt-2", "string")
        return _with_pre(tokenizer, keys)
    unknown = content["model"].get("unk_token")
    if unknown is not None:
        keys["tokenizer.ggml.unknown_token_id"] = (tokenizer.backend.token_to_id(unknown), "uint32")
    if kind == "gemma4":
        keys["tokenizer.ggml.token_type"] = (_gemma4_types(tokens, types), "array of int32")
    else:
        keys["tokenizer.ggml.scores"] = (_scores(tokens, pairs), "array of float32")
    prefixed = '"Prepend"' in json.dumps(content.get("normalizer"))
    keys["tokenizer.ggml.add_space_prefix"] = (prefixed, "bool")
    _check_ids(tokenizer, keys)
    return keys


def with_tokens(metadata: Metadata, tokenizer: TextTokenizer) -> Metadata:
    """The keys of a GGUF file's tokenizer that change when it has the tokens added since."""
    if not tokenizer.added:
        return {}
    named = [key for key in ("tokens", "token_type", "scores") if f"{GGML}{key}" in metadata]
    lists = {key: list(metadata[f"{GGML}{key}"][0]) for key in named}
    for token in tokenizer.added:
        number = int(tokenizer.backend.token_to_id(token) or 0)
        entry = {"tokens": token, "token_type": USER_DEFINED, "scores": 0.0}
        for key, values in lists.items():
            values[number : number + 1] = [entry[key]]  # a spare row's, or one more
    changed = {f"{GGML}{key}": (values, metadata[f"{GGML}{key}"][1]) for key, values in lists.items()}
    sizes = [key for key in metadata if key.endswith(".vocab_size")]
    return changed | {key: (len(lists["tokens"]), metadata[key][1]) for key in sizes}


def _tokens(tokenizer: TextTokenizer, content: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Every row's token and its type; rows that no token has are named and unused."""
    by_id = {number: token for token, number in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    added = {entry["id"]: bool(entry["special"]) for entry in content.get("added_tokens", [])}
    unknown = content["model"].get("unk_token")
    tokens, types = [], []
    for number in range(rows):
        token = by_id.get(number)
        tokens.append(f"[UNUSED{number}]" if token is None else token)
        if token is None:
            types.append(UNUSED_TOKEN)
        elif token == unknown:
            types.append(UNKNOWN)
        elif number in added:
            types.append(CONTROL if added[number] else USER_DEFINED)
        else:
            types.append(BYTE if content["model"].get("byte_fallback") and _is_byte(token) else NORMAL)
    return tokens, types


def _gemma4_types(tokens: list[str], types: list[int]) -> list[int]:
    """As its converter has them: no type of its own for the unknown token, and some control tokens as text."""
    plain = (CONTROL if kind == UNKNOWN else kind for kind in types)
    return [USER_DEFINED if token in SHOWN else kind for token, kind in zip(tokens, plain, strict=True)]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """A score for each token, by the first merge that makes it; SentencePiece's order is that of its scores."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _with_pre(tokenizer: TextTokenizer, keys: Metadata) -> Metadata:
    """The keys with the pre-tokenizer's name, the first that gives this tokenizer's ids. Raises ModelError."""
    tried = set()
    for name, split in PRE_TOKENIZERS.items():
        if split not in tried:
            tried.add(split)
            named = keys | {"tokenizer.ggml.pre": (name, "string")}
            if _differing(tokenizer, named) is None:
                return named
    what = "cuts text into words in a way that has no name in GGUF"
    raise ModelError(f"{tokenizer.place}: tokenizer.json", what, "convert the merged folder with llama.cpp")


def _check_ids(tokenizer: TextTokenizer, keys: Metadata) -> None:
    text = _differing(tokenizer, keys)
    if text is not None:
        what = f"gives other token ids through GGUF's keys for {text!r:.60}"
        raise ModelError(f"{tokenizer.place}: tokenizer.json", what, "convert the merged folder with llama.cpp")


def _differing(tokenizer: TextTokenizer, keys: Metadata) -> str | None:
    """The first text whose ids differ through these keys."""
    plain = {key: value for key, (value, _) in keys.items()}
    theirs = from_metadata(plain, Path(tokenizer.place))
    for text in PROBES:
        if theirs.encode(text, parse_special=False).ids != tokenizer.encode(text, parse_special=False).ids:
            return text
    return None
