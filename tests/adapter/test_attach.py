"""Attaching adapters to any torch module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorafit
from builders.architectures import CONFIGS, empty
from lorafit.adapter.attach import adapted_layers, detach, enable_adapter, linear_layers, select
from lorafit.errors import ConfigError


class Toy(nn.Module):
    """Two blocks and a head, with nothing of transformers in them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8), "up_proj": nn.Linear(8, 8)}) for _ in "ab"
        )
        self.lm_head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["up_proj"](torch.tanh(block["q_proj"](x)))
        return self.lm_head(x)


def test_attach_keeps_every_output_bit_and_freezes_the_rest():
    """A fresh adapter on a user's own module is the identity, and only A and B are trainable."""
    toy, x = Toy(), torch.randn(4, 8)
    before = toy(x)
    lorafit.attach(toy, rank=2, alpha=4, targets=["q_proj"])
    assert torch.equal(toy(x), before)
    names = [name for name, p in toy.named_parameters() if p.requires_grad]
    assert names == [f"blocks.{i}.q_proj.adapter.{part}" for i in (0, 1) for part in "AB"]


def test_training_the_attached_adapter_changes_only_it():
    """A step moves the adapter; the base's weights keep their bits."""
    toy = Toy()
    base = {name: p.detach().clone() for name, p in toy.named_parameters()}
    lorafit.attach(toy, rank=2, alpha=4, targets=["all-linear"])
    optimizer = torch.optim.SGD([p for p in toy.parameters() if p.requires_grad], lr=1.0)
    toy(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    after = {name.replace(".base", ""): p for name, p in toy.named_parameters() if ".adapter." not in name}
    assert all(torch.equal(base[name], after[name]) for name in base)
    assert any(layer.adapter.B.abs().sum() > 0 for _, layer in adapted_layers(toy))


def test_all_linear_leaves_the_head_out():
    """all-linear names every linear layer but the head."""
    assert select(Toy(), ["all-linear"]) == [f"blocks.{i}.{n}" for i in (0, 1) for n in ("q_proj", "up_proj")]


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["attention"], 2),
        (["mlp"], 2),
        (["blocks.0.q_proj"], 1),
        (["*.1.*"], 2),
        (["q_proj", "up_proj"], 4),
        (["*_proj"], 4),
    ],
)
def test_targets_are_roles_names_paths_and_globs(targets: list[str], count: int):
    """Each spelling selects the layers that it says."""
    assert len(select(Toy(), targets)) == count


@pytest.mark.parametrize("family", CONFIGS)
def test_attention_and_mlp_are_every_linear_layer(family: str):
    """Whatever a family calls its matrices: latent and linear attention are attention too."""
    model = empty(family)
    attention = {path for path in linear_layers(model) if "attn" in path}
    assert set(select(model, ["attention"])) == attention
    assert select(model, ["attention", "mlp"]) == select(model, ["all-linear"])


def test_a_target_that_matches_nothing_names_what_exists():
    """A typo is an error that lists the model's layers."""
    with pytest.raises(ConfigError, match=r"q_porj matches no linear layer.*lm_head, q_proj, up_proj"):
        lorafit.attach(Toy(), targets=["q_porj"])


def test_a_rank_above_the_layers_size_is_refused():
    """More than its rows or columns no change of a layer can have: the layer is named, and nothing is attached."""
    toy = Toy()
    with pytest.raises(ConfigError, match=r"--rank: is 9, and blocks.0.q_proj has 8 x 8 weights; give at most 8"):
        lorafit.attach(toy, rank=9, alpha=9)
    assert not list(adapted_layers(toy))
    assert lorafit.attach(toy, rank=8) is toy


def test_attaching_twice_is_refused():
    """A second adapter on the same layer is an error, not a silent stack."""
    toy = lorafit.attach(Toy(), rank=2, targets=["q_proj"])
    with pytest.raises(ConfigError, match="has an adapter already"):
        lorafit.attach(toy, rank=2, targets=["q_proj"])


def test_the_start_depends_on_seed_and_path_alone():
    """The same seed gives the same A whatever else is adapted."""
    few, all_ = lorafit.attach(Toy(), 4, targets=["up_proj"], seed=5), lorafit.attach(Toy(), 4, seed=5)
    other = lorafit.attach(Toy(), 4, seed=6)
    a = [dict(adapted_layers(m))["blocks.1.up_proj"].adapter.A for m in (few, all_, other)]
    assert a[0].shape == a[1].shape
    assert torch.equal(a[0], a[1])
    assert not torch.equal(a[1], a[2])


def test_detach_gives_the_base_back_and_disabling_its_output():
    """After detach no trace is left; disabled, the output is the base's."""
    toy, x = Toy(), torch.randn(4, 8)
    before, paths = toy(x), list(linear_layers(toy))
    lorafit.attach(toy, rank=4)
    for _, layer in adapted_layers(toy):
        nn.init.normal_(layer.adapter.B)
    assert not torch.equal(toy(x), before)
    enable_adapter(toy, False)
    assert torch.equal(toy(x), before)
    detach(toy)
    assert torch.equal(toy(x), before)
    assert list(linear_layers(toy)) == paths
    assert not list(adapted_layers(toy))
