"""gpt-oss from a GGUF file in MXFP4: trained packed, quantised anew, exported and merged."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import lorafit
from builders.adapters import logits, write_adapter
from builders.commands import run
from builders.gguf_experts import write_moe_gguf
from builders.models import tiny_model
from builders.tokenizers_tiny import VOCABULARY
from lorafit.adapter.attach import adapted_layers, attach
from lorafit.formats.gguf import read_gguf
from lorafit.frozen.packed import quantise
from lorafit.model.load import frozen_weights

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3, 8, 1, 4, 4, 90, 2, 6, 301, 12, 77]])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Two experts that every token passes, so that each multiplies more tokens than are multiplied in registers."""
    wide = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_local_experts": 2}
    return write_moe_gguf(tmp_path_factory.mktemp("mxfp4") / "model.gguf", tiny_model("gpt_oss", **wide), "MXFP4")


def experts(model):
    return {path: weight for path, weight in frozen_weights(model).items() if ".experts." in path}


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_packed_base_trains_with_the_bits_of_the_unpacked(file, compute):
    """Logits and every adapter's gradient, experts' among them, have the bits of a base unpacked to `compute`."""
    results = []
    for base in ("packed", compute):
        model = lorafit.load(file, base=base, compute=compute)
        assert {weight.format for weight in experts(model).values()} == {"MXFP4" if base == "packed" else compute}
        attach(model, rank=4, targets=["all-linear", "experts"])
        for _, layer in adapted_layers(model):
            torch.nn.init.constant_(layer.adapter.B, 0.01)
        out = model(input_ids=IDS).logits
        out.float().square().mean().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for packed, unpacked in zip(*results, strict=True):
        assert torch.equal(packed, unpacked)


def test_nf4_is_made_of_the_files_values(file):
    """Where rows are whole blocks of 64: NF4 of what MXFP4 unpacks to."""
    values = experts(lorafit.load(file, base="packed", compute="fp32"))
    found = experts(lorafit.load(file, base="nf4", compute="fp32"))
    made = [path for path, weight in found.items() if weight.format == "NF4"]
    assert made
    for path in made:
        assert torch.equal(found[path].dense(), quantise(values[path].dense(), "nf4").dense())


def test_adapter_and_merged_model_are_exported(file, tmp_path):
    """The adapter in llama.cpp's format, and the whole model merged: logits of the adapted one; what is not changed
    has the file's values."""
    adapter = write_adapter(file, tmp_path / "adapter", targets=["experts"])
    done = run("export", file, adapter, "--to", "gguf", "--out", tmp_path / "adapter.gguf")
    assert done.code == 0, done.err
    want = logits(lorafit.load(file, adapter=adapter, compute="fp32"), IDS)
    again = lorafit.load(file, adapter=tmp_path / "adapter.gguf", compute="fp32")
    torch.testing.assert_close(logits(again, IDS), want, rtol=1e-4, atol=1e-4)
    merged = tmp_path / "merged"
    done = run("merge", file, adapter, "--out", merged, "--dtype", "fp32")
    assert done.code == 0, done.err
    torch.testing.assert_close(logits(lorafit.load(merged, compute="fp32"), IDS), want, rtol=1e-4, atol=1e-4)
    plain = frozen_weights(lorafit.load(file, base="packed", compute="fp32"))
    q_proj = "model.layers.0.self_attn.q_proj"
    own = next(weight for path, weight in plain.items() if path.startswith(q_proj))
    assert torch.equal(load_file(merged / "model.safetensors")[f"{q_proj}.weight"], own.dense())
    done = run("export", file, adapter, "--to", "gguf-merged", "--dtype", "F32", "--out", tmp_path / "merged.gguf")
    assert done.code == 0, done.err
    assert {tensor.type.name for tensor in read_gguf(tmp_path / "merged.gguf").tensors.values()} == {"F32"}
    whole = lorafit.load(tmp_path / "merged.gguf", compute="fp32")
    torch.testing.assert_close(logits(whole, IDS), want, rtol=1e-4, atol=1e-4)
