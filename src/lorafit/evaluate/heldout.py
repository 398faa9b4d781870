"""Held-out loss per trained token, and whether a difference between two of them is more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lorafit.data.batch import Tokens, pack_rows
from lorafit.model.architectures import unpackable
from lorafit.model.head import Head
from lorafit.training.step import pack_losses

NORMAL_95 = 1.959964  # two-sided 95 % point of the normal distribution


@dataclass(frozen=True)
class HeldOut:
    """Sums of losses in nats and numbers of trained tokens, one of each per row."""

    nats: np.ndarray
    tokens: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per trained token over all rows."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def bits_per_byte(self, trained_bytes: int) -> float:
        """Bits per UTF-8 byte of the trained text: comparable across tokenizers."""
        return float(self.nats.sum() / math.log(2) / trained_bytes)


@torch.no_grad()
def held_out(model: nn.Module, head: Head, rows: Sequence[Tokens], budget: int) -> HeldOut:
    """Losses of `rows` in packs of at most `budget` tokens; the model must be in eval mode. Every row must have a
    trained token after its first."""
    nats, tokens = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    together = not unpackable(model.config.to_dict())  # type: ignore[operator, union-attr]
    for pack in pack_rows(rows, range(len(rows)), budget, together):
        losses_N = pack_losses(model, head, pack).double().numpy()
        numbers_N = pack.rows_T[pack.predictors_N]
        np.add.at(nats, numbers_N, losses_N)
        np.add.at(tokens, numbers_N, 1)
    return HeldOut(nats, tokens)


def paired_difference(adapter: HeldOut, base: HeldOut) -> tuple[float, float, float]:
    """(mean, low, high) of the loss difference adapter - base in nats per token, with its 95 % interval.

    Rows are the independent units: the ratio estimator's linearised variance over paired rows.
    Source: Cochran, Sampling Techniques (1977), section 6.4.
    """
    gaps, tokens = adapter.nats - base.nats, base.tokens
    mean = float(gaps.sum() / tokens.sum())
    n = len(gaps)
    if n < 2:
        return mean, -math.inf, math.inf
    rest = gaps - mean * tokens
    error = math.sqrt(float((rest**2).sum()) * n / (n - 1)) / float(tokens.sum())
    return mean, mean - NORMAL_95 * error, mean + NORMAL_95 * error


def difference(adapter: HeldOut, base: HeldOut) -> dict[str, float | None]:
    """`paired_difference` for JSON, which has no infinity; one row has no interval: null."""
    mean, low, high = paired_difference(adapter, base)
    bounded = math.isfinite(low)
    return {"mean": mean, "low": low if bounded else None, "high": high if bounded else None}
