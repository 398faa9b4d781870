"""The laws of lorafit.evaluate.heldout: losses as one row at a time would give them, and honest intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from builders.models import frozen, tiny_model
from builders.rows import Row, random_rows
from lorafit.adapter.attach import adapted_layers, attach
from lorafit.evaluate.heldout import HeldOut, held_out, paired_difference


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_losses_are_those_of_each_row_alone(family, budget, tmp_path):
    """Nats and trained tokens of every row equal the original model's on that row alone, however rows are packed."""
    original, rows = tiny_model(family), random_rows([11, 3, 17, 8, 2])
    rows.append(Row([5, 6, 7, 8], [True, True, False, True]))  # the first token has nothing to be told by
    base = frozen(original, tmp_path)
    found = held_out(base.model, base.head, rows, budget)
    for number, row in enumerate(rows):
        with torch.no_grad():
            logits = original(torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
        trained = torch.tensor(row.trained[1:])
        losses = F.cross_entropy(logits, torch.tensor(row.ids[1:]), reduction="none")[trained]
        assert found.tokens[number] == len(losses)
        assert math.isclose(found.nats[number], losses.double().sum(), rel_tol=1e-5, abs_tol=1e-5)
    assert math.isclose(found.loss, found.nats.sum() / found.tokens.sum())


def test_evaluation_changes_nothing(tmp_path):
    """Twice the same bits, and no gradient is left behind, with an adapter and dropout on the model."""
    base, rows = frozen(tiny_model("llama"), tmp_path), random_rows([11, 3, 17])
    attach(base.model, rank=2, dropout=0.5)
    base.model.eval()
    first, second = (held_out(base.model, base.head, rows, 20) for _ in "ab")
    assert (first.nats == second.nats).all()
    assert all(p.grad is None for _, layer in adapted_layers(base.model) for p in layer.adapter.parameters())


def test_figures_by_hand():
    """12 nats over 6 tokens and 24 bytes: 2 nats per token, e^2 perplexity, 0.72 bits per byte."""
    held = HeldOut(np.array([3.0, 9.0]), np.array([2, 4]))
    assert held.loss == 2.0
    assert math.isclose(held.perplexity, math.e**2)
    assert math.isclose(held.bits_per_byte(24), 12 * math.log2(math.e) / 24)
    assert math.isclose(HeldOut(np.array([8 * math.log(2)]), np.array([3])).bits_per_byte(1), 8.0)
    assert math.isfinite(HeldOut(np.array([1e6]), np.array([1])).perplexity)


def pairs(seed: int, n: int, effect: float = -0.1) -> tuple[HeldOut, HeldOut]:
    """(adapter, base): rows of 5 to 60 tokens whose losses differ by `effect` per token, more or less."""
    random = np.random.default_rng(seed)
    tokens = random.integers(5, 60, n)
    base = tokens * random.gamma(4.0, 0.5, n)
    gaps = tokens * random.normal(effect, 0.3, n)
    return HeldOut(base + gaps, tokens), HeldOut(base, tokens)


def bootstrap(adapter: HeldOut, base: HeldOut, draws: int = 4000) -> float:
    """Standard error of the difference, by drawing rows again and again: the slow twin."""
    random, n = np.random.default_rng(0), len(base.tokens)
    drawn = random.integers(0, n, (draws, n))
    gaps = (adapter.nats - base.nats)[drawn].sum(1)
    return float((gaps / base.tokens[drawn].sum(1)).std())


def jackknife(adapter: HeldOut, base: HeldOut) -> float:
    """Standard error of the difference, by leaving out one row at a time: another twin."""
    gaps, n = adapter.nats - base.nats, len(base.tokens)
    means = [np.delete(gaps, i).sum() / np.delete(base.tokens, i).sum() for i in range(n)]
    return float(np.sqrt((n - 1) * np.var(means)))


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_is_the_bootstraps_and_the_jackknifes(seed):
    """Half the interval over 1.96 is the standard error that resampling 200 rows gives: within 6 % of 4000 bootstrap
    draws (whose own noise is 1.1 %), within 2 % of the jackknife."""
    adapter, base = pairs(seed, 200)
    mean, low, high = paired_difference(adapter, base)
    assert math.isclose(mean, adapter.loss - base.loss, rel_tol=1e-9)
    assert math.isclose(mean - low, high - mean, rel_tol=1e-9)
    error = (high - low) / 2 / 1.959964
    assert math.isclose(error, bootstrap(adapter, base), rel_tol=0.06)
    assert math.isclose(error, jackknife(adapter, base), rel_tol=0.02)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Of 1000 experiments with 40 rows each, 92 to 97 % have the true difference inside their 95 % interval."""
    inside = 0
    for seed in range(1000):
        _, low, high = paired_difference(*pairs(seed, 40, effect=-0.05))
        inside += low <= -0.05 <= high
    assert 0.92 <= inside / 1000 <= 0.97


def test_nothing_is_claimed_from_one_row():
    """A single row has no spread to measure; equal losses have no difference at all."""
    adapter, base = pairs(0, 1)
    mean, low, high = paired_difference(adapter, base)
    assert (low, high) == (-math.inf, math.inf)
    assert math.isfinite(mean)
    assert paired_difference(base, base)[0] == 0.0
    _, base = pairs(0, 30)
    assert paired_difference(base, base) == (0.0, 0.0, 0.0)
