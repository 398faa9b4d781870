"""The base and what each method made, on the same rows: losses in pairs, so that rows' own difficulty cancels out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorafit.adapter.file import load_adapter
from lorafit.config import TrainConfig
from lorafit.data.tokens import TokenRow
from lorafit.evaluate.heldout import HeldOut, held_out, paired_difference
from lorafit.model.load import Base
from lorafit.tuned import reopen

Losses = dict[str, dict[str, HeldOut]]


def measure(
    made: Mapping[str, Path], model: str, config: TrainConfig, rows: Mapping[str, Sequence[TokenRow]]
) -> Losses:
    """{set of rows: {"base" or method: its losses}}.

    made: the run's folder of each method. config: settled, for the compute dtype and the template. rows: sets by name.
    """
    found: Losses = {name: {} for name in rows}
    for who, folder in {"base": None, **made}.items():
        opened = _open(folder, model, config)
        for name, some in rows.items():
            found[name][who] = held_out(opened.model, opened.head, some, int(config.micro_batch_tokens or 1))
    return found


def _open(folder: Path | None, model: str, config: TrainConfig) -> Base:
    if folder is not None and (folder / "model").is_dir():
        return reopen(folder / "model", config)
    base = reopen(model, config)
    if folder is not None:
        load_adapter(base.model, folder / "adapter")
        base.model.eval()
    return base


def gaps(losses: Mapping[str, HeldOut]) -> dict[str, dict[str, float | None]]:
    """{"A - B": mean, low, high} in nats per token with the 95 % interval, of each method with the base and of the
    methods with each other; null where one row gives no interval."""
    names = list(losses)
    pairs = [(a, b) for place, b in enumerate(names) for a in names[place + 1 :]]
    return {f"{a} - {b}": _gap(losses[a], losses[b]) for a, b in pairs}


def _gap(a: HeldOut, b: HeldOut) -> dict[str, float | None]:
    mean, low, high = paired_difference(a, b)
    bounded = math.isfinite(low)
    return {"mean": mean, "low": low if bounded else None, "high": high if bounded else None}
