"""A GGUF file in Hugging Face's terms: the names of its tensors, what was done to them, and its configuration.

    blk.3.attn_q.weight          model.layers.3.self_attn.q_proj.weight      llama: rows interleaved within heads
    blk.3.post_ffw_norm.weight   model.layers.3.post_feedforward_layernorm.weight      gemma3: stored plus one

Supported are the architectures of `FAMILIES`; the rest is refused by name. Sources: gguf-py's tensor names,
llama.cpp's conversion of each family, and its defaults for keys that a file leaves out.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafit.errors import Faults, ModelError
from lorafit.formats import place
from lorafit.formats.gguf import GgufFile

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FACTORS = "rope_freqs.weight"
UNSUPPORTED = "use another model"
TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
MAX_WIDTH, MAX_CONTEXT = 1 << 20, 1 << 31  # features, heads, layers; tokens
GEMMA3_27B_LAYERS = 62  # llama.cpp knows this size by its layers: its queries are scaled by the model's width
LLAMA3_CONTEXT, LLAMA3_LOW, LLAMA3_HIGH = 8192, 1.0, 4.0  # the same in every model of the Llama 3 series


@dataclass(frozen=True)
class Family:
    """What one GGUF architecture is called in transformers, and how its files differ from transformers' weights."""

    model_type: str
    layer: dict[str, str]
    """Module names within a layer: GGUF's to Hugging Face's."""
    interleaved: bool = False
    """Rows of q and k come in the order of ggml's rotary embedding: (0, half, 1, half + 1, ...) within each head."""
    norms_plus_one: bool = False
    """The file's norms multiply by what it holds; transformers' multiply by one more than their weight."""


FAMILIES = {
    "llama": Family("llama", LAYER, interleaved=True),
    "qwen2": Family("qwen2", LAYER),
    "qwen3": Family("qwen3", LAYER | HEAD_NORMS),
    "gemma3": Family("gemma3_text", LAYER | HEAD_NORMS | GEMMA_NORMS, norms_plus_one=True),
}


@dataclass(frozen=True)
class Entry:
    """How one parameter lies in the file."""

    tensor: str
    """Its GGUF name."""
    shape: tuple[int, ...]
    heads: int = 0
    """Heads whose rows are interleaved; 0: rows are in Hugging Face's order."""
    plus: float = 0.0
    """What the file's values are larger by."""

    def row_order(self) -> np.ndarray | None:
        """The file's row for each row of the parameter, (rows,) int64; None where they are the same."""
        if not self.heads:
            return None
        return np.arange(self.shape[0]).reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def load(self, gguf: GgufFile, unpack: Callable[[Tensor, str], Tensor]) -> Tensor:
        """The parameter, fp32, in its shape; `unpack` is kernels.unpack.unpack or a faster twin."""
        tensor = gguf.tensors[self.tensor]
        values = unpack(torch.from_dlpack(tensor.data), tensor.type.name).reshape(self.shape)
        order = self.row_order()
        if order is not None:
            values = values[torch.from_numpy(order)]
        return values - self.plus if self.plus else values


def hf_names(architecture: str, n_layers: int) -> dict[str, str]:
    """Every tensor name that a file of this architecture may hold, with its parameter's name."""
    modules = dict(TOP)
    for layer in range(n_layers):
        for gguf_name, name in FAMILIES[architecture].layer.items():
            modules[f"blk.{layer}.{gguf_name}"] = f"model.layers.{layer}.{name}"
    return {f"{old}.{kind}": f"{new}.{kind}" for old, new in modules.items() for kind in ("weight", "bias")}


def entries(gguf: GgufFile) -> dict[str, Entry]:
    """The file's tensors by Hugging Face parameter name. Which of them the model needs, its loader knows.

    Raises ModelError for an unsupported architecture and q or k rows that do not divide into heads; Faults for
    tensors that no model of this architecture has.
    """
    architecture = architecture_of(gguf)
    family = FAMILIES[architecture]
    names = hf_names(architecture, _layers(gguf, architecture))
    heads = {"attn_q": _count(gguf, f"{architecture}.attention.head_count")}
    heads["attn_k"] = _count(gguf, f"{architecture}.attention.head_count_kv", heads["attn_q"])
    stored = [t for t in gguf.tensors.values() if not (t.name == ROPE_FACTORS and architecture == "llama")]
    unknown = [tensor.name for tensor in stored if tensor.name not in names]
    if unknown:
        raise Faults([_fault(gguf, name, f"has no place in a {architecture} model") for name in unknown])
    found = {}
    for tensor in stored:
        module = tensor.name.split(".")[-2]
        interleaved = heads.get(module, 0) if family.interleaved else 0
        if interleaved and tensor.shape[0] % (2 * interleaved):
            what = f"has {tensor.shape[0]} rows, which {interleaved} heads of even size do not divide"
            raise _fault(gguf, tensor.name, what)
        plus = 1.0 if family.norms_plus_one and module.endswith("norm") else 0.0
        found[names[tensor.name]] = Entry(tensor.name, tensor.shape, interleaved, plus)
    return found


def architecture_of(gguf: GgufFile) -> str:
    """The file's architecture, a key of FAMILIES. Raises ModelError, with the nearest supported one, for another."""
    kind = gguf.value("general.type", str, "model")
    if kind != "model":
        raise _fault(gguf, "general.type", f"is {kind[:40]!r}, not a model", "give the base model's file")
    if gguf.value("split.count", int, 1) > 1:
        what = f"the model is split into {gguf.metadata['split.count']} files"
        raise _fault(gguf, "split.count", what, "join them with llama-gguf-split --merge")
    architecture = gguf.value("general.architecture", str)
    if architecture not in FAMILIES:
        architecture = architecture[:40]
        near = difflib.get_close_matches(architecture, FAMILIES, 1)
        remedy = f"the nearest supported one is {near[0]}" if near else f"supported: {', '.join(FAMILIES)}"
        raise _fault(gguf, "general.architecture", f"{architecture!r} is not supported yet", remedy)
    experts = next((name for name in gguf.tensors if "_exps." in name or ".ffn_gate_inp." in name), "")
    if experts or gguf.value(f"{architecture}.expert_count", int, 0):
        where = experts or f"{architecture}.expert_count"
        raise _fault(gguf, where, "experts are not supported yet", "use a model without experts")
    return architecture


def hf_config(gguf: GgufFile) -> dict[str, Any]:
    """The fields of the transformers configuration, `model_type` among them, from the file's metadata.

    Raises ModelError for a key that is missing, of the wrong type, impossible, or not supported.
    """
    architecture = architecture_of(gguf)
    key = f"{architecture}.{{}}".format
    hidden, heads = _count(gguf, key("embedding_length")), _count(gguf, key("attention.head_count"))
    kv_heads = _count(gguf, key("attention.head_count_kv"), heads)
    for name, total, parts in (("head_count", hidden, heads), ("head_count_kv", heads, kv_heads)):
        if total % parts:
            raise _fault(gguf, key(f"attention.{name}"), f"is {parts}, which does not divide {total}")
    if "token_embd.weight" not in gguf.tensors:
        raise _fault(gguf, "token_embd.weight", "is missing", "the file holds no whole model")
    head_dim, vocabulary = _head_dim(gguf, hidden // heads), gguf.tensors["token_embd.weight"].shape[0]
    config: dict[str, Any] = {
        "model_type": FAMILIES[architecture].model_type,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": _count(gguf, key("feed_forward_length")),
        "num_hidden_layers": _layers(gguf, architecture),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": _count(gguf, key("context_length"), most=MAX_CONTEXT),
        "rms_norm_eps": _positive(gguf, key("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(gguf, architecture, head_dim),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        **{f"{token}_token_id": _token(gguf, name, vocabulary) for token, name in TOKENS.items()},
    }
    if architecture != "qwen2":  # whose attention always has biases
        config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in gguf.tensors
    return config | (_gemma3(gguf, config) if architecture == "gemma3" else {})


def _gemma3(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    period = _count(gguf, "gemma3.attention.sliding_window_pattern", 6)
    local = {"rope_type": "default", "rope_theta": _positive(gguf, "gemma3.rope.freq_base_swa", 10000.0)}
    softcap = "gemma3.final_logit_softcapping"
    return {
        "sliding_window": _count(gguf, "gemma3.attention.sliding_window"),
        "layer_types": ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)],
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
        "query_pre_attn_scalar": config["hidden_size"] // heads if layers == GEMMA3_27B_LAYERS else config["head_dim"],
        "final_logit_softcapping": _positive(gguf, softcap) if softcap in gguf.metadata else None,
    }


def _fault(gguf: GgufFile, name: str, what: str, remedy: str = "convert the model again") -> ModelError:
    return ModelError(place(gguf.path, name), what, remedy)


def _count(gguf: GgufFile, key: str, default: int | None = None, most: int = MAX_WIDTH) -> int:
    """An integer from 1 to `most`, which keeps every product of two or three of them far from overflow."""
    value = gguf.value(key, int, default)
    if not 0 < value <= most:
        raise _fault(gguf, key, f"is {value}, not 1 to {most}")
    return value


def _layers(gguf: GgufFile, architecture: str) -> int:
    """Layers, of which there are no more than tensors: names and work follow from this number."""
    return _count(gguf, f"{architecture}.block_count", most=len(gguf.tensors))


def _positive(gguf: GgufFile, key: str, default: float | None = None) -> float:
    """A positive number, as the shortest decimal that is the same fp32: 1e-05, not the 9.99999975e-06 in the file."""
    value = gguf.value(key, float, default)
    if not 1e-30 < value < 1e30:
        raise _fault(gguf, key, f"is {value}")
    return float(str(np.float32(value)))


def _token(gguf: GgufFile, name: str, vocabulary: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in gguf.metadata:
        return None
    value = gguf.value(key, int)
    if not 0 <= value < vocabulary:
        raise _fault(gguf, key, f"is {value}, and the vocabulary has {vocabulary} tokens")
    return value


def _head_dim(gguf: GgufFile, usual: int) -> int:
    """Features of a head; queries, keys and values must have the same number, all of them rotated."""
    architecture = gguf.metadata["general.architecture"]
    head_dim = _count(gguf, f"{architecture}.attention.key_length", usual)
    for name in ("attention.value_length", "rope.dimension_count"):
        value = _count(gguf, f"{architecture}.{name}", head_dim)
        if value != head_dim:
            what = f"is {value} where a key has {head_dim} features, which is not supported yet"
            raise _fault(gguf, f"{architecture}.{name}", what, UNSUPPORTED)
    if head_dim % 2:
        raise _fault(gguf, f"{architecture}.attention.key_length", f"is {head_dim}, which is odd")
    return head_dim


def _rope(gguf: GgufFile, architecture: str, head_dim: int) -> dict[str, Any]:
    """transformers' `rope_parameters`."""
    prefix = f"{architecture}.rope."
    theta = _positive(gguf, f"{prefix}freq_base", 10000.0)
    kind = gguf.value(f"{prefix}scaling.type", str, "linear")
    factor = _positive(gguf, f"{prefix}scaling.factor", 1.0)
    read = {f"{prefix}scaling.{name}" for name in ("type", "factor", "original_context_length", "finetuned")}
    other = sorted(key for key in gguf.metadata if key.startswith(f"{prefix}scal") and key not in read)
    if other and kind != "none":
        raise _fault(gguf, other[0], "this part of rotary scaling is not supported yet", UNSUPPORTED)
    if kind == "none" or (kind == "linear" and factor == 1):
        if architecture == "llama" and ROPE_FACTORS in gguf.tensors:
            return _llama3_rope(gguf, theta, head_dim)
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn") or ROPE_FACTORS in gguf.tensors:
        what = f"rotary scaling {kind[:40]!r} is not supported yet"
        raise _fault(gguf, f"{prefix}scaling.type", what, UNSUPPORTED)
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        key = f"{prefix}scaling.original_context_length"
        rope["original_max_position_embeddings"] = _count(gguf, key, most=MAX_CONTEXT)
    return rope


def _llama3_rope(gguf: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling, which a file holds as the divisor of each frequency; the largest one is its factor.

    Raises ModelError when the divisors are not those that the factor gives.
    """
    tensor = gguf.tensors[ROPE_FACTORS]
    if tensor.type.name != "F32" or tensor.shape != (head_dim // 2,):
        what = f"has type {tensor.type.name} and shape {list(tensor.shape)}, not F32 and [{head_dim // 2}]"
        raise _fault(gguf, ROPE_FACTORS, what)
    stored = tensor.data[0].view("<f4")
    factor = float(stored.max(initial=1.0))
    turns = LLAMA3_CONTEXT * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = ((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)).clip(0, 1)
    if not np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        what = "is not the rotary scaling of Llama 3, the only table that is supported yet"
        raise _fault(gguf, ROPE_FACTORS, what, UNSUPPORTED)
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }
