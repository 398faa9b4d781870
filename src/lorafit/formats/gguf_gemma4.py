"""Gemma 4 in GGUF files: two kinds of layers, keys and values that later layers share, embeddings for each layer.

    gemma4.attention.key_length, ..._swa             features of a head with full attention, and with a sliding window
    gemma4.attention.sliding_window_pattern          for each layer, whether its window slides
    gemma4.attention.head_count_kv                   for each layer, or one number for all
    gemma4.attention.shared_kv_layers                so many at the end have no keys and values of their own
    gemma4.feed_forward_length                       for each layer where those that share are twice as wide
    gemma4.embedding_length_per_layer_input          features of a token's second embedding, one in each layer; 0: none
    rope_freqs.weight                                of full attention: 1 for a frequency in use, 1e30 for the others

Sources: llama.cpp's loader, graph and conversion of `gemma4`; transformers' Gemma4TextConfig.
"""

from __future__ import annotations

import math
from typing import Any

from lorafit.formats.gguf import GgufFile
from lorafit.formats.names import ROPE_FACTORS, count, counts, fault, positive

KEY = "gemma4.{}".format
UNSUPPORTED = "use another model"
UNUSED = 1e30  # what a frequency is divided by that does not rotate
SOFTCAP = 30.0  # of logits, in llama.cpp, where a file does not say; 0 is none


def with_gemma4(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Fields of the configuration; `config` has those that families share, `head_dim` that of full attention.

    Raises ModelError for layers that transformers' Gemma 4 cannot have.
    """
    layers = config["num_hidden_layers"]
    slides = _slides(gguf, layers)
    shared = gguf.value(KEY("attention.shared_kv_layers"), int, 0)
    own = _own_layers(gguf, slides, shared)
    heads = _by_kind(gguf, slides, config["num_attention_heads"])
    full = {"head_dim": config["head_dim"], "num_key_value_heads": heads[False]}
    softcap = KEY("final_logit_softcapping")
    return {
        "head_dim": _sliding_width(gguf),
        "num_key_value_heads": heads[True],
        "per_layer_config": {str(layer): full for layer in range(layers) if not slides[layer]},
        "layer_types": ["sliding_attention" if one else "full_attention" for one in slides],
        "sliding_window": count(gguf, KEY("attention.sliding_window")),
        "attention_k_eq_v": any(
            f"blk.{layer}.attn_v.weight" not in gguf.tensors for layer in range(own) if not slides[layer]
        ),
        "num_kv_shared_layers": shared,
        "final_logit_softcapping": positive(gguf, softcap, SOFTCAP) if gguf.value(softcap, float, SOFTCAP) else None,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": config["rope_parameters"]["rope_theta"],
                "partial_rotary_factor": _rotated(gguf, config["head_dim"]),
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": positive(gguf, KEY("rope.freq_base_swa"), 10000.0),
            },
        },
        **_widths(gguf, own, layers),
        **_embeddings(gguf),
        **_experts(gguf),
    }


def _slides(gguf: GgufFile, layers: int) -> list[bool]:
    """Whether each layer's window slides: some do, in llama.cpp, and the last one's may not, in transformers."""
    key = KEY("attention.sliding_window_pattern")
    found = gguf.metadata.get(key)
    if not isinstance(found, list) or len(found) != layers or not all(type(one) is bool for one in found):
        raise fault(gguf, key, f"holds no truth value for each of the {layers} layers")
    if found[-1]:
        raise fault(gguf, key, "lets the last layer's window slide, which is not supported", UNSUPPORTED)
    if not any(found):
        raise fault(gguf, key, "lets no layer's window slide, which is not supported", UNSUPPORTED)
    return found


def _own_layers(gguf: GgufFile, slides: list[bool], shared: int) -> int:
    """How many layers have keys and values of their own. The others take those of the last such layer of their kind;
    llama.cpp takes the last but one for sliding windows and the last for full attention, and so both must agree."""
    key, own = KEY("attention.shared_kv_layers"), len(slides) - shared
    if not 0 <= shared < len(slides):
        raise fault(gguf, key, f"is {shared} of {len(slides)} layers")
    if shared and (slides[own - 1] or (any(slides[own:]) and not (own > 1 and slides[own - 2]))):
        what = f"is {shared}, and before these there is no layer with a sliding window followed by a full one"
        raise fault(gguf, key, what, UNSUPPORTED)
    return own


def _by_kind(gguf: GgufFile, slides: list[bool], heads: int) -> dict[bool, int]:
    """Heads of keys and values, by whether the window slides."""
    key = KEY("attention.head_count_kv")
    found = counts(gguf, key, len(slides), heads)
    by_kind = {kind: {n for n, one in zip(found, slides, strict=True) if one == kind} for kind in (True, False)}
    for numbers in by_kind.values():
        if len(numbers) > 1 or any(heads % number for number in numbers):
            raise fault(gguf, key, f"is {found}: not one number that divides {heads} for each kind of layer")
    return {kind: numbers.pop() for kind, numbers in by_kind.items()}


def _sliding_width(gguf: GgufFile) -> int:
    """Features of a head with a sliding window; all of them are rotated."""
    width = count(gguf, KEY("attention.key_length_swa"))
    for name in ("attention.value_length_swa", "rope.dimension_count_swa"):
        value = count(gguf, KEY(name), width)
        if value != width:
            what = f"is {value} where a key has {width} features, which is not supported yet"
            raise fault(gguf, KEY(name), what, UNSUPPORTED)
    if width % 2:
        raise fault(gguf, KEY("attention.key_length_swa"), f"is {width}, which is odd")
    return width


def _rotated(gguf: GgufFile, width: int) -> float:
    """The share of a head of full attention that is rotated, by the table of divisors."""
    tensor = gguf.tensors.get(ROPE_FACTORS)
    if tensor is None:
        raise fault(gguf, ROPE_FACTORS, "is missing", "the file is incomplete")
    if tensor.type.name != "F32" or tensor.shape != (width // 2,):
        what = f"has type {tensor.type.name} and shape {list(tensor.shape)}, not F32 and [{width // 2}]"
        raise fault(gguf, ROPE_FACTORS, what)
    stored = tensor.data[0].view("<f4")
    used = int((stored == 1).sum())
    if not used or (stored[:used] != 1).any() or (stored[used:] < UNUSED / 2).any():
        what = "is no table of ones and then 1e30, the only one that is supported here"
        raise fault(gguf, ROPE_FACTORS, what, UNSUPPORTED)
    share = 2 * used / width
    return share if int(share * width // 2) == used else math.nextafter(share, 1)  # as transformers counts them


def _widths(gguf: GgufFile, own: int, layers: int) -> dict[str, Any]:
    """Of the layers' dense part: those that share keys and values may be twice as wide."""
    key = KEY("feed_forward_length")
    found = counts(gguf, key, layers)
    first, last = found[0], found[-1]
    if found != [first] * own + [last] * (layers - own) or last not in (first, 2 * first):
        what = f"is {found}: not one width for all layers, nor twice that for the last {layers - own}"
        raise fault(gguf, key, what, UNSUPPORTED)
    return {"use_double_wide_mlp": last != first} if own < layers else {}


def _embeddings(gguf: GgufFile) -> dict[str, Any]:
    """The second embedding of a token."""
    key, table = KEY("embedding_length_per_layer_input"), "per_layer_token_embd.weight"
    if not gguf.value(key, int, 0):
        return {"hidden_size_per_layer_input": 0}
    if table not in gguf.tensors:
        raise fault(gguf, table, "is missing", "the file is incomplete")
    return {
        "hidden_size_per_layer_input": count(gguf, key),
        "vocab_size_per_layer_input": gguf.tensors[table].shape[0],
    }


def _experts(gguf: GgufFile) -> dict[str, Any]:
    """The mixture that stands beside each layer's dense part."""
    if not gguf.value(KEY("expert_count"), int, 0):
        return {}
    return {
        "enable_moe_block": True,
        "num_experts": count(gguf, KEY("expert_count")),
        "top_k_experts": count(gguf, KEY("expert_used_count")),
        "moe_intermediate_size": count(gguf, KEY("expert_feed_forward_length")),
    }
