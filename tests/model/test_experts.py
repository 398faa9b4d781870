"""Blocks of experts against transformers' own: the same numbers, from the active experts alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from builders.models import MOE_FAMILIES, tiny_model
from lorafit.adapter.attach import adapted_layers, attach
from lorafit.adapter.experts import ExpertGroup
from lorafit.errors import ModelError
from lorafit.frozen.dense import DenseWeight
from lorafit.frozen.stack import FrozenStack
from lorafit.model.experts import Clamped, Halves, RoutedBlock, _Job, _sorted, is_experts, kind_of, over

CLOSE = 1e-5  # relative, in fp32: sums run in another order


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


def original(family: str) -> nn.Module:
    """The experts module of the last layer of transformers' tiny model, its weights as they were made."""
    found = [module for module in tiny_model(family).modules() if is_experts(module)]
    return found[-1].requires_grad_(True)


def routing(experts: int, tokens: int = 13, choices: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(experts of each token, scores): the last two experts get no token."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts - 2, generator=generator)[:choices] for _ in range(tokens)])
    return index, torch.rand(tokens, choices, generator=generator) + 0.1


def twin(module: nn.Module, x: Tensor, index: Tensor, scores: Tensor) -> Tensor:
    """What the module of transformers gives; Llama 4's wants every token for every expert, times its score or 0."""
    if type(module).__name__ != "Llama4TextExperts":
        return module(x, index, scores)
    experts = module.num_experts
    dense = torch.zeros(len(x), experts).scatter(1, index, scores)
    every = (x.repeat(experts, 1) * dense.T.reshape(-1, 1)).view(-1, x.shape[1])
    return module(every).view(experts, *x.shape).sum(0)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_forward_and_gradients_are_those_of_the_original(family):
    """Outputs, and gradients of the tokens and of their scores, of the grouped products equal the original module's."""
    module = original(family)
    own, (index, scores) = over(module), routing(module.num_experts)
    x = torch.randn(13, 32)
    results = []
    for function in (lambda *a: twin(module, *a), own):
        inputs, weights = x.clone().requires_grad_(), scores.clone().requires_grad_()
        out = function(inputs, index, weights)
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        results.append((out.detach(), inputs.grad, weights.grad))
    for theirs, mine in zip(*results, strict=True):
        assert relative(mine, theirs) < CLOSE
    with torch.no_grad():
        assert torch.equal(own(x, index, scores), results[1][0])


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_adapters_gradients_are_those_of_a_plain_twin(family):
    """The twin adds s B_e A_e to every expert's matrix and lets autograd differentiate it: output and the gradients of
    x, scores, A and B are equal; experts without tokens have gradients of exactly 0."""
    module = original(family)
    block = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": over(module)})})
    attach(block, rank=3, alpha=6, targets=["experts"])
    layers = dict(adapted_layers(block))
    torch.manual_seed(1)
    for layer in layers.values():
        nn.init.normal_(layer.adapter.B, std=0.3)
    index, scores = routing(module.num_experts)
    x = torch.randn(13, 32)
    mine = [x.clone().requires_grad_(), scores.clone().requires_grad_()]
    out = block["mlp"]["experts"](mine[0], index, mine[1])
    out.square().sum().backward()
    theirs, wanted = [x.clone().requires_grad_(), scores.clone().requires_grad_()], {}
    for path, layer in layers.items():
        A, B = (p.detach().clone().requires_grad_() for p in (layer.adapter.A, layer.adapter.B))
        delta = torch.einsum("eor,eri->eoi", B, A) * layer.adapter.scale
        name = path.rpartition(".")[2]
        changed = getattr(module, name).detach() + (delta.transpose(1, 2) if layer.base.transposed else delta)
        delattr(module, name)
        setattr(module, name, changed)
        wanted[path] = A, B
    want = twin(module, theirs[0], index, theirs[1])
    want.square().sum().backward()
    assert relative(out, want) < CLOSE
    assert all(relative(a.grad, b.grad) < CLOSE for a, b in zip(mine, theirs, strict=True))
    idle = sorted(set(range(module.num_experts)) - set(index.flatten().tolist()))
    assert idle
    for path, (A, B) in wanted.items():
        adapter = layers[path].adapter
        assert relative(adapter.A.grad, A.grad) < CLOSE
        assert relative(adapter.B.grad, B.grad) < CLOSE
        assert not adapter.A.grad[idle].any()
        assert not adapter.B.grad[idle].any()


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_rows_added_for_speed_change_nothing(family, monkeypatch):
    """In bf16 each expert's tokens are rounded up with rows of zeros: output and every gradient are those without them,
    also where a bias makes those rows more than zeros (gpt-oss), but for the order of sums in bf16 (2^-7)."""
    module = original(family).bfloat16()
    index, scores = routing(module.num_experts)
    x, seen = torch.randn(13, 32).bfloat16(), []
    for round_up in (True, False):
        if not round_up:
            monkeypatch.setattr("lorafit.model.experts.rounded", lambda rows, _: rows)
        block = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": over(module)})})
        attach(block, rank=3, alpha=6, targets=["experts"])
        torch.manual_seed(1)
        for _, layer in adapted_layers(block):
            layer.adapter.start(torch.Generator().manual_seed(2))
            nn.init.normal_(layer.adapter.B, std=0.3)
        inputs, weights = x.clone().requires_grad_(), scores.clone().requires_grad_()
        out = block["mlp"]["experts"](inputs, index, weights)
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        trained = [p.grad for p in block.parameters() if p.requires_grad]
        seen.append([out.detach(), inputs.grad, weights.grad, *trained])
    assert len(seen[0]) >= 7
    for padded, plain in zip(*seen, strict=True):
        assert relative(padded.float(), plain.float()) < 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_b_changes_no_bit(dtype):
    """A fresh adapter on experts is the identity, also in bf16; switched off, a trained one is."""
    module = original("qwen3_moe")
    block = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": over(module)})})
    index, scores = routing(module.num_experts)
    x = torch.randn(13, 32).to(dtype)
    with torch.no_grad():
        want = block["mlp"]["experts"](x, index, scores)
        attach(block, rank=3, targets=["experts"])
        assert torch.equal(block["mlp"]["experts"](x, index, scores), want)
        for _, layer in adapted_layers(block):
            nn.init.normal_(layer.adapter.B)
            layer.enabled = False
        assert torch.equal(block["mlp"]["experts"](x, index, scores), want)


def test_a_tokens_output_does_not_depend_on_the_others():
    """Alone or among others, and in any order, a token gets the same output within rounding."""
    own = over(original("mixtral"))
    index, scores = routing(6)
    x = torch.randn(13, 32)
    with torch.no_grad():
        together = own(x, index, scores)
        order = torch.randperm(13)
        assert relative(own(x[order], index[order], scores[order]), together[order]) < 1e-6
        for n in range(13):
            assert relative(own(x[n : n + 1], index[n : n + 1], scores[n : n + 1])[0], together[n]) < 1e-6


def test_what_is_kept_grows_with_the_tokens_and_not_with_the_experts():
    """Gate and up of each token's own experts, and their low-rank products: S (2 I + 2 r) numbers for S = tokens x
    choices, with 6 experts as with 96; no expert is visited that no token went to."""
    for experts in (6, 96):
        stacks = [FrozenStack(experts, [([DenseWeight(torch.randn(experts * o, i))], slice(None))])
                  for o, i in ((24, 8), (8, 12))]  # fmt: skip
        block = nn.ModuleDict({"gate_up_proj": stacks[0], "down_proj": stacks[1]})
        attach(block, rank=2, targets=["experts"])
        index, scores = routing(6)
        kind = kind_of(original("qwen3_moe"), "here")
        x, groups = torch.randn(13, 8), (ExpertGroup(block["gate_up_proj"]), ExpertGroup(block["down_proj"]))
        job = _Job(*groups, kind, _sorted(index), x)
        with torch.no_grad():
            _, kept = job.forward(x, scores)
        assert len(job.chosen) == len(set(index.flatten().tolist()))
        assert sum(part.numel() for part in kept) == 13 * 2 * (24 + 2 + 2)


@pytest.mark.parametrize("gate", [Halves("silu"), Halves("gelu_tanh"), Clamped(1.702, 1.5)], ids=str)
def test_a_gates_gradient_is_autograds(gate):
    """Written over u, it equals what autograd gives for the plain formula, clamped values included."""
    u, grad = torch.randn(7, 10), torch.randn(7, 5)
    plain = u.clone().requires_grad_()
    if isinstance(gate, Clamped):
        g, up = plain[:, ::2].clamp(max=1.5), plain[:, 1::2].clamp(-1.5, 1.5)
        want = (up + 1) * g * torch.sigmoid(1.702 * g)
    else:
        g, up = plain.chunk(2, dim=1)
        want = (nn.functional.silu(g) if gate.activation == "silu" else nn.functional.gelu(g, approximate="tanh")) * up
    want.backward(grad)
    assert torch.allclose(gate.forward(u), want, atol=1e-6)
    gate.backward(grad.clone(), u)
    assert torch.allclose(u, plain.grad, atol=1e-5)


def test_llama_4s_block_sends_tokens_to_their_experts_only():
    """Output, router logits and the gradient of the input of `RoutedBlock` equal those of the original block, which
    multiplies all tokens with all experts."""
    block = tiny_model("llama4_text").model.layers[0].feed_forward
    routed = RoutedBlock(block)
    x, results = torch.randn(2, 7, 32), []
    for function in (block, routed):
        if function is routed:
            routed.experts = over(block.experts)
        inputs = x.clone().requires_grad_()
        out, logits = function(inputs)
        out.square().sum().backward()
        results.append((out.detach(), logits.detach(), inputs.grad))
    for theirs, mine in zip(*results, strict=True):
        assert mine.shape == theirs.shape
        assert relative(mine, theirs) < CLOSE


def test_a_second_backward_pass_is_refused():
    """The first writes over what was kept."""
    own, (index, scores) = over(original("olmoe")), routing(6)
    out = own(torch.randn(13, 32).requires_grad_(), index, scores).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        out.backward()


def test_experts_of_an_unknown_kind_are_refused():
    """A gate that we do not know is no error in step 1 but a line at loading."""

    class Odd(type(original("qwen3_moe"))):
        def _apply_gate(self, x):
            return x

    module = original("qwen3_moe")
    module.__class__ = Odd
    with pytest.raises(ModelError, match="here: Odd computes its experts in a way that is not known"):
        kind_of(module, "here")
