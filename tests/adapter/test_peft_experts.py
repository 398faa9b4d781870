"""Adapters on experts in PEFT's files, both layouts, both ways."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from builders.models import MOE_FAMILIES, frozen, tiny_model
from lorafit.adapter.attach import adapted_layers, attach
from lorafit.adapter.file import load_adapter, save_adapter
from lorafit.adapter.peft_experts import WHOLE
from lorafit.errors import AdapterError, LorafitError

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3], [8, 1, 4, 4, 90, 2, 6, 301, 12, 77]])
LATENT = ("deepseek_v3", "mistral4")
ROUTERS = {"gpt_oss": "router", "granitemoe": "router", "llama4_text": "router", "gemma4_text": "router.proj"}
SPLIT = [family for family in MOE_FAMILIES if family not in WHOLE]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def trained(family: str, folder: Path, targets: list[str], **options):
    """A tiny frozen model whose adapter is not zero."""
    model = frozen(tiny_model(family), folder).model
    attach(model, rank=4, alpha=8, targets=targets, **options)
    torch.manual_seed(3)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.adapter.B, std=0.1)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def in_peft(family: str, folder: Path):
    return peft.PeftModel.from_pretrained(tiny_model(family), folder)


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("targets", [["all-linear", "experts"], ["experts.down_proj"], ["experts.gate_up_proj"], []])
def test_our_adapter_in_peft_gives_our_logits_and_comes_back(family, targets, tmp_path):
    """Fused layout: on PEFT's side logits are equal within 1e-5; saved again by PEFT and loaded here they are equal
    too. Everything, one parameter of the two, and a router beside a linear layer (named by itself)."""
    targets = targets or ["o_proj" if family in LATENT else "q_proj", ROUTERS.get(family, "gate")]
    own = trained(family, tmp_path / "model", targets)
    save_adapter(own, tmp_path / "adapter")
    theirs = in_peft(family, tmp_path / "adapter")
    got = logits(own)
    assert relative(got, logits(theirs)) < 1e-5
    assert relative(got, logits(frozen(tiny_model(family), tmp_path / "model").model)) > 1e-2
    theirs.save_pretrained(tmp_path / "back", save_embedding_layers=False)
    for folder in ("adapter", "back"):
        again = frozen(tiny_model(family), tmp_path / "model").model
        load_adapter(again, tmp_path / folder)
        assert relative(logits(again), got) < 1e-6


@pytest.mark.parametrize("family", SPLIT)
def test_the_split_layout_is_read_by_peft_and_by_us(family, tmp_path):
    """A pair of tensors for each expert's gate, up and down: PEFT and we give the logits of the fused adapter."""
    own = trained(family, tmp_path / "model", ["experts", "o_proj"])
    save_adapter(own, tmp_path / "adapter", experts="split")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    single = ".block_sparse_moe.experts.5.w3." if family == "mixtral" else ".mlp.experts.5.up_proj."
    assert f"base_model.model.model.layers.1{single}lora_B.weight" in names
    assert relative(logits(own), logits(in_peft(family, tmp_path / "adapter"))) < 1e-5
    again = frozen(tiny_model(family), tmp_path / "model").model
    load_adapter(again, tmp_path / "adapter")
    assert relative(logits(again), logits(own)) < 1e-6
    ranks = {path.rpartition(".")[2]: layer.adapter.rank for path, layer in adapted_layers(again)}
    assert ranks == {"gate_up_proj": 8, "down_proj": 4, "o_proj": 4}


def test_pefts_adapter_on_experts_is_read(tmp_path):
    """`target_parameters` and `target_modules` as PEFT users write them, with ranks of their own."""
    options = [
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
        {"target_parameters": ["experts.down_proj"], "target_modules": [], "rank_pattern": {"down_proj": 2}},
    ]
    for number, own in enumerate(options):
        torch.manual_seed(5)
        config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **own)
        theirs = peft.get_peft_model(tiny_model("qwen3_moe"), config)
        theirs.save_pretrained(tmp_path / str(number), save_embedding_layers=False)
        ours = frozen(tiny_model("qwen3_moe"), tmp_path / "model").model
        load_adapter(ours, tmp_path / str(number))
        assert relative(logits(ours), logits(theirs)) < 1e-5


def test_what_has_no_single_experts_is_not_split(tmp_path):
    """gpt-oss's experts are published as a whole: one line, and nothing is written."""
    own = trained("gpt_oss", tmp_path / "model", ["experts"])
    with pytest.raises(AdapterError, match="the experts of gpt_oss are known as a whole only"):
        save_adapter(own, tmp_path / "adapter", experts="split")
    assert not (tmp_path / "adapter").exists()


GATE_UP = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
DOWN = "base_model.model.model.layers.0.mlp.experts.lora_B.weight"
FAULTS = {
    "missing half": (lambda t: t.pop(GATE_UP), "layers.0.mlp.experts.base_layer.lora_A.weight: is missing"),
    "missing layer": (lambda t: [t.pop(k) for k in list(t) if "layers.1." in k], "layers.1.mlp.experts.*: is missing"),
    "shape": (lambda t: t.update({DOWN: torch.zeros(32, 23)}), r"has shapes \[24, 24\] and \[32, 23\]; 6 experts need"),
    "rank": (lambda t: t.update({k: v[: len(v) // 2] if "A" in k else v[:, ::2] for k, v in t.items()}), "has rank 2"),
    "nan": (lambda t: t[DOWN].fill_(float("nan")), "mlp.experts.down_proj: holds NaN"),
    "extra": (lambda t: t.update({DOWN.replace("experts", "experts.9.up_proj"): torch.zeros(2, 2)}), "is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_adapter_of_experts_is_refused(fault, tmp_path):
    """Missing, misshapen, non-finite or of another rank: refused with its place, and nothing is attached."""
    change, words = FAULTS[fault]
    save_adapter(trained("qwen3_moe", tmp_path / "model", ["experts"]), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    model = frozen(tiny_model("qwen3_moe"), tmp_path / "model").model
    with pytest.raises(LorafitError, match=words):
        load_adapter(model, tmp_path / "adapter")
    assert not list(adapted_layers(model))


def test_a_split_adapter_without_one_expert_is_refused(tmp_path):
    """Each expert must be there, and the error names the first that is not; of a layer that is gone too."""
    save_adapter(trained("qwen3_moe", tmp_path / "model", ["experts"]), tmp_path / "adapter", experts="split")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    model = frozen(tiny_model("qwen3_moe"), tmp_path / "model").model
    for gone, words in ((".0.mlp.experts.3.up_proj.", "3.up_proj is missing"), ("layers.1.", "layers.1.*is missing")):
        save_file({k: v for k, v in whole.items() if gone not in k}, file, metadata={"format": "pt"})
        with pytest.raises(LorafitError, match=words):
            load_adapter(model, tmp_path / "adapter")


def test_the_configuration_names_experts_as_parameters(tmp_path):
    """Short names where all layers have them; linear layers that PEFT would take for experts are parameters too, and
    dropout, which PEFT refuses beside parameters, is 0 in the file."""
    model = frozen(tiny_model("qwen2_moe"), tmp_path / "model").model
    attach(model, targets=["all-linear"], dropout=0.1)
    save_adapter(model, tmp_path / "linear")
    config = json.loads((tmp_path / "linear" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["target_parameters"] == [f"shared_expert.{n}_proj.weight" for n in ("down", "gate", "up")]
    assert config["lora_dropout"] == 0
    save_adapter(trained("qwen2_moe", tmp_path / "model", ["experts", "*.0.*.q_proj"]), tmp_path / "both")
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]
