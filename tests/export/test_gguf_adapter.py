"""The GGUF adapter by its algebra: what llama.cpp adds, computed plainly from the file, is the merged model's file."""

from __future__ import annotations

import re

import gguf
import numpy as np
import pytest
import torch

import lorafit
from builders.adapters import logits, write_adapter
from builders.commands import run
from builders.gguf_experts import ARCHITECTURES as MIXTURES
from builders.gguf_experts import write_moe_gguf
from builders.gguf_files import ARCHITECTURES
from builders.gguf_models import FAMILIES, LATENT, tiny_of, written
from builders.models import save_folder, tiny_model
from builders.tokenizers_tiny import CHAT_TEMPLATE, VOCABULARY
from lorafit.errors import AdapterError
from lorafit.export.gguf_adapter import read_gguf_adapter
from lorafit.export.placement import placement
from lorafit.formats.gguf_write import write_gguf
from lorafit.model.sources import open_source

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3]])


def by_name(path) -> dict[str, np.ndarray]:
    """A file's tensors as gguf-py reads them."""
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("family", FAMILIES)
def test_base_plus_adapter_is_the_merged_file(family, tmp_path):
    """base + alpha / r * lora_b lora_a, tensor by tensor, equals the file that the builder writes of the merged model,
    its own permutation of q and k included; from a folder and from a GGUF base come the same tensors."""
    model = tiny_of(family)
    folder = save_folder(model, tmp_path / "model")
    base = written(model, tmp_path / "base.gguf")
    targets = ["all-linear", "experts"] if family in MIXTURES else ["all-linear"]
    targets = ["mlp", "experts", "o_proj"] if family in LATENT else targets
    targets = ["all-linear", "*.gate_up_proj"] if family == "gemma4_text" else targets  # see test_gguf_gemma4.py
    adapter = write_adapter(folder, tmp_path / "adapter", rank=4, alpha=10, targets=targets)
    for source, out in ((base, "a.gguf"), (folder, "b.gguf")):
        done = run("export", source, adapter, "--to", "gguf", "--out", tmp_path / out)
        assert done.code == 0, done.err
        assert "not tried in llama.cpp: xllamacpp is not installed" in done.err
    found, same = by_name(tmp_path / "a.gguf"), by_name(tmp_path / "b.gguf")
    assert found.keys() == same.keys()
    assert all(np.array_equal(found[name], same[name]) for name in found)
    adapted, layers = lorafit.load(folder, adapter=adapter, compute="fp32"), 0
    with torch.no_grad():
        for path, layer in adapted.named_modules():
            if hasattr(layer, "adapter"):
                layers += 1
                update = layer.adapter.scale * layer.adapter.B @ layer.adapter.A
                own = model.get_parameter(path if update.ndim == 3 else f"{path}.weight")
                own += update if update.shape == own.shape else update.mT
    want = by_name(written(model, tmp_path / "want.gguf"))
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    alpha = fields["adapter.lora.alpha"].contents()
    assert len(found) >= 2 * layers
    for name, values in by_name(base).items():
        if f"{name}.lora_a" in found:
            a, b = found.pop(f"{name}.lora_a"), found.pop(f"{name}.lora_b")
            values = values + alpha / a.shape[-2] * b @ a
        np.testing.assert_allclose(values, want[name], rtol=1e-5, atol=1e-6)
    assert not found
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.type"].contents() == "lora"
    assert fields["general.architecture"].contents() == {**ARCHITECTURES, **MIXTURES}[family]
    assert fields["tokenizer.chat_template"].contents() == CHAT_TEMPLATE


def test_it_is_read_back_as_an_adapter(tmp_path):
    """`--adapter FILE.gguf` does what the folder does: the same logits, with the base as GGUF or as a folder."""
    folder = save_folder(tiny_model("llama"), tmp_path / "model")
    adapter = write_adapter(folder, tmp_path / "adapter")
    file = tmp_path / "adapter.gguf"
    assert run("export", folder, adapter, "--to", "gguf", "--out", file).code == 0
    want = logits(lorafit.load(folder, adapter=adapter, compute="fp32"), IDS)
    got = logits(lorafit.load(folder, adapter=file, compute="fp32"), IDS)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("arch", "is 'qwen2', not llama"),
        ("half", "is missing"),
        ("name", "names no tensor of this base"),
        ("more", "is no half of an update"),
        ("shape", "has halves of shapes"),
    ],
)
def test_damaged_files_are_refused(change, said, tmp_path):
    """Another architecture, a lost half, an unknown tensor, halves that do not fit: one line each."""
    folder = save_folder(tiny_model("llama"), tmp_path / "model")
    where = placement(folder, open_source(folder))
    a, b = np.zeros((2, 32), np.float32), np.zeros((32, 2 if change != "shape" else 3), np.float32)
    name = "blk.0.attn_q.weight" if change != "name" else "blk.7.attn_q.weight"
    tensors = {f"{name}.lora_a": a, f"{name}.lora_b": b}
    if change == "half":
        del tensors[f"{name}.lora_b"]
    if change == "more":
        tensors["blk.0.attn_norm.weight"] = a[0]
    metadata = {
        "general.type": ("adapter", "string"),
        "adapter.type": ("lora", "string"),
        "adapter.lora.alpha": (2.0, "float32"),
    }
    plan = {tensor: (values.shape, "F32") for tensor, values in tensors.items()}
    arch = "qwen2" if change == "arch" else "llama"
    write_gguf(tmp_path / "a.gguf", arch, metadata, plan, lambda tensor: tensors[tensor])
    with pytest.raises(AdapterError, match=said):
        read_gguf_adapter(tmp_path / "a.gguf", where)


@pytest.mark.parametrize("layer", ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"])
@pytest.mark.parametrize("base", ["file", "folder"])
def test_what_llama_cpp_multiplies_without_adapters_is_refused(base, layer, tmp_path):
    """Latent attention: one line with the layer and the remedy, and no file; merged, the same adapter is written."""
    model = tiny_model("deepseek_v3", vocab_size=VOCABULARY)
    path = write_moe_gguf(tmp_path / "m.gguf", model) if base == "file" else save_folder(model, tmp_path / "model")
    adapter = write_adapter(path, tmp_path / "adapter", targets=[layer])
    done = run("export", path, adapter, "--to", "gguf", "--out", tmp_path / "a.gguf")
    assert done.code == 2
    line = rf"self_attn.{layer}: lies in attn_\w+, and llama.cpp takes no adapter there in deepseek2 models"
    assert re.search(rf"{line}; export to gguf-merged, or train with --targets mlp,experts,o_proj\n", done.err)
    assert not (tmp_path / "a.gguf").exists()
    done = run("export", path, adapter, "--to", "gguf-merged", "--dtype", "F32", "--out", tmp_path / "m2.gguf")
    assert done.code == 0, done.err


def test_tensors_with_an_a_each_are_read(tmp_path):
    """in_proj_qkvz from two pairs that share nothing, as another trainer would write them: the update of twice the rank
    that both are."""
    model = tiny_model("qwen3_next")
    file = write_moe_gguf(tmp_path / "m.gguf", model)
    where = placement(file, open_source(file))
    layer = "model.layers.0.linear_attn.in_proj_qkvz"
    first, second = where.of(layer, "m")
    torch.manual_seed(3)
    tensors, wanted = {}, torch.zeros_like(model.get_submodule(layer).weight)
    for piece in (first, second):
        rows, columns = piece.entry.shape
        A, B = torch.randn(3, columns), torch.randn(rows, 3)
        tensors |= {f"{piece.entry.tensor}.lora_a": A.numpy(), f"{piece.entry.tensor}.lora_b": B.numpy()}
        wanted[piece.outputs] = 2 * B @ A  # alpha / r
    metadata = {"general.type": ("adapter", "string"), "adapter.type": ("lora", "string"),
                "adapter.lora.alpha": (6.0, "float32")}  # fmt: skip
    plan = {tensor: (values.shape, "F32") for tensor, values in tensors.items()}
    write_gguf(tmp_path / "a.gguf", "qwen3next", metadata, plan, lambda tensor: tensors[tensor])
    read = read_gguf_adapter(tmp_path / "a.gguf", where)
    torch.testing.assert_close(read[layer].dense(), wanted)
    del plan[f"{second.entry.tensor}.lora_a"], plan[f"{second.entry.tensor}.lora_b"]
    write_gguf(tmp_path / "half.gguf", "qwen3next", metadata, plan, lambda tensor: tensors[tensor])
    with pytest.raises(AdapterError, match=r"blk.0.attn_qkv.weight: stands without attn_gate"):
        read_gguf_adapter(tmp_path / "half.gguf", where)
