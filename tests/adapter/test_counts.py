"""The literature's counts, on the published shapes: parameters, files, and work."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from builders.models import frozen, tiny_model
from builders.rows import random_rows
from lorafit import catalogue
from lorafit.adapter.attach import adapted_layers, attach, linear_layers
from lorafit.data.batch import pack_rows
from lorafit.training.step import accumulate

GPT3 = {"layers": 96, "width": 12288, "parameters": 175_255_800_000}  # Hu et al. 2021, tables 4 and 5


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_gpt3_has_ten_thousand_times_fewer_trainable_numbers(tmp_path):
    """GPT-3's query and value projections at rank 4: 18,874,368 numbers, 9,285 times fewer than the model has, 37.7 MB
    in 16 bits. The paper's "10,000 times" is that. Source: Hu et al. 2021, arXiv:2106.09685, sections 4.2 and 5.5."""
    with torch.device("meta"):
        width = GPT3["width"]
        layer = {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        model = nn.ModuleList(nn.ModuleDict(layer) for _ in range(1))
    attach(model, rank=4, targets=["q_proj", "v_proj"])
    count = trainable(model) * GPT3["layers"]
    assert count == 18_874_368
    assert round(GPT3["parameters"] / count) == 9285
    assert count * 2 == pytest.approx(37.7e6, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "targets", "per_rank"),
    [
        ("smollm2-135m", ["all-linear"], 305_280),
        ("smollm2-135m", ["q_proj", "v_proj"], 57_600),
        ("gemma-3-270m", ["all-linear"], 237_312),
        ("gemma-3-270m", ["q_proj", "v_proj"], 46_080),
    ],
)
def test_real_models_have_the_counts_of_the_formula(name, targets, per_rank, tmp_path):
    """SmolLM2: 305,280 r for every linear layer, 57,600 r for queries and values; Gemma 3 270M: 237,312 r and 46,080 r.
    A file holds 4 bytes for each and less than 64 KB besides."""
    from builders.published import published

    model = published(name)
    attach(model, rank=8, targets=targets)
    assert trainable(model) == 8 * per_rank
    for _, layer in adapted_layers(model):
        formula = 8 * (layer.base.in_features + layer.base.out_features)
        assert sum(p.numel() for p in layer.adapter.parameters()) == formula
    tensors = {f"base_model.model.{path}.lora_{half}.weight": getattr(layer.adapter, half).detach()
               for path, layer in adapted_layers(model) for half in "AB"}  # fmt: skip
    from lorafit.formats.safetensors import write_safetensors

    write_safetensors(tmp_path / "adapter.safetensors", tensors)
    assert 0 < (tmp_path / "adapter.safetensors").stat().st_size - 4 * 8 * per_rank < 64 * 1024


def test_a_step_costs_two_thirds_of_full_fine_tuning_on_smollm2():
    """Of W weights in products and P numbers in adapters a pass takes 2 W + 3 P to full fine-tuning's 3 W: 0.690 on
    SmolLM2 at rank 8, every linear layer. Source: Schulman et al. 2025, LoRA Without Regret, for the formula."""
    config = catalogue.find("smollm2-135m")
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    keys = width * config["num_key_value_heads"] // config["num_attention_heads"]
    weights = layers * (2 * width * width + 2 * width * keys + 3 * width * inner)
    adapters = 8 * 305_280
    assert weights == pytest.approx(106.2e6, rel=1e-3)
    assert (2 * weights + 3 * adapters) / (3 * weights) == pytest.approx(0.690, abs=5e-4)
    tied = weights + config["vocab_size"] * width
    assert (2 * tied + 3 * adapters) / (3 * tied) == pytest.approx(0.685, abs=2e-3)


def test_our_step_does_the_work_of_the_formula(tmp_path):
    """Products counted in one of our steps: 2 W + 3 P per token, to the first layer's input gradients, which nobody
    needs. So we compute no gradient of a frozen weight."""
    base = frozen(tiny_model("llama", hidden_size=64, intermediate_size=192, num_hidden_layers=6), tmp_path)
    attach(base.model, rank=4)
    (pack,) = pack_rows(random_rows([40], share=1.0), [0], 64)
    base.model.train()
    accumulate(base.model, base.head, [pack])  # what is counted is a step like all others
    not_counted = {  # by torch
        torch.ops.aten.addmm_: lambda own, a, b, **_: 2 * a[0] * a[1] * b[1],
        torch.ops.mkldnn._linear_pointwise: lambda x, w, *_, **__: 2 * x[0] * x[1] * w[0],
    }
    with FlopCounterMode(display=False, custom_mapping=not_counted) as counted:
        accumulate(base.model, base.head, [pack])
    layers = {path: getattr(layer, "base", layer) for path, layer in linear_layers(base.model).items()}
    sizes = {path: layer.in_features * layer.out_features for path, layer in layers.items()}
    body = sum(size for path, size in sizes.items() if path != "lm_head")
    unneeded = sum(size for path, size in sizes.items() if ".layers.0.self_attn." in path and "o_proj" not in path)
    tokens, trained = len(pack.ids_T), len(pack.targets_N)
    wanted = 2 * tokens * (2 * body - unneeded + 3 * trainable(base.model)) + 2 * trained * 2 * sizes["lm_head"]
    assert counted.get_total_flops() == pytest.approx(wanted, rel=0.01)
    full = 2 * tokens * 3 * body + 2 * trained * 3 * sizes["lm_head"]
    assert 0.60 < counted.get_total_flops() / full < 0.80
