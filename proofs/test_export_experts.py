"""Experts in llama.cpp and PEFT: what proofs/test_export.py shows of dense models. Run with `make proof-export`."""

from __future__ import annotations

import pytest
import torch
import xllamacpp  # noqa: F401  without it nothing is proven

import lorafit
from builders.adapters import logits, write_adapter
from builders.commands import run
from builders.gguf_models import LATENT, tiny_of, written
from builders.models import save_folder
from builders.tokenizers_tiny import VOCABULARY
from lorafit.export.gguf_adapter import read_gguf_adapter
from lorafit.export.placement import placement
from lorafit.model.sources import open_source

F32 = 0.001  # nats; two programs' fp32 sums
WIDE = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96}
FAMILIES = (
    "qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "granitemoe", "llama4_text", "qwen3_5_moe_text", "qwen3_next",
    "gpt_oss",
)  # fmt: skip
LATENT_TARGETS = ["mlp", "experts", "o_proj"]
EVERYTHING = ["all-linear", "experts"]
IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3]])


@pytest.fixture(params=["qwen3_moe", "mixtral"])
def world(request, tmp_path):
    """A tiny mixture of experts as folder and F32 GGUF file, with adapters of each on what llama.cpp adapts."""
    model = tiny_of(request.param, **WIDE)
    folder = save_folder(model, tmp_path / "folder")
    file = written(model, tmp_path / "base.gguf")
    for path in (folder, file):
        for name, targets in (("for", LATENT_TARGETS if request.param in LATENT else EVERYTHING), ("all", EVERYTHING)):
            write_adapter(path, tmp_path / f"{name}-{path.name}", targets=targets)
    return tmp_path


@pytest.mark.parametrize("world", [*FAMILIES, *LATENT], indirect=True)
@pytest.mark.parametrize("base", ["folder", "base.gguf"])
def test_gguf_adapter_on_an_f32_base(world, base):
    """Base and adapter in llama.cpp: each compared log-probability within 0.001; read back it is the same adapter."""
    adapter = world / f"for-{base}"
    done = run("export", world / base, adapter, "--to", "gguf", "--out", world / "adapter.gguf", "--json")
    assert done.code == 0, done.err
    told = done.json
    print(f"\n{base}: {told}")
    assert told["program"] == "llama.cpp"
    assert told["largest_difference"] < F32
    assert told["effect"] > 0.1
    read = read_gguf_adapter(world / "adapter.gguf", placement(world / base, open_source(world / base)))
    assert sum(update.A.ndim == 3 for update in read.values()) in (2, 4, 8)  # two of each layer that has experts
    want = logits(lorafit.load(world / base, adapter=adapter, compute="fp32"), IDS)
    got = logits(lorafit.load(world / base, adapter=world / "adapter.gguf", compute="fp32"), IDS)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world", [*FAMILIES, *LATENT], indirect=True)
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("base", ["folder", "base.gguf"])
def test_merged_file(world, base, kind):
    """The merged file in llama.cpp is what lorafit reads in it; where what llama.cpp rounds moves tokens to other
    experts, the Q8_0 file's values in F32 are."""
    out = world / "merged.gguf"
    adapter = world / f"all-{base}"
    done = run("export", world / base, adapter, "--to", "gguf-merged", "--dtype", kind, "--out", out, "--json")
    assert done.code == 0, done.err
    print(f"\n{base} {kind}: {done.json}")
    assert kind != "F32" or done.json["largest_difference"] < F32


@pytest.mark.parametrize("layer", ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "lm_head", "o_proj"])
def test_llama_cpp_leaves_adapters_of_latent_attention_out(layer, tmp_path, monkeypatch):
    """It loads a file that adapts them and computes the base; when one of these fails, placement.DEAF can lose it."""
    monkeypatch.setattr("lorafit.export.placement.DEAF", {})
    file = written(tiny_of("deepseek_v3", **WIDE), tmp_path / "base.gguf")
    adapter = write_adapter(file, tmp_path / "a", targets=[layer])
    done = run("export", file, adapter, "--to", "gguf", "--out", tmp_path / "a.gguf")
    assert ("the adapter has no effect in llama.cpp" in done.err) == (layer != "o_proj")
    assert done.code == (0 if layer == "o_proj" else 2)


@pytest.mark.parametrize("target", ["peft", "portable"])
def test_folders_in_peft(world, target):
    """Fused, and an adapter for each expert: PEFT on transformers' own model, within 0.001."""
    done = run("export", world / "folder", world / "for-folder", "--to", target, "--out", world / target, "--json")
    assert done.code == 0, done.err
    print(f"\n{target}: {done.json['largest_difference']:.2e}")
    assert done.json["largest_difference"] < F32


def test_merged_folder_is_read_by_transformers(world):
    """fp32: the adapted model's logits here and in transformers."""
    from transformers import AutoModelForCausalLM

    done = run("merge", world / "folder", world / "for-folder", "--out", world / "merged", "--dtype", "fp32")
    assert done.code == 0, done.err
    want = logits(lorafit.load(world / "folder", adapter=world / "for-folder", compute="fp32"), IDS)
    torch.testing.assert_close(logits(lorafit.load(world / "merged", compute="fp32"), IDS), want, rtol=1e-4, atol=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(world / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs, IDS), want, rtol=1e-4, atol=1e-4)
