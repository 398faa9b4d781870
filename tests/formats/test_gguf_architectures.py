"""GGUF files of more families: written as the converter writes them, read as the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from builders.architectures import tiny
from builders.gguf_files import gguf_bytes, number_key, string_key, tensor_info
from builders.gguf_linear import KINDS as LINEAR
from builders.gguf_linear import ROUNDED
from builders.gguf_models import IDS, OLMO3_ROPE, as_gguf, from_gguf
from lorafit.errors import ModelError
from lorafit.formats import names
from lorafit.formats.gguf import read_gguf
from lorafit.formats.gguf_config import hf_config
from lorafit.formats.gguf_linear import arrange

PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": None}),
    "ministral3": ("ministral3", {}),
    "phi3": ("phi3", {"original_max_position_embeddings": 256}),
    "phi4-mini": (
        "phi3",
        {"sliding_window": None, "original_max_position_embeddings": 256, "tie_word_embeddings": True,
         "rope_parameters": PARTIAL},
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"rope_parameters": OLMO3_ROPE}),
    "qwen3.5": ("qwen3_5_text", {}),
    "qwen3.5, no groups": ("qwen3_5_text", {"linear_num_key_heads": 4}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_file_is_the_model(case: str, tmp_path: Path) -> None:
    """Every parameter comes back with its bits and no other, but for those that the file has after a sum or an
    exponential in fp32; configuration and tensors give the same logits."""
    name, changes = CASES[case]
    model = tiny(name, **changes)
    file = as_gguf(model, tmp_path)
    config = hf_config(file)
    assert config["model_type"] == name
    state = {key: entry.load(file) for key, entry in arrange(names.entries(file), config, tmp_path).items()}
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    assert state.keys() == model.state_dict().keys() - tied
    for key, value in state.items():
        rounded = 1e-6 if name in LINEAR and key.endswith(ROUNDED) else 0.0
        torch.testing.assert_close(value, model.state_dict()[key], rtol=0, atol=rounded)
    with torch.no_grad():
        torch.testing.assert_close(from_gguf(file)(IDS).logits, model(IDS).logits)


def test_mistral_small_is_a_plain_mistral(tmp_path: Path) -> None:
    """The converter calls Mistral Small 3 and Ministral 3 alike; without rotary scaling it is `mistral`."""
    config = hf_config(as_gguf(tiny("ministral3"), tmp_path))
    assert config["model_type"] == "ministral3"
    keys = {"mistral3.rope.scaling.type": "none", "mistral3.attention.temperature_scale": 0.0}
    assert hf_config(as_gguf(tiny("ministral3"), tmp_path, **keys))["model_type"] == "mistral"
    with pytest.raises(ModelError, match=r"temperature_scale: is 0.1\d* without the rotary scaling yarn"):
        hf_config(as_gguf(tiny("ministral3"), tmp_path, **{"mistral3.rope.scaling.type": "none"}))


def test_a_pattern_of_windows_must_fit_the_layers(tmp_path: Path) -> None:
    """OLMo 3's truth values, one for each layer; without them every fourth layer attends to everything."""
    key = "olmo2.attention.sliding_window_pattern"
    with pytest.raises(ModelError, match=r"sliding_window_pattern: holds no truth value for each of the 2 layers"):
        hf_config(as_gguf(tiny("olmo3"), tmp_path, **{key: [True]}))


def test_rotary_tables_of_phi3_are_refused(tmp_path: Path) -> None:
    """Phi 3's long contexts scale by tables in the file, which are not read: one line says so."""
    keys = [string_key("general.architecture", "phi3")]
    numbers = {
        "embedding_length": 8,
        "attention.head_count": 2,
        "feed_forward_length": 8,
        "block_count": 1,
        "context_length": 64,
    }
    keys += [number_key(f"phi3.{key}", "I", value) for key, value in numbers.items()]
    keys += [number_key("phi3.attention.layer_norm_rms_epsilon", "f", 1e-5)]
    infos = [tensor_info("token_embd.weight", [8, 4], 0, 0), tensor_info("rope_factors_long.weight", [8], 0, 128)]
    file = tmp_path / "phi3.gguf"
    file.write_bytes(gguf_bytes(keys, infos, bytes(160)))
    with pytest.raises(ModelError, match=r"rope_factors_long.weight: rotary scaling by tables is not supported yet"):
        hf_config(read_gguf(file))
