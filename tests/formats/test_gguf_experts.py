"""GGUF files with experts, written as llama.cpp's converter does: configuration and every value come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lorafit
from builders.gguf_experts import write_moe_gguf
from builders.gguf_linear import KINDS as LINEAR
from builders.gguf_linear import ROUNDED
from builders.models import tiny_model
from lorafit.errors import ModelError
from lorafit.formats.gguf import read_gguf
from lorafit.formats.gguf_config import hf_config
from lorafit.formats.gguf_experts import _stepped_rope
from lorafit.model.sources import open_source

IDS = torch.arange(5, 45)[None]  # beyond the first context, where queries grow
WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
FIELDS = (
    "model_type",
    "num_experts_per_tok",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
)
OWN = {
    "qwen3_moe": "num_experts moe_intermediate_size norm_topk_prob head_dim decoder_sparse_step",
    "mixtral": "num_local_experts sliding_window",
    "gpt_oss": "num_local_experts sliding_window layer_types swiglu_limit swiglu_alpha head_dim attention_bias",
    "llama4_text": "num_local_experts intermediate_size_mlp moe_layers use_qk_norm "
    "attn_temperature_tuning floor_scale head_dim",
    "deepseek_v3": "n_routed_experts moe_intermediate_size n_shared_experts first_k_dense_replace n_group "
    "topk_group norm_topk_prob routed_scaling_factor "
    "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rope_interleave",
    "mistral4": "n_routed_experts moe_intermediate_size n_shared_experts first_k_dense_replace n_group "
    "topk_group norm_topk_prob routed_scaling_factor head_dim "
    "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rope_interleave rope_parameters",
    "qwen2_moe": "num_experts moe_intermediate_size shared_expert_intermediate_size norm_topk_prob "
    "qkv_bias decoder_sparse_step",
    "olmoe": "num_experts norm_topk_prob attention_bias clip_qkv",
    "qwen3_next": "num_experts moe_intermediate_size shared_expert_intermediate_size norm_topk_prob head_dim "
    "layer_types decoder_sparse_step mlp_only_layers",
    "qwen3_5_moe_text": "num_experts moe_intermediate_size shared_expert_intermediate_size head_dim layer_types",
    "granitemoe": "num_local_experts attention_multiplier embedding_multiplier residual_multiplier logits_scaling",
}


@pytest.mark.parametrize("family", OWN)  # Gemma 4: in test_gguf_gemma4.py
def test_the_configuration_and_every_value_come_back(family, tmp_path):
    """transformers' configuration of the file equals the model's in every field that the experts and the family need,
    and each parameter is the model's bit for bit: stacks by their parts, joined biases, kv_b from its halves."""
    from transformers import AutoConfig

    model = tiny_model(family, **WIDE)
    source = open_source(write_moe_gguf(tmp_path / "model.gguf", model))
    config = AutoConfig.for_model(**source.config)
    for field in (*FIELDS, *OWN[family].split()):
        assert getattr(config, field) == getattr(model.config, field), field
    assert config.rope_parameters["rope_theta"] == model.config.rope_parameters["rope_theta"]
    state = {name: tensor for name, tensor in model.state_dict().items() if "inv_freq" not in name}
    assert {source.format(name) for name in source.shapes} == {"F32"}
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, tensor in state.items():
        if name not in source.stacks:
            rounded = 1e-6 if family in LINEAR and name.endswith(ROUNDED) else 0.0
            torch.testing.assert_close(source.load(name).view(tensor.shape), tensor, rtol=0, atol=rounded)
            continue
        whole = torch.empty(source.stacks[name].shape)
        for part in source.stacks[name].parts:
            (own,) = part.names
            whole[:, part.columns] = source.load(own)
        assert torch.equal(whole.transpose(1, 2) if whole.shape != tensor.shape or family in LAST else whole, tensor)


LAST = ("gpt_oss", "llama4_text")


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("qwen3_moe", {"expert_count": None}, "qwen3moe.expert_count: is missing"),
        ("qwen3_moe", {"expert_used_count": 0}, "qwen3moe.expert_used_count: is 0, not 1 to"),
        ("gpt_oss", {"attention.sliding_window": None}, "gpt-oss.attention.sliding_window: is missing"),
        ("deepseek_v3", {"expert_gating_func": 1}, "is not sigmoid: DeepSeek-V2 is not supported yet"),
        ("deepseek_v3", {"attention.key_length_mla": 8}, "key_length_mla: is 8, of which 8 are rotated"),
        ("mistral4", {"expert_gating_func": 2}, "mistral4.expert_gating_func: is not softmax"),
        ("mistral4", {"attention.temperature_length": 64}, "temperature_length: is 64, not the first context's 16"),
        ("mistral4", {"rope.scaling.type": "none"}, "rope.scaling.type: is 'default', and Mistral 4's is yarn"),
        ("llama4_text", {"attention.sliding_window": 64}, "another attention is not supported yet"),
        ("llama4_text", {"interleave_moe_layer_step": None}, "llama4.interleave_moe_layer_step: is missing"),
    ],
)
def test_a_file_that_means_another_mixture_is_refused(family, change, words, tmp_path):
    """A key that is missing, impossible or not supported is named."""
    with pytest.raises(ModelError, match=words):
        open_source(write_moe_gguf(tmp_path / "model.gguf", tiny_model(family, **WIDE), **change))


@pytest.mark.parametrize("arch", ["mistral4", "deepseek2"])
def test_mistral_4_in_both_of_its_architectures(arch, tmp_path):
    """Mistral Large 3 is llama.cpp's deepseek2, with experts' gate and up apart: by its growing queries it is known."""
    model = tiny_model("mistral4", **WIDE)
    file = write_moe_gguf(tmp_path / "model.gguf", model, arch=arch)
    assert ("blk.1.ffn_gate_up_exps.weight" in read_gguf(file).tensors) == (arch == "mistral4")
    ours = lorafit.load(file, compute="fp32")
    assert ours.config.model_type == "mistral4"
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_what_a_mistral_4_file_leaves_out(tmp_path):
    """llama.cpp's converter of Mistral Small 4 does not write how queries grow: then they do not."""
    left_out = dict.fromkeys(("attention.temperature_scale", "attention.temperature_length", "expert_gating_func"))
    file = write_moe_gguf(tmp_path / "model.gguf", tiny_model("mistral4", **WIDE), **left_out)
    rope = hf_config(read_gguf(file))["rope_parameters"]
    assert (rope["llama_4_scaling_beta"], rope["mscale"], rope["mscale_all_dim"]) == (0.0, 1.0, 1.0)


def test_what_a_deepseek_file_leaves_out_is_what_llama_cpp_takes(tmp_path):
    """No groups, no scale, no norm of the scores; the rotary scaling's log multiplier is a tenth of mscale_all_dim."""
    left_out = ("expert_group_count", "expert_group_used_count", "expert_weights_scale", "expert_weights_norm")
    yarn = {"type": "yarn", "factor": 40.0, "original_context_length": 64, "yarn_log_multiplier": 0.1}
    changes = dict.fromkeys(left_out) | {f"rope.scaling.{key}": value for key, value in yarn.items()}
    file = write_moe_gguf(tmp_path / "model.gguf", tiny_model("deepseek_v3", **WIDE), **changes)
    config = hf_config(read_gguf(file))
    assert (config["n_group"], config["topk_group"]) == (1, 1)
    assert (config["routed_scaling_factor"], config["norm_topk_prob"]) == (1.0, False)
    rope = config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["mscale"], rope["mscale_all_dim"]) == ("yarn", 40.0, 1.0, 1.0)


def test_the_largest_llama_4_norms_no_heads(tmp_path):
    """128 experts are Maverick, which llama.cpp knows by that number."""
    model = tiny_model("llama4_text", num_local_experts=128)
    assert hf_config(read_gguf(write_moe_gguf(tmp_path / "m.gguf", model)))["use_qk_norm"] is False


def test_scouts_rotary_table_is_read_as_its_rule(tmp_path):
    """Frequencies whose wave is longer than the first context are divided by the factor; another table is refused."""
    from dataclasses import replace

    file = read_gguf(write_moe_gguf(tmp_path / "m.gguf", tiny_model("llama4_text", head_dim=32)))
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    waves = 2 * np.pi * 500000.0 ** (np.arange(0, 32, 2) / 32)
    norm = file.tensors["output_norm.weight"]

    def with_table(table: np.ndarray):
        data = table.astype("<f4").view(np.uint8).reshape(1, -1)
        tensor = replace(norm, name="rope_freqs.weight", shape=(16,), data=data)
        return replace(file, tensors={**file.tensors, "rope_freqs.weight": tensor})

    found = _stepped_rope(with_table(np.where(waves > 8192, 16.0, 1.0)), rope, 32)
    assert found["rope_type"] == "llama3"
    assert (found["factor"], found["low_freq_factor"], found["high_freq_factor"]) == (16.0, 1.0, 1.0)
    with pytest.raises(ModelError, match="is not the rotary scaling of Llama 4"):
        _stepped_rope(with_table(np.linspace(1, 16, 16)), rope, 32)
