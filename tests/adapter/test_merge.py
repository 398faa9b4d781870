"""What an adapter adds to its base's tensors, kind by kind; PEFT's merging where it knows the kind."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import torch
from torch import nn

from lorafit.adapter.attach import adapted_layers, attach
from lorafit.adapter.dropout import PlacedDropout
from lorafit.adapter.experts import put_on_experts
from lorafit.adapter.lora import LoraAdapter, LoraLinear
from lorafit.adapter.merge import EMBEDDING, HEAD, changes, grown, low_rank, put_factors
from lorafit.adapter.variants.dora import DoraLinear
from lorafit.adapter.variants.vocabulary import LoraEmbedding, TokenEmbedding, WholeEmbedding, WholeLinear
from lorafit.frozen.dense import DenseWeight
from lorafit.frozen.stack import FrozenStack


def pair(outputs: int, inputs: int, rank: int = 3, alpha: float = 6.0) -> LoraAdapter:
    """An adapter with random A and B."""
    adapter = LoraAdapter(inputs, outputs, rank, alpha, PlacedDropout())
    for matrix in adapter.parameters():
        nn.init.normal_(matrix)
    return adapter


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
    own = DoraLinear(base, pair(4, 6, rank=2))
    with torch.no_grad():
        own.adapter.A.copy_(layer.lora_A["default"].weight)
        own.adapter.B.copy_(layer.lora_B["default"].weight)
        own.magnitude.copy_(magnitude)
    model = holder("up", own)
    want = theirs.merge_and_unload()[0].weight
    got = base.weight.detach() + changes(model)["up.weight"](base.weight.detach())
    torch.testing.assert_close(got, want.detach())
    assert low_rank(model) == {}


def test_biases_whole_matrices_and_rows_take_the_places():
    """A trained bias or matrix replaces the base's; trained rows of some tokens replace those and no others."""
    torch.manual_seed(0)
    matrix, rows = nn.Parameter(torch.randn(9, 4)), nn.Parameter(torch.randn(2, 4))
    layer = LoraLinear(nn.Linear(6, 4), pair(4, 6))
    layer.train_bias()
    nn.init.normal_(layer.bias)
    found = changes(holder("up", layer))
    old = torch.randn(4)
    torch.testing.assert_close(old + found["up.bias"](old), layer.bias.detach())
    assert set(found) == {"up.bias", "up.weight"}
    weight = torch.randn(9, 4)
    found = changes(holder("lm_head", WholeLinear(nn.Linear(4, 9), matrix)))
    torch.testing.assert_close(weight + found[HEAD](weight), matrix.detach())
    found = changes(holder("model.embed_tokens", TokenEmbedding(nn.Embedding(9, 4), rows, (7, 2), rows.detach())))
    moved = weight + found[EMBEDDING](weight)
    torch.testing.assert_close(moved[[7, 2]], rows.detach())
    assert torch.equal(moved[[0, 1, 3, 4, 5, 6, 8]], weight[[0, 1, 3, 4, 5, 6, 8]])


def test_experts_and_embeddings_have_their_own_layout():
    """Experts one by one, inputs first where the base's are; an embedding's update is that of its rows."""
    torch.manual_seed(0)
    for transposed in (False, True):
        weight = DenseWeight(torch.randn(20, 6))
        base = FrozenStack(5, [((weight,), slice(0, 4))], transposed=transposed)
        layer = put_on_experts(base, rank=3, alpha=1.5)
        for matrix in layer.parts().values():
            nn.init.normal_(matrix)
        found = changes(holder("mlp.experts.down_proj", layer))["mlp.experts.down_proj"]
        A, B = (factor.detach() for factor in layer.adapter.factors())
        want = 0.5 * torch.einsum("eor,eri->eio" if transposed else "eor,eri->eoi", B, A)
        torch.testing.assert_close(found(torch.zeros_like(want)), want)
    own = pair(4, 9)
    model = holder("model.embed_tokens", LoraEmbedding(nn.Embedding(9, 4), own))
    ids = torch.tensor([3, 8])
    update = changes(model)[EMBEDDING](torch.zeros(9, 4))
    torch.testing.assert_close(update[ids], own.scale * (own.B @ own.A[:, ids]).detach().T)
    assert low_rank(model) == {}


def test_ties():
    """Trained whole, embedding and head stay one matrix; LoRA on a tied embedding leaves the head as it was."""
    matrix = nn.Parameter(torch.randn(9, 4))
    model = holder("model.embed_tokens", WholeEmbedding(nn.Embedding(9, 4), matrix), tied=True)
    put(model, "lm_head", WholeLinear(nn.Linear(4, 9), matrix))
    assert set(changes(model)) == {EMBEDDING}
    model = holder("model.embed_tokens", LoraEmbedding(nn.Embedding(9, 4), pair(4, 9)), tied=True)
    assert set(changes(model)) == {EMBEDDING, HEAD}
    assert not changes(model)[HEAD](torch.randn(9, 4)).any()


def test_new_tokens_need_rows():
    """Rows beyond the base's are counted, and take the place of whatever the enlarged tensor holds there."""
    rows = nn.Parameter(torch.randn(3, 4))
    model = holder("model.embed_tokens", TokenEmbedding(nn.Embedding(9, 4), rows, (7, 9, 10), rows.detach()))
    assert grown(model) == {EMBEDDING: 11}
    weight = torch.randn(11, 4)
    merged = weight + changes(model)[EMBEDDING](weight)
    assert torch.allclose(merged[[7, 9, 10]], rows.detach())
    assert torch.equal(merged[:7], weight[:7])
    model = holder("model.embed_tokens", TokenEmbedding(nn.Embedding(9, 4), rows, (6, 7, 8), rows.detach()))
    assert grown(model) == {}
