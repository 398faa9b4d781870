"""A model on disk becomes a frozen model with transformers' own logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafit
from builders.models import FAMILIES, frozen, save_folder, tiny_model
from lorafit.errors import LorafitError, ModelError
from lorafit.frozen.linear import FrozenLinear

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3], [8, 1, 4, 4, 90, 2, 6, 301, 12, 77]])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tmp_path):
    """The same weights through our frozen layers and attention: max difference under 1e-5, in fp32."""
    original = tiny_model(family)
    with torch.no_grad():
        want = original(IDS, use_cache=False).logits
        got = frozen(original, tmp_path).model(input_ids=IDS).logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_everything_is_frozen_and_nothing_is_left_on_meta(tmp_path):
    """No parameter asks for a gradient; linear layers are ours; every tensor has values."""
    model = frozen(tiny_model("qwen2"), tmp_path).model
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert isinstance(model.model.layers[0].self_attn.q_proj, FrozenLinear)
    assert not any(type(m) is torch.nn.Linear for m in model.modules())


def test_a_tied_head_shares_the_embeddings_memory(tmp_path):
    """One matrix, not two."""
    model = frozen(tiny_model("gemma3_text"), tmp_path).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_sharded_folders_load_too(tmp_path):
    """Two shards with an index give the logits of one file."""
    original = tiny_model("llama")
    save_folder(original, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({n: tensors[n] for n in members}, tmp_path / file, metadata={"format": "pt"})
    index = {"weight_map": {n: file for file, members in parts.items() for n in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = lorafit.load(tmp_path, compute="fp32")
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS).logits, original(IDS, use_cache=False).logits, atol=1e-4)


def broken(folder: Path, change) -> Path:
    """A folder whose tensors were changed."""
    save_folder(tiny_model("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(UP), f"{UP}: is missing"),
        (lambda t: t.update({"model.extra.weight": torch.zeros(3)}), "model.extra.weight: has no place"),
        (lambda t: t.update({UP: torch.zeros(47, 32)}), r"has shape [47, 32], the configuration says [48, 32]"),
    ],
)
def test_missing_unexpected_and_misshapen_tensors_are_errors(tmp_path, change, words):
    """Nothing is filled in at random and nothing is ignored: one line with the tensor's name."""
    with pytest.raises(LorafitError) as caught:
        lorafit.load(broken(tmp_path, change))
    (line,) = caught.value.lines()
    assert words in line


def test_all_faulty_tensors_are_reported_at_once(tmp_path):
    """Two missing, one extra: three lines."""

    def change(tensors):
        tensors.pop(UP)
        tensors.pop("model.norm.weight")
        tensors["more"] = torch.zeros(1)

    with pytest.raises(LorafitError) as caught:
        lorafit.load(broken(tmp_path, change))
    assert len(caught.value.lines()) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "lama"}, "'lama' is not supported yet; the nearest supported one is llama"),
        ({"model_type": "x\nimport os"}, "is not supported yet"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised folders are not supported yet"),
    ],
)
def test_models_that_we_cannot_load_are_refused_by_name(tmp_path, change, words):
    """An unknown architecture names the nearest known one."""
    save_folder(tiny_model("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=words.replace("(", r"\(")):
        lorafit.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 33},
        {"hidden_size": "x"},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"max_position_embeddings": "a"},
        {"max_position_embeddings": 0},
        {"rope_parameters": {"rope_type": "zz"}},
        {"rope_parameters": 3},
        {"hidden_act": "zzz"},
        {"eos_token_id": "x"},
    ],
)
def test_an_impossible_configuration_is_one_line(tmp_path, change):
    """Numbers and names that describe no model end in one error, before anything large is built."""
    save_folder(tiny_model("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(LorafitError) as caught:
        lorafit.load(tmp_path)
    assert all("\n" not in line and str(tmp_path) in line for line in caught.value.lines())


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    """Token ids beyond the matrix are found before training, not in step 1."""
    save_folder(tiny_model("llama", vocab_size=300), tmp_path)
    with pytest.raises(ModelError, match="tokenizer: has 400 tokens and the embedding 300 rows"):
        lorafit.load(tmp_path)


def test_code_in_a_folder_is_never_run(tmp_path):
    """`auto_map` and Python files beside the weights are data like any other."""
    save_folder(tiny_model("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "modeling_x.py").write_text("raise SystemExit('ran')")
    auto = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.C"}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **auto}))
    assert lorafit.load(tmp_path) is not None


def test_load_gives_a_module_with_logits_and_a_tokenizer(tmp_path):
    """The Python face: [B, L] ids in, [B, L, V] logits out, eval mode, tokenizer beside it."""
    save_folder(tiny_model("llama"), tmp_path)
    model = lorafit.load(tmp_path, base="fp32", compute="fp32")
    assert model(input_ids=IDS).logits.shape == (2, 10, 512)
    assert not model.training
    ids = model.tokenizer("SELECT name")["input_ids"]
    assert model.tokenizer.decode(ids) == "SELECT name"
    with pytest.raises(ModelError, match="does not exist"):
        lorafit.load(tmp_path / "nowhere")
