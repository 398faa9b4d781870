"""The GGUF adapter by its algebra: what llama.cpp adds, computed plainly from the file, is the merged model's file."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

import lorafit
from builders.adapters import logits, write_adapter
from builders.commands import run
from builders.gguf_experts import ARCHITECTURES as MIXTURES
from builders.gguf_experts import write_moe_gguf
from builders.gguf_files import ARCHITECTURES, write_tiny_gguf
from builders.models import save_folder, tiny_model
from builders.tokenizers_tiny import CHAT_TEMPLATE, tiny_gguf_metadata
from lorafit.errors import AdapterError
from lorafit.export.gguf_adapter import read_gguf_adapter
from lorafit.export.placement import placement
from lorafit.formats.gguf_write import write_gguf
from lorafit.model.sources import open_source

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3]])


def by_name(path) -> dict[str, np.ndarray]:
    """A file's tensors as gguf-py reads them."""
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def written(model, path):
    """The model as a GGUF file, by the builder of its family."""
    kind = model.config.model_type
    if kind in MIXTURES:
        return write_moe_gguf(path, model)
    return write_tiny_gguf(path, model, ARCHITECTURES[kind], tiny_gguf_metadata())


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "gemma3_text", "ministral3", "qwen2", "mistral", "smollm3", "granite", "qwen3_5_text",
     "qwen3_moe", "mixtral",
     "qwen2_moe", "olmoe", "granitemoe", "llama4_text", "qwen3_5_moe_text"],
)  # fmt: skip
def test_base_plus_adapter_is_the_merged_file(family, tmp_path):
    """base + alpha / r * lora_b lora_a, tensor by tensor, equals the file that the builder writes of the merged model,
    its own permutation of q and k included; from a folder and from a GGUF base come the same tensors."""
    model = tiny_model(
        family, **({"attention_chunk_size": 8192} if family == "llama4_text" else {})
    )  # as files have it
    folder = save_folder(model, tmp_path / "model")
    base = written(model, tmp_path / "base.gguf")
    targets = ["all-linear", "experts"] if family in MIXTURES else ["all-linear"]
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


@pytest.mark.parametrize(
    ("base", "said"), [("file", "lies in two tensors of GGUF's"), ("folder", "has no name in GGUF's")]
)
def test_a_layer_in_two_tensors_is_refused(base, said, tmp_path):
    """Qwen3-Next's in_proj_qkvz: one line that names it, and no file."""
    model = tiny_model("qwen3_next")
    path = write_moe_gguf(tmp_path / "m.gguf", model) if base == "file" else save_folder(model, tmp_path / "model")
    adapter = write_adapter(path, tmp_path / "adapter")
    done = run("export", path, adapter, "--to", "gguf", "--out", tmp_path / "a.gguf")
    assert done.code == 2
    assert f"linear_attn.in_proj_qkvz: {said} qwen3next files" in done.err
    assert not (tmp_path / "a.gguf").exists()
