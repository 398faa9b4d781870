"""Gemma 4 written as GGUF: the converter's keys, names and tokenizer, the adapted model's logits, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import lorafit
from builders.adapters import logits, write_adapter
from builders.architectures import GEMMA4, folder_of, tiny
from builders.commands import QUICK, run
from builders.gguf_experts import write_moe_gguf
from builders.models import save_folder
from builders.tokenizers_tiny import VOCABULARY, gemma4_gguf_metadata, write_gemma4_folder
from lorafit.formats.gguf import read_gguf
from lorafit.formats.gguf_tokenizer import from_gguf

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3]])
EVERYTHING = {"dense": ["all-linear"], "small": ["all-linear"], "experts": ["all-linear", "experts"]}
SAFE = {"dense": ["all-linear"], "small": ["attention", "mlp"], "experts": ["all-linear", "*.gate_up_proj"]}


def model_of(kind: str, **changes: Any):
    own = {"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY}
    return tiny("gemma4_text", **{**GEMMA4[kind], **own, **changes})


def merged(path: Path, adapter: Path, out: Path, kind: str = "F32"):
    done = run("export", path, adapter, "--to", "gguf-merged", "--dtype", kind, "--out", out, "--json")
    assert done.code == 0, done.err
    return done.json


@pytest.mark.parametrize("kind", GEMMA4)
@pytest.mark.parametrize("base", ["folder", "file"])
def test_f32_is_the_merged_model(kind: str, base: str, tmp_path: Path) -> None:
    """From a folder and from a GGUF base, every layer adapted: the adapted model's logits, nothing rounded."""
    model = model_of(kind)
    path = save_folder(model, tmp_path / "m") if base == "folder" else write_moe_gguf(tmp_path / "m.gguf", model)
    adapter = write_adapter(path, tmp_path / "adapter", targets=EVERYTHING[kind])
    told = merged(path, adapter, tmp_path / "merged.gguf")
    assert told["largest_error"] == 0.0
    want = logits(lorafit.load(path, adapter=adapter, compute="fp32"), IDS)
    torch.testing.assert_close(
        logits(lorafit.load(tmp_path / "merged.gguf", compute="fp32"), IDS), want, rtol=1e-4, atol=1e-4
    )
    assert (logits(lorafit.load(path, compute="fp32"), IDS) - want).abs().max() > 0.1


SHAPES: dict[str, dict[str, Any]] = {
    "as published": {},
    "heads alike": {"head_dim": 16, "global_head_dim": 16, "num_global_key_value_heads": None},
    "odd sizes": {"hidden_size": 36, "num_attention_heads": 8, "head_dim": 12, "global_head_dim": 24},
}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("kind", GEMMA4)
def test_a_folder_becomes_the_converters_file(kind: str, shapes: str, tmp_path: Path) -> None:
    """Every key of the architecture with the builder's value and type, every tensor's name, shape and format."""
    model = model_of(kind, **SHAPES[shapes])
    folder = save_folder(model, tmp_path / "model")
    merged(folder, write_adapter(folder, tmp_path / "a", targets=["*.0.self_attn.q_proj"]), tmp_path / "ours.gguf")
    ours, theirs = read_gguf(tmp_path / "ours.gguf"), read_gguf(write_moe_gguf(tmp_path / "theirs.gguf", model))
    own = {key for key in ours.metadata if key.startswith("gemma4.")}
    assert own == {key for key in theirs.metadata if key.startswith("gemma4.")} | {"gemma4.vocab_size"}
    for key in own - {"gemma4.vocab_size"}:
        assert ours.metadata[key] == theirs.metadata[key], key
        assert ours.types[key] == theirs.types[key], key
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        assert (ours.tensors[name].shape, ours.tensors[name].type) == (tensor.shape, tensor.type), name
        if name != "blk.0.attn_q.weight":
            assert np.array_equal(ours.tensors[name].data, tensor.data), name


def test_a_multimodal_folder_becomes_its_text_part(tmp_path: Path) -> None:
    """Gemma4ForConditionalGeneration: the merged file is the adapted language model, its tower is not in it."""
    folder = folder_of("gemma4", tmp_path / "model")
    adapter = write_adapter(folder, tmp_path / "adapter")
    merged(folder, adapter, tmp_path / "m.gguf")
    want = logits(lorafit.load(folder, adapter=adapter, compute="fp32"), IDS)
    torch.testing.assert_close(
        logits(lorafit.load(tmp_path / "m.gguf", compute="fp32"), IDS), want, rtol=1e-4, atol=1e-4
    )
    assert not any("vision" in name or name.startswith("v.") for name in read_gguf(tmp_path / "m.gguf").tensors)


def test_q8_0_leaves_scales_and_router_in_f32(tmp_path: Path) -> None:
    """Matrices are quantised, experts and embeddings for each layer too; what llama.cpp wants in F32 is F32."""
    for kind in ("small", "experts"):
        changes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
        changes |= {"hidden_size_per_layer_input": 32} if kind == "small" else {}
        folder = save_folder(model_of(kind, **changes), tmp_path / kind)
        adapter = write_adapter(folder, tmp_path / f"{kind}-a", targets=EVERYTHING[kind])
        merged(folder, adapter, tmp_path / f"{kind}.gguf", "Q8_0")
        for name, tensor in read_gguf(tmp_path / f"{kind}.gguf").tensors.items():
            small = len(tensor.shape) == 1 or "ffn_gate_inp" in name
            assert tensor.type.name == ("F32" if small else "Q8_0"), name


def test_logits_that_are_not_capped_stay_so(tmp_path: Path) -> None:
    """llama.cpp caps them at 30 where the file does not say: so it says 0."""
    folder = save_folder(model_of("dense", final_logit_softcapping=None), tmp_path / "model")
    adapter = write_adapter(folder, tmp_path / "a")
    merged(folder, adapter, tmp_path / "m.gguf")
    assert read_gguf(tmp_path / "m.gguf").metadata["gemma4.final_logit_softcapping"] == 0.0
    assert lorafit.load(tmp_path / "m.gguf").config.final_logit_softcapping is None
    file = write_moe_gguf(tmp_path / "silent.gguf", model_of("dense"), final_logit_softcapping=None)
    assert lorafit.load(file).config.final_logit_softcapping == 30.0


def test_its_tokenizer_is_written_as_the_converter_writes_it(tmp_path: Path) -> None:
    """Tokens, types, merges and special ids equal those of gguf-py's own reading of the folder; the ids survive."""
    folder = write_gemma4_folder(tmp_path / "tokenizer")
    wanted = gemma4_gguf_metadata(folder)
    vocabulary = len(wanted["tokenizer.ggml.tokens"])
    path = save_folder(model_of("dense", vocab_size=vocabulary), tmp_path / "model")
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    merged(path, write_adapter(path, tmp_path / "a"), tmp_path / "m.gguf")
    found = read_gguf(tmp_path / "m.gguf")
    for key in ("model", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "add_space_prefix"):
        assert found.metadata[f"tokenizer.ggml.{key}"] == wanted[f"tokenizer.ggml.{key}"], key
    text = "The harbour\n\n\n was  quiet: 東京 🚢<turn|>"
    assert (
        from_gguf(found).encode(text).ids == lorafit.load(path).tokenizer(text, add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize("kind", GEMMA4)
def test_base_plus_adapter_is_the_merged_file(kind: str, tmp_path: Path) -> None:
    """base + alpha / r * lora_b lora_a, tensor by tensor, is the merged file; the adapter file is read back here."""
    model = model_of(kind)
    folder, base = save_folder(model, tmp_path / "m"), write_moe_gguf(tmp_path / "m.gguf", model)
    adapter = write_adapter(base, tmp_path / "a", targets=SAFE[kind])
    merged(base, adapter, tmp_path / "merged.gguf")
    files = [read_gguf(tmp_path / name) for name in ("m.gguf", "merged.gguf")]
    for path in (base, folder):
        out = tmp_path / f"{path.name}-a.gguf"
        done = run("export", path, adapter, "--to", "gguf", "--out", out)
        assert done.code == 0, done.err
        reader = gguf.GGUFReader(out)
        halves = {tensor.name: tensor.data for tensor in reader.tensors}
        scale = reader.fields["adapter.lora.alpha"].contents() / 4
        changed = 0
        for name, tensor in files[0].tensors.items():
            values, want = (file.tensors[name].data.view("<f4").reshape(tensor.shape) for file in files)
            if f"{name}.lora_a" in halves:
                values = values + scale * halves[f"{name}.lora_b"] @ halves[f"{name}.lora_a"]
                changed += 1
            np.testing.assert_allclose(values, want, rtol=1e-5, atol=1e-6)
        assert 2 * changed == len(halves) > 0
        got = logits(lorafit.load(path, adapter=out, compute="fp32"), IDS)
        torch.testing.assert_close(
            got, logits(lorafit.load(base, adapter=adapter, compute="fp32"), IDS), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "small",
            "model.per_layer_model_projection: lies in per_layer_model_proj, and llama.cpp takes no adapter there",
        ),
        (
            "experts",
            "experts.down_proj: lies in ffn_down_exps, where llama.cpp's versions scale an adapter differently",
        ),
    ],
)
def test_updates_that_llama_cpp_does_not_make_are_refused(kind: str, said: str, tmp_path: Path) -> None:
    """One line with the layer and what to do; no file."""
    base = write_moe_gguf(tmp_path / "m.gguf", model_of(kind))
    adapter = write_adapter(base, tmp_path / "a", targets=EVERYTHING[kind])
    done = run("export", base, adapter, "--to", "gguf", "--out", tmp_path / "a.gguf")
    assert done.code == 2
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "a.gguf").exists()


def test_new_tokens_have_rows_in_both_tables(tmp_path: Path) -> None:
    """Of the small models, whose layers have an embedding of their own: the file's tables are as long, and it answers
    as the folder with its adapter."""
    folder = save_folder(model_of("small"), tmp_path / "model")
    rows = "".join(json.dumps({"prompt": f"{n} <a>", "completion": "<b> yes"}) + "\n" for n in range(12))
    (tmp_path / "rows.jsonl").write_text(rows)
    run_folder, tokens = tmp_path / "run", ["<a>", "<b>"]
    lorafit.train(model=folder, data=tmp_path / "rows.jsonl", out=run_folder, new_tokens=tokens, **QUICK)
    adapter, out = run_folder / "adapter", tmp_path / "m.gguf"
    done = run("export", folder, adapter, "--to", "gguf-merged", "--dtype", "F32", "--out", out)
    assert done.code == 0, done.err
    ids = torch.tensor([[1, 5, VOCABULARY, 9, VOCABULARY + 1, 7]])
    want = logits(lorafit.load(folder, adapter=adapter, compute="fp32"), ids)
    torch.testing.assert_close(logits(lorafit.load(out, compute="fp32"), ids), want, rtol=1e-4, atol=1e-4)


def test_layers_that_gguf_cannot_say_are_refused(tmp_path: Path) -> None:
    """A folder whose layers share otherwise than llama.cpp lets them, or whose rotary frequencies are scaled."""
    sharing = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]}
    ropes = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
             "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "factor": 2.0}}  # fmt: skip
    for kind, changes, said in (
        ("small", sharing, "gemma4.attention.shared_kv_layers is 2, and before these there is no layer"),
        ("dense", {"layer_types": ["full_attention"] * 4}, "sliding_window_pattern lets no layer's window slide"),
        ("dense", {"rope_parameters": ropes}, "rope_freqs.weight is no table of ones and then 1e30"),
    ):
        folder = save_folder(model_of(kind, **changes), tmp_path / "model")
        adapter = write_adapter(folder, tmp_path / "adapter")
        done = run("export", folder, adapter, "--to", "gguf-merged", "--out", tmp_path / "out" / "m.gguf")
        assert done.code == 2, json.dumps(done.json)
        assert f"{folder}: " in done.err
        assert said in done.err
        assert not list((tmp_path / "out").iterdir())
