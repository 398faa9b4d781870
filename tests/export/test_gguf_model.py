"""Merged GGUF files: every tensor is the plain computation's, and the file says what the model is."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

import lorafit
from builders.adapters import logits, write_adapter
from builders.architectures import tiny
from builders.commands import run
from builders.gguf_experts import ARCHITECTURES as MIXTURES
from builders.gguf_files import write_tiny_gguf
from builders.gguf_models import FAMILIES, tiny_of, written
from builders.models import save_folder, tiny_model
from builders.tokenizers_tiny import VOCABULARY, tiny_gguf_metadata, tiny_tokenizer
from lorafit.export.gguf_metadata import tokenizer_metadata
from lorafit.formats.gguf import read_gguf
from lorafit.formats.gguf_tokenizer import from_gguf, from_metadata

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3]])
WIDE = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96}

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 8.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FIXED = {"attention_chunk_size": 8192, "no_rope_layers": None}  # what llama.cpp has for every Llama 4
PUBLISHED = {  # as Llama 3.2, Llama 4 Scout, Gemma 3 and a long Qwen 2.5 have it
    "llama": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "llama4_text": {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "factor": 16.0, "high_freq_factor": 1.0}},
    "gemma3_text": {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8},
    },
    "qwen2": {
        "rope_theta": 1e6,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", ["folder", "file"])
def test_f32_is_the_merged_model(family, base, tmp_path):
    """In F32 the file gives the adapted model's logits, from a folder and from a GGUF base, and the same token ids; its
    tensors are those that the builder, as llama.cpp's converter, makes of this architecture."""
    model = tiny_of(family, vocab_size=VOCABULARY)
    file = written(model, tmp_path / "model.gguf")
    path = save_folder(model, tmp_path / "model") if base == "folder" else file
    targets = ["all-linear", "experts"] if family in MIXTURES else ["all-linear"]
    adapter = write_adapter(path, tmp_path / "adapter", targets=targets)
    out = tmp_path / "merged.gguf"
    done = run("export", path, adapter, "--to", "gguf-merged", "--dtype", "F32", "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json["largest_error"] == 0.0
    want = logits(lorafit.load(path, adapter=adapter, compute="fp32"), IDS)
    merged = lorafit.load(out, compute="fp32")
    torch.testing.assert_close(logits(merged, IDS), want, rtol=1e-4, atol=1e-4)
    shapes = [{name: tensor.shape for name, tensor in read_gguf(one).tensors.items()} for one in (out, file)]
    assert shapes[0] == shapes[1]
    text = "SELECT name FROM people WHERE age > 30; naïve 東京"
    assert merged.tokenizer(text)["input_ids"] == tiny_tokenizer().encode(text).ids
    assert from_gguf(read_gguf(out)).chat_template == tiny_tokenizer().chat_template


@pytest.mark.parametrize("family", PUBLISHED)
def test_configurations_as_they_are_published_go_too(family, tmp_path):
    """Rotary scaling in the fields of transformers 4, where most published models have it."""
    model = tiny_model(family, **WIDE, **(FIXED if family == "llama4_text" else {}))
    folder = save_folder(model, tmp_path / "model")
    config = {**json.loads((folder / "config.json").read_text()), **PUBLISHED[family]}
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    adapter, out = write_adapter(folder, tmp_path / "adapter"), tmp_path / "merged.gguf"
    done = run("export", folder, adapter, "--to", "gguf-merged", "--dtype", "F32", "--out", out)
    assert done.code == 0, done.err
    want = lorafit.load(folder, adapter=adapter, compute="fp32")
    merged = lorafit.load(out, compute="fp32")
    torch.testing.assert_close(logits(merged, IDS), logits(want, IDS), rtol=1e-4, atol=1e-4)
    rope, own = merged.config.rope_parameters, want.config.rope_parameters
    assert rope.get("full_attention", rope).items() <= own.get("full_attention", own).items()


@pytest.mark.parametrize("targets", ["embed_tokens", "lm_head", "embed_tokens,lm_head"])
@pytest.mark.parametrize("base", ["folder", "file"])
def test_a_tied_head_that_goes_its_own_way_is_in_the_file(base, targets, tmp_path):
    """LoRA on one of a tied pair, or on both, leaves two matrices: the file has them, and the adapted logits."""
    model = tiny_model("qwen2", **WIDE)
    path = save_folder(model, tmp_path / "model") if base == "folder" else written(model, tmp_path / "model.gguf")
    adapter, out = write_adapter(path, tmp_path / "adapter", targets=targets.split(",")), tmp_path / "merged.gguf"
    done = run("export", path, adapter, "--to", "gguf-merged", "--dtype", "F32", "--out", out)
    assert done.code == 0, done.err
    want = logits(lorafit.load(path, adapter=adapter, compute="fp32"), IDS)
    torch.testing.assert_close(logits(lorafit.load(out, compute="fp32"), IDS), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_formats_are_gguf_pys(kind, tmp_path):
    """Each matrix is gguf-py's own rounding of W + s B A; vectors stay F32, and with Q4_0 the embedding is Q8_0."""
    model = tiny_model("qwen2", **WIDE)
    folder = save_folder(model, tmp_path / "model")
    adapter = write_adapter(folder, tmp_path / "adapter")
    out = tmp_path / "merged.gguf"
    done = run("export", folder, adapter, "--to", "gguf-merged", "--dtype", kind, "--out", out, "--json")
    assert done.code == 0, done.err
    adapted = lorafit.load(folder, adapter=adapter, compute="fp32")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    assert found["token_embd.weight"].tensor_type.name == ("Q8_0" if kind == "Q4_0" else kind)
    assert "output.weight" not in found
    worst = 0.0
    for path, layer in adapted.named_modules():
        if hasattr(layer, "adapter"):
            exact = model.get_submodule(path).weight + layer.adapter.scale * layer.adapter.B @ layer.adapter.A
            tensor = found[names.get_name(path) + ".weight"]
            assert tensor.tensor_type.name == kind
            want = quants.quantize(exact.detach().numpy(), GGMLQuantizationType[kind])
            assert np.array_equal(tensor.data.view(np.uint8).reshape(-1), want.view(np.uint8).reshape(-1)), path
            rounded = quants.dequantize(want, GGMLQuantizationType[kind])
            worst = max(worst, float(np.abs(rounded - exact.detach().numpy()).max()))
            bias = found.get(names.get_name(path) + ".bias")
            assert bias is None or bias.tensor_type.name == "F32"
    assert done.json["largest_error"] == pytest.approx(worst, rel=1e-5)


def test_metadata_of_a_gguf_base_is_kept(tmp_path):
    """Every key of the base, with its type, but for the format and the template that training used."""
    extra = {"general.author": "someone", "general.tags": ["a", "b"], "llama.rope.scaling.finetuned": True}
    model = tiny_model("llama", **WIDE)
    base = write_tiny_gguf(tmp_path / "base.gguf", model, "llama", {**tiny_gguf_metadata(), **extra}, "Q8_0")
    adapter = write_adapter(base, tmp_path / "adapter")
    out = tmp_path / "merged.gguf"
    done = run("export", base, adapter, "--to", "gguf-merged", "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json["dtype"] == "Q8_0"
    old, new = read_gguf(base), read_gguf(out)
    for key, value in old.metadata.items():
        assert new.metadata[key] == value
        assert new.types[key] == old.types[key]
    assert new.metadata["general.file_type"] == 7
    plain = old.tensors["token_embd.weight"].data
    assert np.array_equal(new.tensors["token_embd.weight"].data, plain)  # untouched: copied byte for byte


def test_the_tokenizer_survives():
    """A byte-level tokenizer's ids come back through GGUF's keys; rows without a token are named and unused."""
    tokenizer = tiny_tokenizer()
    keys = tokenizer_metadata(tokenizer, VOCABULARY + 3, "{{ messages }}")
    assert keys["tokenizer.ggml.tokens"][0][-1] == f"[UNUSED{VOCABULARY + 2}]"
    assert keys["tokenizer.ggml.token_type"][0][-1] == 5
    again = from_metadata({key: value for key, (value, _) in keys.items()}, "keys")
    for text in ("The people, 12345 ships", "naïve 東京 🚢", "  def f(x):\n\treturn x"):
        assert again.encode(text).ids == tokenizer.encode(text).ids
    assert (again.bos_id, again.eos_id, again.add_bos, again.special) == (
        tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.special
    )  # fmt: skip


def test_ministral_is_refused(tmp_path):
    """llama.cpp has no name for its windows: one line, with what to do."""
    folder = save_folder(tiny("ministral", vocab_size=VOCABULARY), tmp_path / "model")
    adapter = write_adapter(folder, tmp_path / "adapter")
    done = run("export", folder, adapter, "--to", "gguf", "--out", tmp_path / "a.gguf")
    assert done.code == 2
    what = "'ministral' has no GGUF architecture that llama.cpp knows, whose Mistrals have no sliding windows"
    assert f"{what}; export to peft, or merge to a folder" in done.err
