"""LoftQ: what 4 bits took away, given back as an adapter."""

from __future__ import annotations

import pytest
import torch

from lorafit.adapter.dropout import PlacedDropout
from lorafit.adapter.lora import LoraAdapter
from lorafit.adapter.variants.loftq import start_loftq
from lorafit.frozen.packed import quantise


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_error_of_quantising_never_rises(use_rslora):
    """X15: |W - Q - s B A| is the best that the rank allows, under |W - Q|, falling with the rank, 0 at full rank."""
    torch.manual_seed(0)
    W = torch.randn(48, 64)
    Q = quantise(W, "nf4").dense()
    values, errors = torch.linalg.svdvals(W - Q), [float((W - Q).norm())]
    for rank in (1, 4, 16, 48):
        adapter = LoraAdapter(64, 48, rank, 6.0, PlacedDropout(), use_rslora)
        start_loftq(adapter, W, Q, torch.Generator())
        errors.append(float((W - Q - adapter.scale * adapter.B @ adapter.A).detach().norm()))
        assert errors[-1] == pytest.approx(float(values[rank:].norm()), abs=1e-5)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
