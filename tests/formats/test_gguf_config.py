"""The laws of lorafit.formats.gguf_config: metadata give the configuration that the file was made from, or an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from builders.gguf_files import ARCHITECTURES, gguf_bytes, number_key, string_key, tensor_info
from builders.gguf_models import GGUF_FAMILIES, IDS, as_gguf, from_gguf
from builders.models import tiny_model
from lorafit.errors import ModelError
from lorafit.formats import names
from lorafit.formats.gguf import GgufFile, read_gguf
from lorafit.formats.gguf_config import hf_config


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_the_configuration_is_the_original_one(family: str, tmp_path: Path) -> None:
    """Each field that hf_config gives has the value of the configuration that the file was made from."""
    model = tiny_model(family)
    ours = AutoConfig.for_model(**hf_config(as_gguf(model, tmp_path))).to_dict()
    expected = model.config.to_dict()
    for field in hf_config(as_gguf(model, tmp_path)):
        if field in expected:
            assert ours[field] == expected[field], field


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}])
def test_options_of_llama_are_seen_in_the_tensors(changes: dict[str, bool], tmp_path: Path) -> None:
    """Biases and a tied head follow from the tensors that are there; q and k biases are in the right order too."""
    model = tiny_model("llama", **changes)
    file = as_gguf(model, tmp_path)
    assert {key: hf_config(file)[key] for key in changes} == changes
    with torch.no_grad():
        torch.testing.assert_close(from_gguf(file)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", GGUF_FAMILIES)
@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 8.0}, {"type": "yarn", "factor": 4.0, "context": 64}])
def test_rotary_scaling_is_transformers_own(family: str, scaling: dict[str, Any], tmp_path: Path) -> None:
    """Linear and YaRN scaling reach `rope_parameters`, of full attention only in gemma3, and give its frequencies."""
    prefix = f"{ARCHITECTURES[family]}.rope.scaling."
    metadata = {f"{prefix}type": scaling["type"], f"{prefix}factor": scaling["factor"]}
    expected = {"rope_type": scaling["type"], "rope_theta": 10000.0, "factor": scaling["factor"]}
    if "context" in scaling:
        metadata[f"{prefix}original_context_length"] = scaling["context"]
        expected["original_max_position_embeddings"] = scaling["context"]
    metadata[f"{ARCHITECTURES[family]}.rope.freq_base"] = 10000.0
    config = hf_config(as_gguf(tiny_model(family), tmp_path, **metadata))
    rope = config["rope_parameters"]
    assert rope.get("full_attention", rope) == expected
    if family == "gemma3_text":
        assert rope["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_llama3_scaling_comes_back_from_its_divisors(tmp_path: Path) -> None:
    """rope_freqs.weight is no parameter: the configuration that made it is found again, and gives the same logits."""
    model = tiny_model("llama", rope_parameters=dict(LLAMA3), head_dim=64)
    file = as_gguf(model, tmp_path)
    assert "rope_freqs.weight" in file.tensors
    assert hf_config(file)["rope_parameters"] == LLAMA3
    with torch.no_grad():
        torch.testing.assert_close(from_gguf(file)(IDS).logits, model(IDS).logits)


def test_other_divisors_are_refused(tmp_path: Path) -> None:
    """Divisors that Llama 3's rule does not give are refused, not approximated."""
    model = tiny_model("llama", rope_parameters={**LLAMA3, "high_freq_factor": 8.0}, head_dim=64)
    with pytest.raises(ModelError, match=r"rope_freqs.weight: is not the rotary scaling of Llama 3"):
        hf_config(as_gguf(model, tmp_path))


def test_gemma3_layers_and_scale(tmp_path: Path) -> None:
    """Without the keys, every sixth layer attends fully, the local base is 10000, and only 27B scales by width."""
    keys = {"block_count": 62, "embedding_length": 12, "attention.head_count": 2, "feed_forward_length": 8}
    keys |= {"context_length": 64, "attention.sliding_window": 16, "attention.key_length": 4}
    content = [string_key("general.architecture", "gemma3")]
    content += [number_key(f"gemma3.{key}", "I", value) for key, value in keys.items()]
    content.append(number_key("gemma3.attention.layer_norm_rms_epsilon", "f", 1e-6))
    infos = [tensor_info("token_embd.weight", [12, 5], 0, 0)]
    infos += [tensor_info(f"blk.{i}.attn_norm.weight", [12], 0, 256 + 64 * i) for i in range(61)]
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(content, infos, bytes(256 + 64 * 61)))
    config = hf_config(read_gguf(path))
    assert [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"] == list(range(5, 62, 6))
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 10000.0
    assert config["query_pre_attn_scalar"] == 12 // 2
    assert (config["vocab_size"], config["rms_norm_eps"], config["bos_token_id"]) == (5, 1e-6, None)
    path.write_bytes(path.read_bytes().replace(b"block_count\x04\0\0\0\x3e", b"block_count\x04\0\0\0\x3d"))
    assert hf_config(read_gguf(path))["query_pre_attn_scalar"] == 4


# What is changed in a good llama file, and words of the error.
REFUSED = {
    "another architecture": ({"general.architecture": "qwen2vl"}, "'qwen2vl' is not supported yet; the nearest supp"),
    "no architecture like it": ({"general.architecture": "xyz"}, "'xyz' is not supported yet; supported: llama, qwen2"),
    "an adapter": ({"general.type": "adapter"}, "general.type: is 'adapter', not a model"),
    "a part": ({"split.count": 3}, "split.count: the model is split into 3 files"),
    "experts without their use": ({"llama.expert_count": 8}, "llama.expert_used_count: is missing"),
    "value length": ({"llama.attention.value_length": 4}, "llama.attention.value_length: is 4 where a key has 8"),
    "partial rotary": ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count: is 4 where a key has 8"),
    "odd heads": (
        {"llama.attention.key_length": 7, "llama.attention.value_length": 7},
        "key_length: is 7, which is",
    ),
    "no heads": ({"llama.attention.head_count": 0}, "llama.attention.head_count: is 0, not 1 to"),
    "heads of text": ({"llama.attention.head_count": "4"}, "llama.attention.head_count: has type string, not int"),
    "heads per layer": ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv: differs between layers"),
    "heads of one layer": ({"llama.attention.head_count_kv": [2]}, "head_count_kv: holds no number from 1 to"),
    "heads of text per layer": ({"llama.attention.head_count_kv": [2, "2"]}, "head_count_kv: holds no number from 1"),
    "heads and width": (
        {"llama.attention.head_count": 5},
        "head_count: is 5, which does not divide 32",
    ),
    "more layers than tensors": ({"llama.block_count": (1 << 32) - 1}, "llama.block_count: is 4294967295, not 1 to 21"),
    "infinite base": ({"llama.rope.freq_base": float("inf")}, "llama.rope.freq_base: is inf"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_epsilon: is nan"),
    "another scaling": ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type: rotary scaling 'longrope'"),
    "old scaling": ({"llama.rope.scale_linear": 4.0}, "llama.rope.scale_linear: this part of rotary scaling is"),
    "unknown scaling key": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 2.0},
        "llama.rope.scaling.yarn_ext_factor: this part of rotary scaling is not supported yet",
    ),
    "token past the vocabulary": (
        {"tokenizer.ggml.eos_token_id": 512},
        "eos_token_id: is 512, and the vocab",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_we_cannot_honour_is_refused(case: str, tmp_path: Path, change: Callable[..., GgufFile]) -> None:
    """Each setting that would make another model than the file means is one ModelError, naming key and value."""
    metadata, words = REFUSED[case]
    with pytest.raises(ModelError) as caught:
        hf_config(change(metadata))
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/model.gguf: ")


@pytest.fixture
def change(tmp_path: Path) -> Callable[..., GgufFile]:
    """A good llama file as read, with some metadata exchanged."""

    def changed(metadata: dict[str, Any]) -> GgufFile:
        file = as_gguf(tiny_model("llama"), tmp_path)
        kinds = {str: "string", int: "uint32", float: "float32", list: "array of int32"}
        types = {key: kinds[type(value)] for key, value in metadata.items()}
        return GgufFile(file.path, file.metadata | metadata, file.types | types, file.tensors)

    return changed


def test_numbers_may_be_given_for_each_layer(change: Callable[..., GgufFile]) -> None:
    """An array of one number is that number, as in llama.cpp, for the configuration and for the order of rows."""
    keys = {"head_count": [4, 4], "head_count_kv": [2, 2]}
    arrays = {f"llama.attention.{key}": value for key, value in keys.items()} | {"llama.feed_forward_length": [48, 48]}
    plain, same = change({}), change(arrays)
    assert hf_config(same) == hf_config(plain)
    assert names.entries(same) == names.entries(plain)


def test_a_file_without_an_embedding_is_no_model(tmp_path: Path) -> None:
    """A vocabulary-only file is refused by the tensor that it lacks."""
    file = as_gguf(tiny_model("llama"), tmp_path)
    with pytest.raises(ModelError, match=r"token_embd.weight: is missing"):
        hf_config(GgufFile(file.path, file.metadata, file.types, {"x": file.tensors["output.weight"]}))
