"""Merged equals unmerged, whatever the base's format; nothing half-written; several adapters combined."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import lorafit
from builders.adapters import logits, write_adapter
from builders.commands import run
from builders.gguf_files import write_tiny_gguf
from builders.models import save_folder, tiny_model
from builders.tokenizers_tiny import VOCABULARY, tiny_gguf_metadata
from lorafit.export import merge as merging
from lorafit.formats.safetensors import INDEX, open_folder

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny llama folder with two adapters, a and b, of different ranks, scales and layers."""
    folder = tmp_path_factory.mktemp("base")
    model = save_folder(tiny_model("llama"), folder / "model")
    write_adapter(model, folder / "a")
    write_adapter(model, folder / "b", rank=2, alpha=3, targets=["q_proj", "down_proj"], seed=1)
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_merged_is_unmerged(family, tmp_path):
    """In fp32 the merged folder gives the adapted model's logits to 1e-4, here and in transformers, and the
    tokenizer's ids; a tied head stays tied."""
    model = save_folder(tiny_model(family), tmp_path / "model")
    adapter = write_adapter(model, tmp_path / "adapter")
    done = run("merge", model, adapter, "--out", tmp_path / "merged", "--dtype", "fp32", "--json")
    assert done.code == 0, done.err
    assert done.json["largest_error"] == 0.0
    want = logits(lorafit.load(model, adapter=adapter, compute="fp32"), IDS)
    torch.testing.assert_close(
        logits(lorafit.load(tmp_path / "merged", compute="fp32"), IDS), want, rtol=1e-4, atol=1e-4
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs, IDS), want, rtol=1e-4, atol=1e-4)
    tied = tiny_model(family).config.tie_word_embeddings
    assert ("lm_head.weight" in open_folder(tmp_path / "merged").shapes) is not tied
    text = "SELECT name FROM people"
    made, own = (PreTrainedTokenizerFast.from_pretrained(tmp_path / name) for name in ("merged", "model"))
    assert made(text)["input_ids"] == own(text)["input_ids"]
    assert made.chat_template == own.chat_template


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_mixture_whose_choices_change_is_merged(dtype, tmp_path):
    """Rounding Mixtral's weights to 16 bits sends tokens to other experts, which moves log-probabilities by more than
    half of what a weak adapter does: no error, as no weight is further off than rounding; said."""
    wide = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96}
    model = save_folder(tiny_model("mixtral", **wide), tmp_path / "model")
    adapter = write_adapter(model, tmp_path / "a", spread=0.01, targets=["all-linear", "experts"])
    done = run("merge", model, adapter, "--out", tmp_path / "merged", "--dtype", dtype, "--json")
    assert done.code == 0, done.err
    assert "a finer --dtype keeps more of it" in done.err


def test_a_quantised_gguf_becomes_a_plain_folder(tmp_path):
    """A Q4_0 file with an adapter, merged: the unpacked values plus the update, rounded once to bf16, and said."""
    wide = tiny_model("llama", hidden_size=64, intermediate_size=96)
    model = write_tiny_gguf(tmp_path / "model.gguf", wide, "llama", tiny_gguf_metadata(), "Q4_0")
    adapter = write_adapter(model, tmp_path / "adapter")
    done = run("merge", model, adapter, "--out", tmp_path / "merged", "--json")
    assert done.code == 0, done.err
    assert "the base is quantised (Q4_0)" in done.err
    assert done.json["dtype"] == "bf16"
    found = open_folder(tmp_path / "merged")
    worst = 0.0
    plain = lorafit.load(model, adapter=adapter, compute="fp32")
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        adapted = plain.get_submodule(layer)
        exact = adapted.base.weight.dense() + adapted.adapter.scale * adapted.adapter.B @ adapted.adapter.A
        assert torch.equal(found.load(f"{layer}.weight"), exact.bfloat16())
        worst = max(worst, float((exact.bfloat16().float() - exact).abs().max()))
    assert worst <= done.json["largest_error"] < 0.02
    assert 0 < done.json["mean_error"] < done.json["largest_error"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ours = lorafit.load(tmp_path / "merged", compute="fp32")
    torch.testing.assert_close(logits(theirs, IDS), logits(ours, IDS), rtol=1e-4, atol=1e-4)
    template = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text()).get("chat_template")
    assert template is None
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == plain.tokenizer.chat_template
    ends = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [0, 2]


def test_sharded_is_whole(base, tmp_path, monkeypatch):
    """Cut into several files with an index, the same tensors come back."""
    run("merge", base / "model", base / "a", "--out", tmp_path / "one")
    monkeypatch.setattr(merging, "SHARD", 40_000)
    assert run("merge", base / "model", base / "a", "--out", tmp_path / "many").code == 0
    one, many = open_folder(tmp_path / "one"), open_folder(tmp_path / "many")
    assert (tmp_path / "many" / INDEX).is_file()
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    assert one.shapes == many.shapes
    assert all(torch.equal(one.load(name), many.load(name)) for name in one.shapes)


def test_weights_scale_each_adapter(base, tmp_path):
    """merge a b --weights 0.5,-1 adds half of a and takes b away, also where only one of them has the layer."""
    out = tmp_path / "merged"
    done = run("merge", base / "model", base / "a", base / "b", "--out", out, "--weights", "0.5,-1", "--dtype", "fp32")
    assert done.code == 0, done.err
    found, plain = open_folder(out), open_folder(base / "model")
    a, b = (lorafit.load(base / "model", adapter=base / name, compute="fp32") for name in "ab")
    for layer, both in (("model.layers.0.self_attn.q_proj", True), ("model.layers.0.self_attn.k_proj", False)):
        first, second = (model.get_submodule(layer) for model in (a, b))
        want = plain.load(f"{layer}.weight") + 0.5 * first.adapter.scale * first.adapter.B @ first.adapter.A
        if both:
            want = want - second.adapter.scale * second.adapter.B @ second.adapter.A
        torch.testing.assert_close(found.load(f"{layer}.weight"), want.detach())


@pytest.mark.parametrize("how", [("add",), ("ties", "--density", "0.5"), ("dare", "--seed", "3"), ("dare-ties",)])
def test_combined_adapter_is_the_combined_merge(how, base, tmp_path):
    """The combined adapter, put on the base, is the model merged the same way, where its rank is not cut."""
    common = ("merge", base / "model", base / "a", base / "b", "--weights", "1,0.5", "--combine", *how)
    assert run(*common, "--out", tmp_path / "merged", "--dtype", "fp32").code == 0
    whole = () if how[0] == "add" else ("--rank", "48")  # no matrix has a higher one
    done = run(*common, "--out", tmp_path / "adapter", "--as-adapter", *whole, "--json")
    assert done.code == 0, done.err
    assert done.json["kept"] == pytest.approx(1.0, abs=1e-5)
    merged = lorafit.load(tmp_path / "merged", compute="fp32")
    adapted = lorafit.load(base / "model", adapter=tmp_path / "adapter", compute="fp32")
    torch.testing.assert_close(logits(adapted, IDS), logits(merged, IDS), rtol=1e-3, atol=1e-3)


def test_cut_to_a_rank_says_what_is_kept(base, tmp_path):
    """--rank 2 keeps less than all, says how much, and the adapter has that rank."""
    done = run("merge", base / "model", base / "a", "--out", tmp_path / "a2", "--as-adapter", "--rank", "2", "--json")
    assert done.json["rank"] == 2
    assert 0.4 < done.json["kept"] < 0.95
    assert json.loads((tmp_path / "a2" / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--weights", "1,2"), "--weights: gives 2 numbers for 1 adapters"),
        (("--weights", "one"), "--weights: is one"),
        (("--density", "0"), "--density: is 0"),
        (("--rank", "4"), "--rank: is given without --as-adapter"),
        (("--as-adapter", "--combine", "ties"), "--rank: ties gives updates of full rank"),
    ],
)
def test_what_cannot_be_meant_is_said(arguments, said, base, tmp_path):
    """One line, exit code 2, nothing written."""
    done = run("merge", base / "model", base / "a", "--out", tmp_path / "out", *arguments)
    assert done.code == 2
    assert f"error: {said}" in done.err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused(base):
    """Nothing is overwritten."""
    before = sorted(path.name for path in (base / "b").iterdir())
    done = run("merge", base / "model", base / "a", "--out", base / "b")
    assert done.code == 2
    assert "exists already" in done.err
    assert sorted(path.name for path in (base / "b").iterdir()) == before


def test_a_value_that_fp16_cannot_hold_leaves_nothing(base, tmp_path):
    """An adapter with huge values: refused by name, and the folder begun is gone."""
    loud = write_adapter(base / "model", tmp_path / "loud", spread=1e6)
    done = run("merge", base / "model", loud, "--out", tmp_path / "out" / "merged", "--dtype", "fp16")
    assert done.code == 2
    assert "fp16 cannot hold model.layers.0." in done.err
    assert list((tmp_path / "out").iterdir()) == []


def test_an_adapter_that_changes_nothing_is_refused(base, tmp_path):
    """B of zeros: there is nothing to merge."""
    silent = write_adapter(base / "model", tmp_path / "silent", spread=0.0)
    done = run("merge", base / "model", silent, "--out", tmp_path / "out")
    assert done.code == 2
    assert "changes nothing: every B is zero" in done.err
    assert not (tmp_path / "out").exists()
