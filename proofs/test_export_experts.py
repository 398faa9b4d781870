"""Experts in llama.cpp and PEFT: what proofs/test_export.py shows of dense models. Run with `make proof-export`."""

from __future__ import annotations

import pytest
import torch
import xllamacpp  # noqa: F401  without it nothing is proven

import lorafit
from builders.adapters import logits, write_adapter
from builders.commands import run
from builders.gguf_experts import write_moe_gguf
from builders.models import save_folder, tiny_model
from builders.tokenizers_tiny import VOCABULARY
from lorafit.export.gguf_adapter import read_gguf_adapter
from lorafit.export.placement import placement
from lorafit.model.sources import open_source

F32 = 0.001  # nats; two programs' fp32 sums
WIDE = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
TARGETS = ["all-linear", "experts"]
IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3]])


@pytest.fixture(params=["qwen3_moe", "mixtral"])
def world(request, tmp_path):
    """A tiny mixture of experts as folder and F32 GGUF file, with adapters on linear layers and experts of each."""
    model = tiny_model(request.param, **WIDE)
    folder = save_folder(model, tmp_path / "folder")
    file = write_moe_gguf(tmp_path / "base.gguf", model)
    for path in (folder, file):
        write_adapter(path, tmp_path / f"for-{path.name}", targets=TARGETS)
    return tmp_path


@pytest.mark.parametrize("world", ["qwen3_moe", "mixtral", "qwen3_5_moe_text"], indirect=True)
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
    assert sum(update.A.ndim == 3 for update in read.values()) in (4, 8)  # two of each layer
    want = logits(lorafit.load(world / base, adapter=adapter, compute="fp32"), IDS)
    got = logits(lorafit.load(world / base, adapter=world / "adapter.gguf", compute="fp32"), IDS)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("base", ["folder", "base.gguf"])
def test_merged_file(world, base, kind):
    """The merged file in llama.cpp is what lorafit reads in it."""
    out = world / "merged.gguf"
    adapter = world / f"for-{base}"
    done = run("export", world / base, adapter, "--to", "gguf-merged", "--dtype", kind, "--out", out, "--json")
    assert done.code == 0, done.err
    print(f"\n{base} {kind}: {done.json}")
    assert kind != "F32" or done.json["largest_difference"] < F32


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
