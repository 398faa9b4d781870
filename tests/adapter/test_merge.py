"""What an adapter adds to its base's tensors, kind by kind; PEFT's merging where it knows the kind."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn

from lorafit.adapter.attach import adapted_layers, attach
from lorafit.adapter.merge import EMBEDDING, HEAD, changes, low_rank, put_factors
from lorafit.errors import AdapterError


class Beside(nn.Module):
    """A layer with something trained beside it, as kinds of adapters make them."""

    def __init__(self, base: nn.Module, **own: object) -> None:
        super().__init__()
        self.base, self.enabled = base, True
        for name, value in own.items():
            setattr(self, name, value)


def pair(outputs: int, inputs: int, rank: int = 3, scale: float = 2.0) -> SimpleNamespace:
    return SimpleNamespace(A=torch.randn(rank, inputs), B=torch.randn(outputs, rank), scale=scale)


def holder(path: str, layer: nn.Module, tied: bool = False) -> nn.Module:
    """A model with this layer at this path."""
    root = nn.Module()
    root.config = SimpleNamespace(tie_word_embeddings=tied)
    put(root, path, layer)
    return root


def put(root: nn.Module, path: str, layer: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.add_module(name, layer)


def test_lora_is_the_scaled_product():
    """W' = W + s B A for every adapted layer, and its factors on a plain model compute the same."""
    torch.manual_seed(0)
    model = attach(nn.ModuleDict({"q_proj": nn.Linear(6, 4), "other": nn.Linear(4, 4)}), rank=2, targets=["q_proj"])
    ((path, layer),) = adapted_layers(model)
    nn.init.normal_(layer.adapter.B)
    ((name, change),) = changes(model).items()
    assert name == f"{path}.weight" == "q_proj.weight"
    x = torch.randn(5, 6)
    merged = layer.base.weight + change(layer.base.weight)
    torch.testing.assert_close(x @ merged.T + layer.base.bias, layer(x))
    plain = nn.ModuleDict({"q_proj": layer.base, "other": nn.Linear(4, 4)})
    put_factors(plain, low_rank(model))
    torch.testing.assert_close(plain["q_proj"](x), layer(x))


def test_dora_is_what_peft_merges():
    """m (W + s B A) / |W + s B A|, by rows: PEFT's merged weight of the same numbers; no low-rank update."""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(6, 4)), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], use_dora=True)
    )
    layer = theirs.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    magnitude = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        magnitude.mul_(1.5)
    base = nn.Linear(6, 4)
    base.load_state_dict(layer.base_layer.state_dict())
    own = SimpleNamespace(A=layer.lora_A["default"].weight, B=layer.lora_B["default"].weight, scale=3.0)
    model = holder("up", Beside(base, adapter=own, magnitude=magnitude))
    want = theirs.merge_and_unload()[0].weight
    got = base.weight.detach() + changes(model)["up.weight"](base.weight.detach())
    torch.testing.assert_close(got, want.detach())
    assert low_rank(model) == {}


def test_biases_whole_matrices_and_rows_take_the_places():
    """A trained bias or matrix replaces the base's; trained rows of some tokens replace those and no others."""
    torch.manual_seed(0)
    bias, matrix, rows = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(9, 4)), nn.Parameter(torch.randn(2, 4))
    found = changes(holder("up", Beside(nn.Linear(6, 4), adapter=pair(4, 6), bias=bias)))
    old = torch.randn(4)
    torch.testing.assert_close(old + found["up.bias"](old), bias.detach())
    weight = torch.randn(9, 4)
    found = changes(holder("lm_head", Beside(nn.Linear(4, 9), matrix=matrix)))
    torch.testing.assert_close(weight + found[HEAD](weight), matrix.detach())
    found = changes(holder("model.embed_tokens", Beside(nn.Embedding(9, 4), rows=rows, ids=(7, 2))))
    moved = weight + found[EMBEDDING](weight)
    torch.testing.assert_close(moved[[7, 2]], rows.detach())
    assert torch.equal(moved[[0, 1, 3, 4, 5, 6, 8]], weight[[0, 1, 3, 4, 5, 6, 8]])


def test_experts_and_embeddings_have_their_own_layout():
    """Experts one by one, inputs first where the base's are; an embedding's update is that of its rows."""
    torch.manual_seed(0)
    stack = SimpleNamespace(A=torch.randn(5, 3, 6), B=torch.randn(5, 4, 3), scale=0.5)
    for transposed in (False, True):
        base = nn.Linear(6, 4)
        base.transposed = transposed
        found = changes(holder("mlp.experts.down_proj", Beside(base, adapter=stack)))["mlp.experts.down_proj"]
        want = 0.5 * torch.einsum("eor,eri->eio" if transposed else "eor,eri->eoi", stack.B, stack.A)
        torch.testing.assert_close(found(torch.zeros_like(want)), want)
    own = pair(4, 9)
    model = holder("model.embed_tokens", Beside(nn.Embedding(9, 4), adapter=own))
    ids = torch.tensor([3, 8])
    update = changes(model)[EMBEDDING](torch.zeros(9, 4))
    torch.testing.assert_close(update[ids], own.scale * (own.B @ own.A[:, ids]).T)
    assert low_rank(model) == {}


def test_ties():
    """Trained whole, embedding and head stay one matrix; LoRA on a tied embedding leaves the head as it was."""
    matrix = nn.Parameter(torch.randn(9, 4))
    model = holder("model.embed_tokens", Beside(nn.Embedding(9, 4), matrix=matrix), tied=True)
    put(model, "lm_head", Beside(nn.Linear(4, 9), matrix=matrix))
    assert set(changes(model)) == {EMBEDDING}
    model = holder("model.embed_tokens", Beside(nn.Embedding(9, 4), adapter=pair(4, 9)), tied=True)
    assert set(changes(model)) == {EMBEDDING, HEAD}
    assert not changes(model)[HEAD](torch.randn(9, 4)).any()


def test_an_unknown_kind_is_refused():
    """What is not known cannot be left out in silence."""
    with pytest.raises(AdapterError, match="up: is a Beside, which is not merged"):
        changes(holder("up", Beside(nn.Linear(6, 4))))
