"""Linear attention in GGUF files: what is put in order on the packed bytes, what is unpacked, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from builders.architectures import tiny
from builders.gguf_experts import write_moe_gguf
from builders.gguf_models import as_gguf
from builders.models import tiny_model
from lorafit.errors import ModelError
from lorafit.formats import names
from lorafit.formats.gguf import GgufFile, read_gguf
from lorafit.formats.gguf_config import hf_config
from lorafit.formats.gguf_linear import Gathered, arrange
from lorafit.kernels import ops
from lorafit.model.sources import open_source

OUT, MIXED = "model.layers.0.linear_attn.out_proj.weight", "model.layers.0.linear_attn.in_proj_qkvz.weight"


def entries(file: GgufFile) -> dict[str, names.Entry]:
    """The file's parameters, linear attention in order."""
    return arrange(names.entries(file), hf_config(file), file.path)


@pytest.mark.parametrize(("width", "packed"), [(32, True), (16, False)])
def test_columns_move_by_whole_blocks(width: int, packed: bool, tmp_path: Path) -> None:
    """A value head of whole blocks of 32 is moved as bytes, with the bits of moving values; of half a block it is only
    unpacked."""
    model = tiny("qwen3_5_text", hidden_size=64, linear_value_head_dim=width)
    file = as_gguf(model, tmp_path, "Q4_0")
    entry = entries(file)[OUT]
    stored, values = entry.matrix(file), entry.load(file)
    assert (stored is not None) == packed
    assert stored is None or torch.equal(ops.values(stored), values)
    plain = dict(model.named_parameters())[OUT]
    assert float((values - plain).norm() / plain.norm()) < 0.1  # what Q4_0 rounds


@pytest.mark.parametrize(("kind", "packed"), [("Q8_0", True), ("F16", False)])
def test_qkvz_is_gathered(kind: str, packed: bool, tmp_path: Path) -> None:
    """Two tensors of one type stay packed, their rows in transformers' order; of two types they are unpacked."""
    model = tiny_model("qwen3_next", hidden_size=64)
    file = read_gguf(write_moe_gguf(tmp_path / "m.gguf", model, "Q8_0"))
    other = read_gguf(write_moe_gguf(tmp_path / "other.gguf", model, kind))
    gate = "blk.0.attn_gate.weight"
    file = replace(file, tensors={**file.tensors, gate: other.tensors[gate]})
    entry = entries(file)[MIXED]
    assert isinstance(entry, Gathered)
    stored, values = entry.matrix(file), entry.load(file)
    assert (stored is not None) == packed
    assert stored is None or torch.equal(ops.values(stored), values)
    plain = dict(model.named_parameters())[MIXED]
    assert float((values - plain).norm() / plain.norm()) < 0.01


def test_blocks_that_predict_ahead_are_not_read(tmp_path: Path) -> None:
    """Newer files have blocks behind the layers that predict further tokens; the model is that without them."""
    keys = {"qwen35.nextn_predict_layers": 1, "qwen35.block_count": 4}
    file = as_gguf(tiny("qwen3_5_text"), tmp_path, **keys)
    assert hf_config(file)["num_hidden_layers"] == 3
    assert not any(".layers.3." in name for name in entries(file))
    with pytest.raises(ModelError, match="nextn_predict_layers: is 4 of 4 blocks"):
        hf_config(as_gguf(tiny("qwen3_5_text"), tmp_path, **{**keys, "qwen35.nextn_predict_layers": 4}))


def test_a_shared_experts_gate_may_have_lost_a_dimension(tmp_path: Path) -> None:
    """llama.cpp writes (1, H) as (H)."""
    file = read_gguf(write_moe_gguf(tmp_path / "m.gguf", tiny_model("qwen3_5_moe_text")))
    name = "blk.0.ffn_gate_inp_shexp.weight"
    flat = replace(file.tensors[name], shape=file.tensors[name].shape[1:])
    found = entries(replace(file, tensors={**file.tensors, name: flat}))
    assert found["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, 32)


def test_fused_experts_are_one_part(tmp_path: Path) -> None:
    """gate and up in one tensor, as the converter writes them when it is asked to."""
    source = open_source(write_moe_gguf(tmp_path / "m.gguf", tiny_model("qwen3_5_moe_text"), fused=True))
    whole = "model.layers.0.mlp.experts.gate_up_proj"
    assert [part.names for part in source.stacks[whole].parts] == [(whole,)]
    assert torch.equal(
        source.load(whole), tiny_model("qwen3_5_moe_text").state_dict()[whole].flatten(0, 1).view(6, 48, 32)
    )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"qwen35.ssm.time_step_rank": 3}, r"ssm.time_step_rank: is 3, which 2 heads do not divide"),
        ({"qwen35.ssm.inner_size": 33}, r"ssm.inner_size: is 33, which 4 heads do not divide"),
        ({"qwen35.ssm.inner_size": 64}, r"has shape \[64, 4\], and its heads have 96 features"),
        ({"qwen35.rope.dimension_count": 18}, r"rope.dimension_count: is 18 of 16 features of a head"),
        ({"qwen35.rope.dimension_sections": [1, 1]}, r"dimension_sections: holds no three numbers"),
    ],
)
def test_impossible_heads_are_refused(keys: dict[str, object], words: str, tmp_path: Path) -> None:
    """One line, before anything is reordered."""
    with pytest.raises(ModelError, match=words):
        entries(as_gguf(tiny("qwen3_5_text"), tmp_path, **keys))


def test_a_decay_must_be_negative(tmp_path: Path) -> None:
    """A_log is the logarithm of what the file holds, without its sign."""
    file = as_gguf(tiny("qwen3_5_text"), tmp_path)
    tensor = file.tensors["blk.0.ssm_a"]
    wrong = replace(tensor, data=np.zeros(4, "<f4").view(np.uint8).reshape(1, -1))
    file = replace(file, tensors={**file.tensors, "blk.0.ssm_a": wrong})
    with pytest.raises(ModelError, match=r"blk.0.ssm_a: holds a number that is not negative"):
        entries(file)["model.layers.0.linear_attn.A_log"].load(file)
