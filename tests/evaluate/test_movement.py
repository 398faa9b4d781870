"""The laws of lorafit.evaluate.movement: the norms are those of the matrices themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from builders.models import frozen, tiny_model
from lorafit.adapter.attach import adapted_layers, attach
from lorafit.evaluate.movement import movement


def test_norms_are_those_of_the_products_written_out(tmp_path):
    """|alpha/r B A| and |W| by forming both matrices, within fp32's rounding."""
    model = frozen(tiny_model("llama"), tmp_path).model
    attach(model, rank=3, alpha=5.0, targets=["q_proj", "down_proj"])
    torch.manual_seed(0)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.adapter.B.normal_()
    found = movement(model)
    layers = dict(adapted_layers(model))
    assert [update["layer"] for update in found] == list(layers)
    for update in found:
        layer = layers[update["layer"]]
        change = 5.0 / 3 * layer.adapter.B.detach().double() @ layer.adapter.A.detach().double()
        assert update["norm"] == pytest.approx(float(change.norm()), rel=1e-6)
        assert update["relative"] == pytest.approx(float(change.norm() / layer.base.weight.dense().norm()), rel=1e-5)


def test_a_new_adapter_has_moved_nothing_and_no_adapter_is_no_movement(tmp_path):
    """B = 0 is norm 0 to the bit; a model without adapters has no layers to tell of."""
    model = frozen(tiny_model("llama"), tmp_path).model
    assert movement(model) == []
    attach(model, rank=2)
    assert {(update["norm"], update["relative"]) for update in movement(model)} == {(0.0, 0.0)}


def test_a_module_of_the_users_own_has_norms_too():
    """torch's linear layers: the same figures; a weight of zeros has no ratio."""
    module = nn.Sequential(nn.Linear(4, 4))
    attach(module, rank=2, targets=["0"])
    assert movement(module) == [{"layer": "0", "norm": 0.0, "relative": 0.0}]
    nn.init.zeros_(module[0].base.weight)
    assert movement(module) == [{"layer": "0", "norm": 0.0, "relative": None}]


def test_experts_count_together(tmp_path):
    """A stack's norms are those of all its experts' matrices laid end to end."""
    model = frozen(tiny_model("qwen3_moe"), tmp_path).model
    attach(model, rank=2, alpha=3.0, targets=["experts"])
    torch.manual_seed(0)
    layers = dict(adapted_layers(model))
    with torch.no_grad():
        for layer in layers.values():
            layer.adapter.B.normal_()
    found = movement(model)
    assert len(found) == len(layers) > 0
    for update in found:
        layer = layers[update["layer"]]
        change = 1.5 * layer.adapter.B.detach().double() @ layer.adapter.A.detach().double()
        assert update["norm"] == pytest.approx(float(change.norm()), rel=1e-6)
        assert update["relative"] == pytest.approx(float(change.norm() / layer.base.dense().norm()), rel=1e-5)
