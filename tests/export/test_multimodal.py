"""Multimodal folders: merged they are multimodal again, and their text part goes to GGUF."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import lorafit
from builders.adapters import logits, write_adapter
from builders.architectures import WRAPPED, folder_of, reference, save_wrapper
from builders.commands import run
from builders.gguf_models import LATENT, wrapper_of, written
from builders.tokenizers_tiny import VOCABULARY
from lorafit.adapter.experts import expert_layers
from lorafit.export import merge as merging
from lorafit.formats.bitsandbytes import Nf4Parts, quantization_config, write_nf4
from lorafit.formats.safetensors import INDEX
from lorafit.frozen.packed import quantise
from lorafit.kernels import ops
from lorafit.model.architectures import IMAGE_TEXT, own_name

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3]])


def adapter_on(folder, path, **options):
    """On every linear layer of the text part, and its experts."""
    experts = ["experts"] if expert_layers(lorafit.load(folder, compute="fp32")) else []
    return write_adapter(folder, path, targets=["all-linear", *experts], **options)


def off(got, want) -> float:
    """The largest difference of logits beside the largest logit."""
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("names", ["saved", "plain"])
@pytest.mark.parametrize("name", WRAPPED)
def test_a_merged_folder_is_multimodal(name, names, tmp_path):
    """transformers loads it as the multimodal class, whatever names the base's files have; the tower has its bytes,
    where its dtype is another too, and text has the logits of PEFT on transformers' own model."""
    folder, whole = folder_of(name, tmp_path / "model"), reference(name)
    file = folder / "model.safetensors"
    state = load_file(file) if names == "saved" else {n: t.clone() for n, t in whole.state_dict().items()}
    tower = {key: value.bfloat16() for key, value in state.items() if own_name(key) is None}
    assert tower
    save_file({**state, **tower}, file)
    adapter = adapter_on(folder, tmp_path / "adapter")
    done = run("merge", folder, adapter, "--out", tmp_path / "merged", "--dtype", "fp32", "--json")
    assert done.code == 0, done.err
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in tower.items())
    assert {key for key in found if own_name(key) is None} == tower.keys()
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert type(theirs) is type(whole)
    want = logits(peft.PeftModel.from_pretrained(whole, adapter), IDS)
    assert off(logits(theirs, IDS), want) < 3e-5
    assert off(logits(lorafit.load(tmp_path / "merged", compute="fp32"), IDS), want) < 3e-5
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["model_type"] == name.partition("-")[0]
    assert config["vision_config"] == json.loads((folder / "config.json").read_text())["vision_config"]


def test_shards_name_the_tower_too(tmp_path, monkeypatch):
    """Cut into files, the index names every tensor of the model, and transformers finds none missing."""
    monkeypatch.setattr(merging, "SHARD", 20_000)
    folder = folder_of("gemma3", tmp_path / "model")
    shutil.copyfile(folder / "config.json", folder / "preprocessor_config.json")  # any file of that name goes along
    done = run("merge", folder, adapter_on(folder, tmp_path / "a"), "--out", tmp_path / "merged", "--dtype", "bf16")
    assert done.code == 0, done.err
    named = json.loads((tmp_path / "merged" / INDEX).read_text())["weight_map"]
    assert named.keys() == load_file(folder / "model.safetensors").keys()
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    _, told = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]


def test_added_tokens_grow_the_text_part(tmp_path):
    """An adapter with new tokens: the text part's vocabulary is larger in the configuration, and the tower's is not."""
    folder = folder_of("gemma3", tmp_path / "model")
    model = lorafit.load(folder, compute="fp32")
    lorafit.attach(model, rank=2, targets=["q_proj"], new_tokens=["<sql>"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "B" in name.rsplit(".", 1)[-1]:
                parameter.normal_(std=0.1)
    lorafit.save_adapter(model, tmp_path / "adapter", {"base_model": str(folder)})
    done = run("merge", folder, tmp_path / "adapter", "--out", tmp_path / "merged", "--dtype", "fp32")
    assert done.code == 0, done.err
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert theirs.get_input_embeddings().weight.shape[0] == theirs.config.text_config.vocab_size


def test_a_quantised_tower_is_unpacked(tmp_path):
    """A folder that bitsandbytes quantised, tower and all: the result is plain, so the tower's NF4 becomes bf16."""
    folder = folder_of("gemma3", tmp_path / "model")
    state, tower = load_file(folder / "model.safetensors"), torch.randn(64, 64)
    stored = quantise(tower, "nf4").stored
    parts = Nf4Parts(stored.data, stored.scales, stored.nested, stored.offset, (64, 64))
    quantised = write_nf4("vision_tower.more.weight", parts, "bfloat16")
    save_file({name: tensor.bfloat16() for name, tensor in state.items()} | quantised, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization_config()}))
    done = run("merge", folder, adapter_on(folder, tmp_path / "a"), "--out", tmp_path / "merged")
    assert done.code == 0, done.err
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(found["vision_tower.more.weight"], ops.values(stored).bfloat16())
    assert found.keys() == state.keys() | {"vision_tower.more.weight"}
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize("name", WRAPPED)
def test_gguf_of_a_wrapper(name, tmp_path):
    """The adapter of a multimodal folder on the GGUF file of its text part, and the text part with it in one file, have
    the logits that the folder has with its adapter; the architecture is the one that llama.cpp's converter gives."""
    whole = wrapper_of(name)
    folder, text = save_wrapper(whole, tmp_path / "model"), text_of(whole)
    base = written(text, tmp_path / "base.gguf", "mistral3" if name == "mistral3-mistral" else "")
    latent = text.config.model_type in LATENT
    adapter = adapter_on(folder, tmp_path / "adapter")
    want = logits(lorafit.load(folder, adapter=adapter, compute="fp32"), IDS % VOCABULARY)
    merged = run("export", folder, adapter, "--to", "gguf-merged", "--dtype", "F32", "--out", tmp_path / "merged.gguf")
    assert merged.code == 0, merged.err
    got = logits(lorafit.load(tmp_path / "merged.gguf", compute="fp32"), IDS % VOCABULARY)
    assert off(got, want) < 3e-5
    done = run("export", folder, adapter, "--to", "gguf", "--out", tmp_path / "a.gguf")
    assert done.code == (2 if latent else 0), done.err
    if not latent:
        got = logits(lorafit.load(base, adapter=tmp_path / "a.gguf", compute="fp32"), IDS % VOCABULARY)
        assert off(got, want) < 3e-5


@pytest.mark.parametrize("name", WRAPPED)
def test_peft_and_extract_of_a_wrapper(name, tmp_path):
    """PEFT has the exported adapter's logits on transformers' multimodal class, and the merged folder's difference from
    the base is the adapter again, under the text part's longer paths."""
    folder = folder_of(name, tmp_path / "model")
    adapter = write_adapter(folder, tmp_path / "adapter")
    done = run("export", folder, adapter, "--to", "peft", "--out", tmp_path / "peft", "--json")
    assert done.code == 0, done.err
    assert done.json["program"] == "PEFT"
    assert done.json["largest_difference"] < 1e-3
    assert run("merge", folder, adapter, "--out", tmp_path / "merged", "--dtype", "fp32").code == 0
    done = run("extract", folder, tmp_path / "merged", "--rank", 4, "--out", tmp_path / "again", "--json")
    assert done.code == 0, done.err
    assert done.json["kept"] > 0.999
    weights = [load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "again")]
    assert weights[0].keys() == weights[1].keys()
    models = [lorafit.load(folder, adapter=path, compute="fp32") for path in (tmp_path / "again", adapter)]
    assert off(*(logits(model, IDS) for model in models)) < 1e-3


def text_of(whole):
    """The text part of a multimodal model as a model of its own."""
    config = AutoConfig.for_model(**whole.config.text_config.to_dict())
    config.tie_word_embeddings = whole.config.tie_word_embeddings
    maker = AutoModelForImageTextToText if config.model_type in IMAGE_TEXT else AutoModelForCausalLM
    text = maker.from_config(config, attn_implementation="eager").float().eval()
    named = ((own_name(key), value) for key, value in whole.state_dict().items())
    text.load_state_dict({own: value for own, value in named if own is not None})
    return text
