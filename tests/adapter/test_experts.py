"""Which layers of a mixture get an adapter, and what is refused there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from builders.models import frozen, tiny_model
from lorafit.adapter.attach import adapted_layers, attach, detach, linear_layers, select, trained
from lorafit.adapter.experts import LoraRouter, LoraStack, expert_layers, routers
from lorafit.errors import ConfigError
from lorafit.training.trained import Trained

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120]])


@pytest.fixture
def model(tmp_path):
    return frozen(tiny_model("qwen2_moe"), tmp_path).model


def test_all_linear_is_the_linear_layers_and_experts_are_the_experts(model):
    """all-linear takes no stack and nothing that routes; experts takes the stacks alone; together they are both."""
    linear, experts = select(model, ["all-linear"]), select(model, ["experts"])
    assert experts == [f"model.layers.{n}.mlp.experts.{name}" for n in (0, 1) for name in ("gate_up_proj", "down_proj")]
    assert linear == [path for path in linear_layers(model) if path != "lm_head"]
    assert not any("gate" in path.split(".")[-1] and not path.endswith("gate_proj") for path in linear)
    assert sorted(select(model, ["all-linear", "experts"])) == sorted(linear + experts)


def test_names_and_globs_reach_experts(model):
    """A path's end or a glob over paths means stacks too; mlp means linear layers only."""
    assert select(model, ["experts.down_proj"]) == [f"model.layers.{n}.mlp.experts.down_proj" for n in (0, 1)]
    assert select(model, ["*.0.mlp.experts.*"]) == [path for path in expert_layers(model) if ".0." in path]
    assert not any(".experts." in path for path in select(model, ["mlp"]))


def test_a_glob_that_catches_the_router_is_refused(model):
    """One line with the pattern, the router and what to do; naming the router is leave, a glob beside it or not."""
    words = r"--targets: \*\.mlp\.\* catches model.layers.0.mlp.gate, which routes tokens to experts; .* or name gate"
    with pytest.raises(ConfigError, match=words):
        select(model, ["*.mlp.*"])
    with pytest.raises(ConfigError, match=r"\*gate\* catches model.layers.0.mlp.gate"):
        select(model, ["*gate*"])
    assert select(model, ["gate"]) == [f"model.layers.{n}.mlp.gate" for n in (0, 1)]
    assert "model.layers.0.mlp.gate" in select(model, ["*.mlp.*", "gate", "shared_expert_gate"])
    assert len(routers(model)) == 4


def test_experts_of_a_dense_model_do_not_exist(tmp_path):
    """The error names what the model has."""
    with pytest.raises(
        ConfigError, match="--targets: experts matches no experts; this model has down_proj, embed_tokens"
    ):
        attach(frozen(tiny_model("llama"), tmp_path).model, targets=["experts"])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_an_adapted_router_changes_what_it_chooses_by(family, tmp_path):
    """At B = 0 no bit changes; with B it is the original router with W + s B A in place of W."""
    model = frozen(tiny_model(family), tmp_path).model
    path = routers(model)[0]
    base = model.get_submodule(path)
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        attach(model, rank=2, alpha=4, targets=[path.rsplit(".", 1)[-1]])
        layer = model.get_submodule(path)
        assert isinstance(layer, LoraRouter)
        assert torch.equal(model(input_ids=IDS).logits, want)
        nn.init.normal_(layer.adapter.B, std=0.2)
        x = torch.randn(5, 32)
        got = layer(x)
        plain = base(x)
        base.weight += 2 * layer.adapter.B @ layer.adapter.A
        changed = base(x)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, changed, strict=True))
        assert not all(torch.allclose(a.float(), b.float()) for a, b in zip(got, plain, strict=True))


def test_a_routers_gradient_reaches_its_adapter(tmp_path):
    """Scores that depend on A and B train them."""
    model = frozen(tiny_model("qwen3_moe"), tmp_path).model
    attach(model, rank=2, targets=["gate"])
    model(input_ids=IDS).logits.square().sum().backward()
    grads = [layer.adapter.B.grad for _, layer in adapted_layers(model)]
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)


def test_adapters_start_by_seed_and_path_and_come_off_again(tmp_path):
    """The same seed gives the same A, another another; A is uniform within 1 / sqrt(inputs); detached, the model is
    the base."""
    model = frozen(tiny_model("qwen3_moe"), tmp_path).model
    with torch.no_grad():
        want = model(input_ids=IDS).logits
    starts = []
    for seed in (0, 0, 1):
        attach(model, rank=2, targets=["experts"], seed=seed)
        starts.append(torch.cat([layer.adapter.A.detach().flatten() for _, layer in adapted_layers(model)]))
        assert all(isinstance(layer, LoraStack) for _, layer in adapted_layers(model))
        detach(model)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert starts[0].abs().max() <= 24**-0.5
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, want)


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("dropout", 0.1, "dropout"),
        ("use_dora", True, "use-dora"),
        ("init", "pissa", "init"),
        ("init", "loftq", "init"),
        ("bias", "lora_only", "bias"),
    ],
)
def test_what_is_not_made_for_experts_is_refused(option, value, name, model):
    """One line each, before anything is attached; linear layers alone may have it."""
    for targets, where in (("experts", "experts, such as model.layers.0.mlp.experts"),
                           ("gate", "what routes to experts, such as model.layers.0.mlp.gate")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"--{name}: {value} cannot be put on {where}"):
            attach(model, rank=2, targets=["all-linear", targets], **{option: value})
        assert not list(adapted_layers(model))
    if option != "bias":
        attach(model, rank=2, targets=["attention"], **{option: value}, originals=None)


def test_a_checkpoint_holds_experts_and_routers(model):
    """A and B of stacks and routers are in the state, and come back from it."""
    attach(model, rank=2, targets=["experts", "gate"])
    held = {name: tensor.detach().clone() for name, tensor in Trained(model).state().items()}
    layers = dict(adapted_layers(model))
    assert held.keys() == {f"{path}.{half}" for path in layers for half in "AB"}
    for parameter in trained(model).values():
        nn.init.normal_(parameter)
    Trained(model).load(held)
    for path, layer in layers.items():
        assert torch.equal(layer.adapter.A, held[f"{path}.A"])
        assert not layer.adapter.B.any()


def test_dora_beside_experts_that_peft_could_not_read_is_refused(tmp_path):
    """PEFT knows a shared expert's matrices as parameters, on which it has no DoRA; attention can have it."""
    model = frozen(tiny_model("qwen2_moe"), tmp_path).model
    with pytest.raises(ConfigError, match=r"--use-dora: cannot be put on .*mlp.shared_expert.*give --targets"):
        attach(model, rank=2, use_dora=True)
    attach(model, rank=2, targets=["attention"], use_dora=True)


def test_an_adapter_is_attached_once(model):
    """A second one on the same stack is refused."""
    attach(model, rank=2, targets=["experts"])
    with pytest.raises(ConfigError, match="has an adapter already"):
        attach(model, rank=2, targets=["experts"])
