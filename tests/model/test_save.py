"""What is quantised here loads in transformers with bitsandbytes, and comes back here."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorafit
from builders.models import save_folder, tiny_model
from lorafit.errors import ConfigError
from lorafit.model.load import frozen_weights
from lorafit.model.save import save_nf4

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3]])
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_transformers_loads_it_with_the_same_values(family, tmp_path):
    """Every NF4 layer unpacks there to our values, the tokenizer comes along; logits agree as far as bf16 lets them."""
    plain = save_folder(tiny_model(family, **WIDE), tmp_path / "plain")
    ours = lorafit.load(plain, base="nf4", compute="fp32")
    save_nf4(ours, tmp_path / "nf4")
    again = lorafit.load(tmp_path / "nf4", compute="fp32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32, device_map="cpu").train()
    layers = {name: m for name, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(layers) == 14
    for name, layer in layers.items():
        values = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(ours.get_submodule(name).weight.dense(values.dtype), values)
        assert torch.equal(again.get_submodule(name).weight.data, ours.get_submodule(name).weight.data)
    with torch.no_grad():
        got, want = again(input_ids=IDS).logits, theirs(IDS, use_cache=False).logits
    # theirs runs in bf16, whose roundings came to 2 % of these random models' logits; a wrong layer would be 50 %
    assert (got - want).abs().mean() < 0.05 * want.abs().mean()
    text = "SELECT name FROM people"
    assert AutoTokenizer.from_pretrained(tmp_path / "nf4")(text)["input_ids"] == ours.tokenizer(text)["input_ids"]


def test_a_model_without_nf4_or_a_folder_that_exists_is_refused(tmp_path):
    """Nothing is written."""
    plain = save_folder(tiny_model("llama", **WIDE), tmp_path / "plain")
    with pytest.raises(ConfigError, match="has no layer in NF4"):
        save_nf4(lorafit.load(plain), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = lorafit.load(plain, base="nf4")
    with pytest.raises(ConfigError, match="exists already"):
        save_nf4(model, plain)
    assert {weight.format for weight in frozen_weights(model).values()} >= {"NF4"}
