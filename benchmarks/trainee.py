"""A model with an adapter and an optimizer, stepped with lorafit's own parts as its training loop steps them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorafit.adapter.attach import adapted_layers
from lorafit.config import Resolved, TrainConfig
from lorafit.data.batch import Pack, pack_rows
from lorafit.job import prepare
from lorafit.model.load import frozen_weights
from lorafit.training.finite import sums_finite
from lorafit.training.loop import step_rows
from lorafit.training.optim import clip_gradient, make_optimizer, optimizer_tensors
from lorafit.training.step import accumulate


@dataclass(frozen=True)
class Row:
    """Token ids, all of them trained, as packing takes them."""

    ids: Sequence[int]

    @property
    def trained(self) -> Sequence[bool]:
        return [True] * len(self.ids)


def random_pack(vocabulary: int, rows: int, tokens: int, seed: int = 0) -> Pack:
    """One pack of rows of random ids, all trained."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, (rows, tokens)).tolist()
    (pack,) = pack_rows([Row(row) for row in ids], range(rows), rows * tokens)
    return pack


class Trainee:
    """What `lorafit train` with these options would train; `step` takes one optimizer step."""

    def __init__(self, **options: Any) -> None:
        origin = dict.fromkeys(options, "given")
        self.job = prepare(Resolved(TrainConfig(**{"rank": 16, "eval_fraction": 0.0, **options}), origin))
        self.model, self.head, self.config = self.job.base.model, self.job.base.head, self.job.resolved.config
        layers = dict(adapted_layers(self.model))
        self.named = {f"{path}.{part}": getattr(layer.adapter, part) for path, layer in layers.items() for part in "AB"}
        self.optimizer = make_optimizer(self.named.values(), self.config.weight_decay)
        self.optimizer.param_groups[0]["lr"] = self.config.lr
        self.model.train()

    def packs(self, number: int) -> list[Pack]:
        """The packs of optimizer step `number` (from 0) over the data."""
        config = self.config
        rows = step_rows(config.seed, number + 1, len(self.job.training), config.batch_size or 1)
        return pack_rows(self.job.training, rows, config.micro_batch_tokens)

    def step(self, packs: Sequence[Pack]) -> float:
        """One step, as the loop takes it; its loss in nats per trained token."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = accumulate(self.model, self.head, packs, checkpointed=self.config.checkpointed_layers or 0)
        norm = clip_gradient(self.named.values(), self.config.clip_norm)
        state = optimizer_tensors(self.optimizer, self.named)
        assert math.isfinite(loss) and math.isfinite(norm) and sums_finite(state.values())  # noqa: PT018
        self.optimizer.step()
        return loss

    @property
    def frozen_bytes(self) -> int:
        """Of the frozen matrices as they are stored, a tied one once."""
        return sum({id(weight): weight.nbytes for weight in frozen_weights(self.model).values()}.values())


def tokens_of(packs: Sequence[Pack]) -> int:
    return sum(len(pack.ids_T) for pack in packs)
