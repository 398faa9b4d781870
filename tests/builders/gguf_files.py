"""GGUF files: tiny models as llama.cpp's converter would write them, and raw bytes put together by hand.

The converter's part is written anew here with gguf-py (its names, its writer, its quantizers) and the forward
permutation, so that reading such a file back checks lorafit.formats against another implementation.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import PreTrainedModel

from builders.gguf_gemma4 import gemma4_metadata, gemma4_name, gemma4_table
from builders.gguf_linear import converted, linear_metadata

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3",
    "granite": "granite", "smollm3": "smollm3", "ministral3": "mistral3", "phi3": "phi3", "olmo2": "olmo2",
    "olmo3": "olmo2", "qwen3_5_text": "qwen35", "gemma4_text": "gemma4",
}  # fmt: skip
INTERLEAVED = ("llama", "granite", "smollm3", "mistral3")


def write_tiny_gguf(
    path: Path,
    hf_model: PreTrainedModel,
    arch: str,
    tokenizer_metadata: Mapping[str, Any],
    tensor_type: str = "F32",
) -> Path:
    """Write the model as a GGUF file of this architecture and return its path.

    tokenizer_metadata: the `tokenizer.*` keys. tensor_type: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0, for
    matrices whose rows divide into its blocks; the others become F16, and vectors stay F32.
    """
    writer = GGUFWriter(path, arch)
    writer.add_type("model")
    for key, value in (_model_metadata(hf_model, arch) | dict(tokenizer_metadata)).items():
        _add(writer, key, value)
    for name, values in _file_tensors(hf_model, arch).items():
        kind = GGMLQuantizationType[tensor_type if values.ndim == 2 else "F32"]
        if values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = GGMLQuantizationType.F16
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _model_metadata(model: PreTrainedModel, arch: str) -> dict[str, Any]:
    config = model.config
    if arch == "gemma4":
        return {f"gemma4.{key}": value for key, value in gemma4_metadata(config).items()}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
    }
    if arch == "gemma3":
        metadata["attention.sliding_window"] = config.sliding_window
        metadata["attention.sliding_window_pattern"] = config.layer_types.index("full_attention") + 1
        if config.final_logit_softcapping:
            metadata["final_logit_softcapping"] = config.final_logit_softcapping
    metadata |= _own_metadata(config, arch) | linear_metadata(config)
    return {f"{arch}.{key}": value for key, value in metadata.items()}


def _own_metadata(config: Any, arch: str) -> dict[str, Any]:
    """What the converter of one family writes besides."""
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    metadata: dict[str, Any] = {}
    if rope.get("rope_type") == "yarn":
        metadata |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": float(rope["beta_fast"]),
            "rope.scaling.yarn_beta_slow": float(rope["beta_slow"]),
        }
    if arch == "mistral3" and config.model_type == "ministral3":
        metadata["rope.scaling.yarn_log_multiplier"] = float(rope["mscale_all_dim"])
        metadata["attention.temperature_scale"] = float(rope["llama_4_scaling_beta"])
    if arch == "granite":
        metadata["attention.scale"] = float(config.attention_multiplier)
        metadata["embedding_scale"] = float(config.embedding_multiplier)
        metadata["residual_scale"] = float(config.residual_multiplier)
        metadata["logit_scale"] = float(config.logits_scaling)
    if arch == "phi3":
        head_dim = config.hidden_size // config.num_attention_heads
        metadata["rope.scaling.original_context_length"] = config.original_max_position_embeddings
        metadata["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        metadata["attention.sliding_window"] = config.sliding_window or 0
    if config.model_type == "olmo3":
        metadata["attention.sliding_window"] = config.sliding_window
        metadata["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
    return metadata


def _file_tensors(model: PreTrainedModel, arch: str) -> dict[str, np.ndarray]:
    """The weights under their GGUF names, changed as the converter changes them."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.detach().float().numpy()
        if arch in INTERLEAVED and ".q_proj." in name:
            values = _interleaved(values, config.num_attention_heads)
        if arch in INTERLEAVED and ".k_proj." in name:
            values = _interleaved(values, config.num_key_value_heads)
        if arch == "gemma3" and name.endswith("norm.weight"):
            values = values + np.float32(1)
        for told, changed in converted(name, values, config):
            tensors[names.get_name(gemma4_name(told), try_suffixes=(".weight", ".bias"))] = changed
    rope = config.rope_parameters
    if arch == "gemma4":
        tensors["rope_freqs.weight"] = gemma4_table(config)
    if rope.get("rope_type") == "llama3":
        used = model.model.rotary_emb.inv_freq.numpy()
        plain = rope["rope_theta"] ** -(np.arange(len(used)) / len(used))
        tensors["rope_freqs.weight"] = (plain / used).astype(np.float32)
    return tensors


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows (first half, second half) of each head as pairs (first, second)."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


# Files by hand, byte for byte, also those that no writer would write.

VALUE_CODES = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "?": 7, "Q": 10, "q": 11, "d": 12}  # by struct


def text(value: str | bytes) -> bytes:
    """A GGUF string."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def string_key(key: str | bytes, value: str | bytes) -> bytes:
    """A key with a string."""
    return text(key) + struct.pack("<I", 8) + text(value)


def number_key(key: str, kind: str, value: Any) -> bytes:
    """A key with a number; kind: its letter in `struct`."""
    return text(key) + struct.pack(f"<I{kind}", VALUE_CODES[kind], value)


def array_key(key: str, code: int, count: int, elements: bytes = b"") -> bytes:
    """A key with an array of `count` elements of type `code`, whatever `elements` really holds."""
    return text(key) + struct.pack("<IIQ", 9, code, count) + elements


def tensor_info(name: str | bytes, ne: Iterable[int], code: int, offset: int, n_dims: int | None = None) -> bytes:
    """A tensor's entry; ne: dimensions as the file has them, in_features first."""
    ne = list(ne)
    dimensions = struct.pack(f"<I{len(ne)}Q", len(ne) if n_dims is None else n_dims, *ne)
    return text(name) + dimensions + struct.pack("<IQ", code, offset)


def gguf_bytes(
    keys: Iterable[bytes] = (),
    infos: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file; n_keys and n_tensors: what the header claims, where that is not the truth."""
    keys, infos = list(keys), list(infos)
    counts = len(infos) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(infos)
    return head + b"\0" * (-len(head) % alignment if infos else 0) + data


def state_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's parameters by name, a tied head once."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
