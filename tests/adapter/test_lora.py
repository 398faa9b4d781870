"""LoRA's forward pass and its start."""

from __future__ import annotations

import math

import torch
from torch import nn

from lorafit.adapter.dropout import PlacedDropout
from lorafit.adapter.lora import LoraAdapter, LoraLinear


def adapter(rank: int = 4, alpha: float = 8.0) -> LoraAdapter:
    made = LoraAdapter(6, 5, rank, alpha, PlacedDropout())
    made.start(torch.Generator().manual_seed(0))
    return made


def test_the_update_is_the_papers_formula():
    """(alpha / r) x A^T B^T, written out element by element."""
    made = adapter()
    nn.init.normal_(made.B)
    x_TI = torch.randn(3, 6)
    got_TO = made(x_TI)
    for t in range(3):
        for o in range(5):
            h_r = [sum(x_TI[t, i] * made.A[r, i] for i in range(6)) for r in range(4)]
            want = 8.0 / 4 * sum(h_r[r] * made.B[o, r] for r in range(4))
            assert math.isclose(got_TO[t, o].item(), want.item(), rel_tol=1e-5, abs_tol=1e-6)


def test_shapes_are_those_of_the_docstring():
    """x (..., I) gives (..., O); A is (r, I), B is (O, r), both fp32."""
    made = adapter()
    assert made.A.shape == (4, 6)
    assert made.B.shape == (5, 4)
    assert made.A.dtype == made.B.dtype == torch.float32
    assert made(torch.randn(2, 7, 6)).shape == (2, 7, 5)


def test_a_new_adapter_changes_no_bit():
    """B starts at zero: the adapted layer's output equals the base's in every bit, in fp32 and in bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        base = nn.Linear(6, 5).to(dtype)
        x = torch.randn(9, 6, dtype=dtype)
        assert torch.equal(LoraLinear(base, adapter())(x), base(x))


def test_a_starts_kaiming_uniform():
    """A is uniform within 1 / sqrt(inputs), and the same generator gives the same start."""
    made = LoraAdapter(400, 5, 64, 8, PlacedDropout())
    made.start(torch.Generator().manual_seed(1))
    bound = 1 / math.sqrt(400)
    assert 0.95 * bound < made.A.abs().max() <= bound
    assert abs(made.A.std().item() - bound / math.sqrt(3)) < 0.02 * bound
    again = LoraAdapter(400, 5, 64, 8, PlacedDropout())
    again.start(torch.Generator().manual_seed(1))
    assert torch.equal(made.A, again.A)


def test_a_disabled_adapter_gives_the_base():
    """`enabled` False gives the base's bits whatever the adapter has learnt."""
    base = nn.Linear(6, 5)
    layer = LoraLinear(base, adapter())
    nn.init.normal_(layer.adapter.B)
    x = torch.randn(4, 6)
    assert not torch.equal(layer(x), base(x))
    layer.enabled = False
    assert torch.equal(layer(x), base(x))
