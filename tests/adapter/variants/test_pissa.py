"""PiSSA: the principal part, the form by differences, and what it becomes for others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorafit.adapter.attach import attach, trained
from lorafit.adapter.dropout import PlacedDropout
from lorafit.adapter.lora import LoraAdapter
from lorafit.adapter.variants.pissa import PissaAdapter
from lorafit.frozen.linear import FrozenLinear
from lorafit.frozen.packed import quantise
from lorafit.training.trained import Trained


def adapter_on(matrix_OI: torch.Tensor, rank: int = 4, learnt: bool = True, **options) -> PissaAdapter:
    rows, columns = matrix_OI.shape
    made = PissaAdapter(columns, rows, rank, 6.0, PlacedDropout(), **options)
    made.start_from(matrix_OI, torch.Generator().manual_seed(0))
    if learnt:
        with torch.no_grad():
            made.A.add_(torch.randn_like(made.A) * 0.1)
            made.B.add_(torch.randn_like(made.B) * 0.1)
    return made


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_start_is_the_best_approximation(use_rslora):
    """X15: s B0 A0 and the remainder add up to W, and the remainder has W's other singular values."""
    W = torch.randn(24, 40)
    made = adapter_on(W, learnt=False, use_rslora=use_rslora)
    principal = made.scale * made.B0 @ made.A0
    values = torch.linalg.svdvals(W)
    rest = torch.linalg.svdvals(W - principal)
    assert torch.allclose(rest[:20], values[4:], atol=1e-5)
    assert torch.allclose(torch.linalg.svdvals(principal)[:4], values[:4], atol=1e-5)
    assert torch.allclose((W - principal) + principal, W, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_no_bit(dtype):
    """The update is a difference, and exactly zero at the start."""
    made = adapter_on(torch.randn(24, 40), learnt=False)
    assert torch.equal(made(torch.randn(5, 40).to(dtype)), torch.zeros(5, 24, dtype=dtype))


def test_output_and_gradients_are_those_on_the_remainder():
    """x (W - s B0 A0)^T + s x A^T B^T, as the paper trains it: the same output and gradients, within 1e-5."""
    W = torch.randn(24, 40)
    made = adapter_on(W)
    rest = W - made.scale * made.B0 @ made.A0
    results = []
    for forward in (lambda x: x @ W.T + made(x), lambda x: x @ rest.T + made.scale * x @ made.A.T @ made.B.T):
        torch.manual_seed(1)
        x = torch.randn(7, 40, requires_grad=True)
        y = forward(x)
        results.append([y.detach(), *torch.autograd.grad((y * torch.randn(24)).sum(), [x, made.A, made.B])])
    for ours, papers in zip(*results, strict=True):
        assert (ours - papers).norm() <= 1e-5 * papers.norm()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_its_factors_are_a_plain_lora_of_twice_the_rank(use_rslora):
    """At twice the rank, with alpha doubled (rsLoRA: times sqrt 2), the factors give the update of [A | A0], [B | -B0],
    PEFT's conversion, which has the same product."""
    made = adapter_on(torch.randn(24, 40), use_rslora=use_rslora)
    A, B = made.factors()
    alpha = 6.0 * (2**0.5 if use_rslora else 2)
    plain = LoraAdapter(40, 24, 8, alpha, PlacedDropout(), use_rslora)
    with torch.no_grad():
        plain.A.copy_(A)
        plain.B.copy_(B)
    x = torch.randn(5, 40)
    assert torch.allclose(plain(x), made(x), rtol=1e-5, atol=1e-6)
    pefts = torch.cat([made.B, -made.B0], dim=1) @ torch.cat([made.A, made.A0])
    assert torch.allclose(B @ A, pefts, rtol=1e-4, atol=1e-5)


def test_bf16_keeps_small_changes():
    """After a change of 1e-3 of the start, bf16 products are wrong by under 2 % of the update; [A | A0] would be wrong
    by more than the update itself."""
    torch.manual_seed(0)
    made = adapter_on(torch.randn(64, 64) @ torch.diag(torch.arange(64, 0, -1.0)) / 8, learnt=False)
    with torch.no_grad():
        made.A.mul_(1 + 1e-3 * torch.randn_like(made.A))
        made.B.mul_(1 + 1e-3 * torch.randn_like(made.B))
    x = torch.randn(200, 64)
    exact, half = made(x), x.bfloat16()
    ours = made(half).float()
    apart = [half @ a.bfloat16().T @ b.bfloat16().T for a, b in ((made.A, made.B), (made.A0, made.B0))]
    pefts = (made.scale * (apart[0] - apart[1])).float()
    assert (ours - exact).norm() < 0.02 * exact.norm()
    assert (pefts - exact).norm() > exact.norm()


def test_a_packed_base_gives_the_start_of_its_values():
    """From NF4 as from the same values unpacked, bit for bit, and the base's bytes stay."""
    stored = quantise(torch.randn(32, 64), "nf4")
    dense = nn.Linear(64, 32, bias=False)
    dense.weight.data = stored.dense()
    before = stored.data.clone()
    models = [nn.Sequential(FrozenLinear(stored)), nn.Sequential(dense)]
    for model in models:
        attach(model, rank=4, alpha=8, init="pissa")
    packed, plain = (model[0].adapter for model in models)
    assert torch.equal(packed.A0, plain.A0)
    assert torch.equal(packed.B0, plain.B0)
    assert torch.equal(stored.data, before)


def test_only_a_and_b_are_trained_and_the_start_is_in_the_state():
    """A checkpoint holds A0 and B0, which no gradient reaches, and restores all four."""
    model = nn.Sequential(nn.Linear(40, 24))
    attach(model, rank=4, init="pissa")
    assert list(trained(model)) == ["0.A", "0.B"]
    assert list(Trained(model).state()) == ["0.A", "0.B", "0.A0", "0.B0"]
    kept = {name: torch.randn_like(tensor) for name, tensor in Trained(model).state().items()}
    Trained(model).load(kept)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in Trained(model).state().items())
