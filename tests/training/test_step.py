"""The step's gradient: exact per token, however rows are packed and cut."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from builders.models import FAMILIES, frozen, tiny_model
from builders.rows import random_rows
from lorafit.adapter.attach import adapted_layers, attach
from lorafit.data.batch import pack_rows
from lorafit.training.step import accumulate, pack_losses


def with_adapter(family: str, folder, dropout: float = 0.0):
    """A tiny frozen model with an adapter that is not zero."""
    base = frozen(tiny_model(family), folder)
    attach(base.model, rank=4, alpha=8, dropout=dropout)
    torch.manual_seed(1)
    for _, layer in adapted_layers(base.model):
        nn.init.normal_(layer.adapter.B, std=0.05)
    return base


def gradient(base, packs, **options) -> tuple[float, torch.Tensor]:
    base.model.zero_grad()
    loss = accumulate(base.model, base.head, packs, **options)
    return loss, torch.cat([p.grad.flatten() for p in base.model.parameters() if p.requires_grad])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_row_by_row(family, tmp_path):
    """Loss and gradient of rows in one sequence equal those of each row alone, within 1e-5 relative."""
    base, rows = with_adapter(family, tmp_path), random_rows([11, 3, 17, 8])
    together = gradient(base, pack_rows(rows, range(4), 100))
    alone = gradient(base, pack_rows(rows, range(4), 100, together=False))
    assert math.isclose(together[0], alone[0], rel_tol=1e-5)
    assert relative(together[1], alone[1]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_equals_transformers_own(family, tmp_path):
    """At B = 0 the loss per token is that of the original model on each row alone, within 1e-5."""
    original, rows = tiny_model(family), random_rows([11, 3, 17, 8])
    base = frozen(original, tmp_path)
    for row in rows:
        (pack,) = pack_rows([row], [0], 100)
        with torch.no_grad():
            logits = original(torch.tensor([row.ids]), use_cache=False).logits[0]
            want = F.cross_entropy(logits[pack.predictors_N], torch.from_numpy(pack.targets_N), reduction="none")
            got = pack_losses(base.model, base.head, pack)
        assert torch.allclose(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_micro_batches_do_not_matter(family, tmp_path):
    """Batch 8 = 2 x 4 = 8 x 1 = any cut by tokens: loss and gradient within 1e-6 relative."""
    base, rows = with_adapter(family, tmp_path), random_rows([11, 3, 17, 8, 5, 9, 13, 2])
    whole = gradient(base, pack_rows(rows, range(8), 1000))
    cuts = {
        "2 x 4": [p for part in (range(4), range(4, 8)) for p in pack_rows(rows, part, 1000)],
        "8 x 1": pack_rows(rows, range(8), 1000, together=False),
        "20 tokens": pack_rows(rows, range(8), 20),
    }
    for name, packs in cuts.items():
        loss, grad = gradient(base, packs)
        assert math.isclose(loss, whole[0], rel_tol=1e-6), name
        assert relative(grad, whole[1]) < 1e-6, name


def test_dropout_does_not_depend_on_the_cut(tmp_path):
    """With dropout, packed and row by row see the same masks: equal within rounding; another step sees others."""
    base, rows = with_adapter("llama", tmp_path, dropout=0.3), random_rows([11, 3, 17, 8])
    base.model.train()
    together = gradient(base, pack_rows(rows, range(4), 100), seed=3, step=5)
    alone = gradient(base, pack_rows(rows, range(4), 100, together=False), seed=3, step=5)
    later = gradient(base, pack_rows(rows, range(4), 100), seed=3, step=6)
    assert relative(together[1], alone[1]) < 1e-5
    assert relative(together[1], later[1]) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_checkpointing_changes_no_bit_of_the_gradient(family, tmp_path):
    """One layer or all computed twice give the same numbers, dropout included; going back to none too."""
    base, rows = with_adapter(family, tmp_path, dropout=0.2), random_rows([11, 3, 17])
    base.model.train()
    packs = pack_rows(rows, range(3), 100)
    kept = gradient(base, packs, step=1)
    for layers in (1, 2, 0):
        again = gradient(base, packs, step=1, checkpointed=layers)
        assert [layer.gradient_checkpointing for layer in base.model.get_decoder().layers] == [layers > 0, layers > 1]
        assert kept[0] == again[0]
        assert torch.equal(kept[1], again[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_changing_one_row_leaves_the_others_bits(family, tmp_path):
    """Rows in one pack do not see each other: with one row's ids changed, the others' losses keep every bit."""
    base, rows = with_adapter(family, tmp_path), random_rows([11, 6, 17, 8])
    before = pack_losses(base.model, base.head, pack_rows(rows, range(4), 100)[0])
    rows[0].ids = [7] * len(rows[0].ids)
    pack = pack_rows(rows, range(4), 100)[0]
    after = pack_losses(base.model, base.head, pack)
    others = torch.from_numpy(pack.rows_T[pack.predictors_N] != 0)
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])
