"""An adapter taken out of two models gives the second one back."""

from __future__ import annotations

import json

import pytest
import torch

import lorafit
from builders.adapters import logits, write_adapter
from builders.commands import run
from builders.gguf_experts import write_moe_gguf
from builders.gguf_files import write_tiny_gguf
from builders.models import save_folder, tiny_model
from builders.tokenizers_tiny import tiny_gguf_metadata, write_tiny_folder

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3]])


def test_a_merged_adapter_comes_back(tmp_path):
    """Merged in fp32 and extracted at its own rank: all of the difference is kept, and the logits are the same."""
    model = save_folder(tiny_model("llama"), tmp_path / "model")
    adapter = write_adapter(model, tmp_path / "adapter", rank=4)
    assert run("merge", model, adapter, "--out", tmp_path / "merged", "--dtype", "fp32").code == 0
    done = run("extract", model, tmp_path / "merged", "--rank", "4", "--out", tmp_path / "again", "--json")
    assert done.code == 0, done.err
    assert done.json["kept"] == pytest.approx(1.0, abs=1e-5)
    assert done.json["layers"] == 14
    assert done.json["outside"] == {"tensors": 0, "share_of_all": 0.0}
    want = logits(lorafit.load(model, adapter=adapter, compute="fp32"), IDS)
    got = logits(lorafit.load(model, adapter=tmp_path / "again", compute="fp32"), IDS)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "llama4_text", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("base", ["folder", "file"])
def test_experts_come_back(family, base, tmp_path):
    """From a folder with a matrix for each expert, or fused ones of either order, and from a GGUF file, to the fused
    folder that `merge` writes: all of the difference is kept, and the logits are the same."""
    model = tiny_model(family, **({"attention_chunk_size": 8192, "no_rope_layers": None} if "llama4" in family else {}))
    targets = ["q_proj", "o_proj", "experts"] if family != "deepseek_v3" else ["o_proj", "experts"]
    if base == "file":
        path = write_moe_gguf(tmp_path / "model.gguf", model)
    else:
        path = tmp_path / "model"
        model.save_pretrained(path)  # as published, where the family has single experts
        write_tiny_folder(path)
    adapter = write_adapter(path, tmp_path / "adapter", rank=3, targets=targets)
    assert run("merge", path, adapter, "--out", tmp_path / "merged", "--dtype", "fp32").code == 0
    named = ("--rank", 3, "--targets", ",".join(targets), "--out", tmp_path / "again")
    done = run("extract", path, tmp_path / "merged", *named, "--json")
    assert done.code == 0, done.err
    assert done.json["kept"] == pytest.approx(1.0, abs=1e-5)
    assert done.json["outside"]["tensors"] == 0
    want = logits(lorafit.load(path, adapter=adapter, compute="fp32"), IDS)
    got = logits(lorafit.load(path, adapter=tmp_path / "again", compute="fp32"), IDS)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_is_counted(tmp_path):
    """Other weights everywhere: a low rank keeps a part, said by layer, and norms and embedding are outside."""
    model = save_folder(tiny_model("llama"), tmp_path / "model")
    tuned = save_folder(tiny_model("llama", seed=1), tmp_path / "tuned")
    done = run("extract", model, tuned, "--rank", "4", "--out", tmp_path / "adapter", "--json")
    assert done.code == 0, done.err
    assert 0.2 < done.json["kept"] < 0.8
    assert all(0.2 < share < 0.8 for share in done.json["kept_by_layer"].values())
    assert done.json["outside"]["tensors"] == 7  # 2 norms in each of 2 layers, the last norm, embedding, head
    assert "7 other tensors differ and cannot go into the adapter" in done.err
    plain, other = (lorafit.load(path, compute="fp32") for path in (model, tuned))
    layer = "model.layers.0.mlp.up_proj"
    difference = other.get_submodule(layer).weight.dense() - plain.get_submodule(layer).weight.dense()
    values = torch.linalg.svdvals(difference).square()
    adapted = lorafit.load(model, adapter=tmp_path / "adapter", compute="fp32").get_submodule(layer)
    left = float(
        (difference - adapted.adapter.scale * adapted.adapter.B @ adapted.adapter.A).square().sum() / values.sum()
    )
    assert left == pytest.approx(float(values[4:].sum() / values.sum()), rel=1e-4)


def test_from_gguf_to_gguf(tmp_path):
    """Two GGUF files give what the same two folders give."""
    models = [tiny_model("llama"), tiny_model("llama", seed=1)]
    folders = [save_folder(model, tmp_path / f"f{n}") for n, model in enumerate(models)]
    files = [write_tiny_gguf(tmp_path / f"g{n}.gguf", m, "llama", tiny_gguf_metadata()) for n, m in enumerate(models)]
    for name, pair in (("folder", folders), ("gguf", files)):
        assert run("extract", *pair, "--rank", "4", "--out", tmp_path / name).code == 0
    a, b = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("folder", "gguf"))
    assert a == b


def test_models_that_do_not_belong_together_are_refused(tmp_path):
    """Other shapes, or no difference at all: one line each, nothing written."""
    model = save_folder(tiny_model("llama"), tmp_path / "model")
    wide = save_folder(tiny_model("llama", intermediate_size=64), tmp_path / "wide")
    done = run("extract", model, wide, "--rank", "4", "--out", tmp_path / "out")
    assert done.code == 2
    assert "has shape [32, 64], and the base has [32, 48]" in done.err
    done = run("extract", model, model, "--rank", "4", "--out", tmp_path / "out")
    assert done.code == 2
    assert "has no linear layer that differs" in done.err
    assert not (tmp_path / "out").exists()


def test_only_the_layers_asked_for(tmp_path):
    """--targets limits the adapter; the rest of the difference is counted as outside."""
    model = save_folder(tiny_model("llama"), tmp_path / "model")
    tuned = save_folder(tiny_model("llama", seed=1), tmp_path / "tuned")
    command = ("extract", model, tuned, "--rank", "2", "--targets", "q_proj", "--out", tmp_path / "adapter", "--json")
    assert run(*command).json["layers"] == 2
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
