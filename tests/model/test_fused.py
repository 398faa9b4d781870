"""Decoder layers of our own against transformers' originals, which stay inside them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from builders.models import FAMILIES, frozen, tiny_model
from builders.rows import random_rows
from lorafit.adapter.attach import adapted_layers, attach
from lorafit.adapter.variants.dora import DoraLinear
from lorafit.adapter.variants.pissa import PissaAdapter
from lorafit.data.batch import pack_rows
from lorafit.model import buffers
from lorafit.model.fused import FUSED_TYPES, FusedLayer
from lorafit.model.load import build
from lorafit.model.sources import open_source
from lorafit.training.step import accumulate, pack_losses


def layers_of(model: nn.Module) -> list[FusedLayer]:
    return [module for module in model.modules() if isinstance(module, FusedLayer)]


def with_adapter(
    family: str, folder, targets=("all-linear",), dropout: float = 0.0, use_dora=False, init="default", **changes
):  # fmt: skip
    """A tiny frozen model with an adapter that is not zero, in training mode."""
    base = frozen(tiny_model(family, **changes), folder)
    attach(base.model, rank=4, alpha=8, targets=targets, dropout=dropout, use_dora=use_dora, init=init)
    torch.manual_seed(1)
    for _, layer in adapted_layers(base.model):
        nn.init.normal_(layer.adapter.B, std=0.05)
        if isinstance(layer, DoraLinear):
            layer.magnitude.data *= 0.5 + torch.rand(len(layer.magnitude))
    base.model.train()
    return base


def outcome(base, packs, monkeypatch, fused: bool):
    """(loss, {parameter: gradient}) by our layers, or by the originals inside them."""
    if not fused:
        monkeypatch.setattr(FusedLayer, "_fits", lambda self, cos: False)
    base.model.zero_grad()
    loss = accumulate(base.model, base.head, packs, seed=1, step=2)
    monkeypatch.undo()
    return loss, {n: p.grad.clone() for n, p in base.model.named_parameters() if p.grad is not None}


def test_the_table_of_families_is_the_builders():
    """Every family that we train is computed by ours."""
    assert set(FUSED_TYPES) == set(FAMILIES)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_originals(family, dropout, tmp_path, monkeypatch):
    """Packed rows longer and shorter than the window: loss and every gradient within 1e-5 of the original's (fp32)."""
    base = with_adapter(family, tmp_path, dropout=dropout)
    assert len(layers_of(base.model)) == 2
    rows = random_rows([11, 3, 40, 8])
    packs = pack_rows(rows, range(4), 50)
    ours, originals = (outcome(base, packs, monkeypatch, fused) for fused in (True, False))
    assert ours[0] == pytest.approx(originals[0], rel=1e-5)
    assert ours[1].keys() == originals[1].keys()
    scale = max(grad.norm() for grad in originals[1].values())
    for name, grad in originals[1].items():
        assert (ours[1][name] - grad).norm() <= 1e-5 * torch.maximum(grad.norm(), scale * 1e-2), name


@pytest.mark.parametrize("targets", ["q_proj", "v_proj,o_proj", "down_proj", "gate_proj", "mlp", "model.layers.1.*"])
def test_adapters_on_some_layers(targets, tmp_path, monkeypatch):
    """Groups with adapters on some of their matrices, layers with none: the same gradients, and no others."""
    base = with_adapter("gemma3_text", tmp_path, tuple(targets.split(",")))
    packs = pack_rows(random_rows([11, 9]), range(2), 50)
    ours, originals = (outcome(base, packs, monkeypatch, fused) for fused in (True, False))
    assert ours[1].keys() == originals[1].keys()
    for name, grad in originals[1].items():
        assert torch.allclose(ours[1][name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max())), name


def test_a_switched_off_adapter_and_a_mixed_rank(tmp_path, monkeypatch):
    """`enabled` False leaves its layer out; ranks may differ within a group."""
    base = with_adapter("llama", tmp_path, ("q_proj",))
    attention = base.model.model.layers[0].self_attn
    from lorafit.adapter.attach import put_adapter

    put_adapter(base.model, "model.layers.0.self_attn.k_proj", 2, 2.0, places=base.model.lora_places).start(
        torch.Generator().manual_seed(3)
    )
    nn.init.normal_(attention.k_proj.adapter.B, std=0.1)
    base.model.model.layers[1].self_attn.q_proj.enabled = False
    packs = pack_rows(random_rows([11, 9]), range(2), 50)
    ours, originals = (outcome(base, packs, monkeypatch, fused) for fused in (True, False))
    assert ours[0] == pytest.approx(originals[0], rel=1e-5)
    for name, grad in originals[1].items():
        assert torch.allclose(ours[1][name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max())), name


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_batch_are_the_originals(family, tmp_path, monkeypatch):
    """A plain call with several rows, no packing and no adapter: within 1e-5."""
    base = frozen(tiny_model(family), tmp_path)
    ids = torch.randint(3, 500, (3, 13))
    with torch.no_grad():
        ours = base.model(ids, use_cache=False).logits
        monkeypatch.setattr(FusedLayer, "_fits", lambda self, cos: False)
        assert torch.allclose(ours, base.model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)


def test_hooks_are_called(tmp_path):
    """A hook on a module inside a layer sees its activations: such a layer is computed by the original."""
    base, seen = frozen(tiny_model("llama"), tmp_path), []
    base.model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    base.model(torch.arange(5)[None])
    assert seen == [(1, 5, 32)]


def test_other_modules_in_a_layer_are_respected(tmp_path):
    """A layer of the user's own in place of ours is called, with its gradient."""
    base = frozen(tiny_model("llama"), tmp_path)
    plain = nn.Linear(32, 48)
    base.model.model.layers[0].mlp.up_proj = plain
    base.model(torch.arange(5)[None]).logits.sum().backward()
    assert plain.weight.grad is not None


def test_an_unknown_activation_keeps_the_originals(tmp_path):
    """Nothing is guessed: a family's layer with another activation stays transformers'."""
    base = frozen(tiny_model("llama", hidden_act="relu"), tmp_path)
    assert layers_of(base.model) == []
    assert base.fused == 0


def test_bf16_is_as_near_to_fp32_as_the_originals(tmp_path, monkeypatch):
    """With bf16 products our loss is no further from fp32's than the original layers' is, within a factor of two."""
    packs = pack_rows(random_rows([11, 3, 17, 8]), range(4), 100)
    exact = with_adapter("qwen3", tmp_path / "a", num_hidden_layers=4)
    wanted = outcome(exact, packs, monkeypatch, True)
    source = open_source(tmp_path / "a")
    model = build(source, "bf16", torch.bfloat16)
    attach(model, rank=4, alpha=8)
    for (_, ours), (_, theirs) in zip(adapted_layers(model), adapted_layers(exact.model), strict=True):
        ours.adapter.load_state_dict(theirs.adapter.state_dict())
    from lorafit.model.load import head_of

    exact.model.cpu()
    errors = []
    for fused in (True, False):
        model.train()
        if not fused:
            monkeypatch.setattr(FusedLayer, "_fits", lambda self, cos: False)
        model.zero_grad()
        accumulate(model, head_of(model), packs, seed=1, step=2)
        monkeypatch.undo()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        errors.append(sum(float((grads[n] - g).norm() ** 2) for n, g in wanted[1].items()) ** 0.5)
    assert errors[0] < 2 * errors[1]


def test_a_second_backward_pass_is_refused(tmp_path):
    """What was kept is used up, and that is said."""
    base = with_adapter("llama", tmp_path)
    (pack,) = pack_rows(random_rows([9]), [0], 50)
    loss = pack_losses(base.model, base.head, pack).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward pass again"):
        loss.backward()


def test_every_buffer_comes_back_after_a_step(tmp_path):
    """Steps of packs of several lengths, with layers computed twice, and an evaluation: nothing stays taken, and the
    second time round nothing new is made."""
    before = buffers.taken()  # by others' forward passes
    for family in ("llama", "gemma3_text"):
        base = with_adapter(family, tmp_path / family)
        packs = pack_rows(random_rows([11, 3, 40, 8]), range(4), 50)
        sizes = []
        for _ in range(2):
            for layers in (0, 1, 2):
                accumulate(base.model, base.head, packs, checkpointed=layers)
            base.model.eval()
            with torch.no_grad():
                pack_losses(base.model, base.head, packs[0])
            base.model.train()
            assert buffers.taken() == before
            sizes.append(buffers.free_bytes())
        assert sizes[0] == sizes[1]


@pytest.mark.parametrize("options", [{"targets": ("lm_head",)}, {"targets": ("model.layers.1.*",)}, {"token_ids": [5]}])
def test_buffers_come_back_whatever_is_trained(options, tmp_path):
    """Only the head, only the upper layers, the embedding below the first: no layer's buffers stay taken."""
    before = buffers.taken()
    base = frozen(tiny_model("llama"), tmp_path)
    attach(base.model, rank=4, **options)
    base.model.train()
    packs = pack_rows(random_rows([11, 3, 40, 8]), range(4), 50)
    for checkpointed in (0, 1):
        accumulate(base.model, base.head, packs, seed=1, step=2, checkpointed=checkpointed)
        assert buffers.taken() == before


class Written(nn.Module):
    """DoRA's matrix written out in fp64 from W; the lengths of its rows are constants."""

    def __init__(self, layer: DoraLinear) -> None:
        super().__init__()
        adapter = layer.adapter
        values = {"A": adapter.A, "B": adapter.B, "magnitude": layer.magnitude}
        self.values = nn.ParameterDict({name: value.detach().double() for name, value in values.items()})
        pissa = isinstance(adapter, PissaAdapter)
        self.start = adapter.B0.double() @ adapter.A0.double() if pissa else 0.0
        self.scale = adapter.scale

    def forward(self, weight_OI: torch.Tensor) -> torch.Tensor:
        whole = weight_OI + self.scale * (self.values["B"] @ self.values["A"] - self.start)
        return whole * (self.values["magnitude"] / whole.norm(dim=1).detach())[:, None]


def written_out(base, family: str, rows, **changes) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients) of transformers' model in fp64 with every adapted matrix written out, row by row."""
    model = tiny_model(family, **changes).double()
    for path, layer in adapted_layers(base.model):
        module = model.get_submodule(path)
        if module.bias is not None:
            module.bias.data = layer.base.bias.double()
        nn.utils.parametrize.register_parametrization(module, "weight", Written(layer))
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids, trained = torch.tensor([row.ids]), torch.tensor(list(row.trained))[1:].bool()
        total += F.cross_entropy(model(ids).logits[0, :-1][trained], ids[0, 1:][trained], reduction="sum")
    loss = total / sum(sum(row.trained[1:]) for row in rows)
    loss.backward()
    found = {}
    for path, _ in adapted_layers(base.model):
        written = model.get_submodule(path).parametrizations.weight[0].values
        names = {"A": "adapter.A", "B": "adapter.B", "magnitude": "magnitude"}
        found |= {f"{path}.{ours}": written[name].grad for name, ours in names.items()}
    return float(loss.detach()), found


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("family", [*FAMILIES, "yarn"])
def test_gradients_of_dora_are_the_formulas(family, init, tmp_path, monkeypatch):
    """Ours keep outputs after gains, biases and rotation, and get the magnitudes' gradients back from them: each
    gradient is within 1e-5 of that of the matrix written out in fp64, or as near as transformers' layers are, within a
    factor of two; layers computed twice give the same bits."""
    family, changes = ("llama", {"rope_parameters": YARN}) if family == "yarn" else (family, {})
    base = with_adapter(family, tmp_path, use_dora=True, init=init, **changes)
    for _, layer in adapted_layers(base.model):
        if layer.base.bias is not None:
            nn.init.normal_(layer.base.bias)
    rows = random_rows([11, 3, 40, 8])
    packs = pack_rows(rows, range(4), 50)
    (loss, ours), (_, originals) = (outcome(base, packs, monkeypatch, fused) for fused in (True, False))
    wanted_loss, wanted = written_out(base, family, rows, **changes)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        theirs = (originals[name] - gradient).norm()
        assert (ours[name] - gradient).norm() <= max(1e-5 * gradient.norm(), 2 * theirs), name
    base.model.zero_grad()
    accumulate(base.model, base.head, packs, seed=1, step=2, checkpointed=1)
    assert all(torch.equal(p.grad, ours[name]) for name, p in base.model.named_parameters() if name in ours)


def test_dora_with_dropout(tmp_path, monkeypatch):
    """The adapter's input is dropped in the same places: gradients as by the originals."""
    base = with_adapter("qwen2", tmp_path, dropout=0.3, use_dora=True)
    packs = pack_rows(random_rows([11, 3, 40, 8]), range(4), 50)
    ours, originals = (outcome(base, packs, monkeypatch, fused)[1] for fused in (True, False))
    for name, grad in originals.items():
        assert torch.allclose(ours[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max())), name


@pytest.mark.parametrize("targets", ["q_proj", "v_proj,o_proj", "down_proj", "gate_proj", "model.layers.1.*"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_dora_on_some_layers(family, targets, tmp_path, monkeypatch):
    """Groups with DoRA on some of their matrices: the same gradients and no others, and every buffer comes back."""
    before = buffers.taken()
    base = with_adapter(family, tmp_path, tuple(targets.split(",")), use_dora=True)
    packs = pack_rows(random_rows([11, 9]), range(2), 50)
    ours, originals = (outcome(base, packs, monkeypatch, fused) for fused in (True, False))
    assert buffers.taken() == before
    assert ours[1].keys() == originals[1].keys()
    for name, grad in originals[1].items():
        assert torch.allclose(ours[1][name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max())), name


def test_a_magnitude_of_zero_gets_no_gradient(tmp_path):
    """An output that is scaled to nothing is not NaN."""
    base = with_adapter("llama", tmp_path, use_dora=True)
    magnitude = base.model.model.layers[0].mlp.up_proj.magnitude
    magnitude.data[3] = 0.0
    accumulate(base.model, base.head, pack_rows(random_rows([11, 9]), range(2), 50))
    assert magnitude.grad[3] == 0.0
    assert all(p.grad.isfinite().all() for p in base.model.parameters() if p.grad is not None)


def test_lengths_are_computed_once_a_step(tmp_path, monkeypatch):
    """However many packs and passes a step has; another step computes them from what is new."""
    from lorafit.adapter.variants import dora

    base, calls = with_adapter("llama", tmp_path, use_dora=True), []
    crossed = dora._crossed
    monkeypatch.setattr(dora, "_crossed", lambda base, A: calls.append(1) or crossed(base, A))
    packs = pack_rows(random_rows([11, 9, 30, 30]), range(4), 32)
    assert len(packs) > 1
    for step in (1, 2):
        accumulate(base.model, base.head, packs, checkpointed=1)
        assert len(calls) == step * len(list(adapted_layers(base.model)))


def test_originals_are_computed_twice_too(tmp_path):
    """Layers with a hook that are checkpointed run again in the backward pass, with the same gradients."""
    base = frozen(tiny_model("llama"), tmp_path)
    attach(base.model, rank=2)
    base.model.train()
    packs, calls, found = pack_rows(random_rows([11, 9]), range(2), 50), [], []
    base.model.model.layers[0].mlp.down_proj.adapter.register_forward_pre_hook(lambda *_: calls.append(1))
    for layers in (0, 2):
        base.model.zero_grad()
        calls.clear()
        accumulate(base.model, base.head, packs, checkpointed=layers)
        found.append(({n: p.grad.clone() for n, p in base.model.named_parameters() if p.grad is not None}, len(calls)))
    assert [count for _, count in found] == [1, 2]
    assert all(torch.equal(gradient, found[1][0][name]) for name, gradient in found[0][0].items())
