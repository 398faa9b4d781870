"""An adapter out of two full models: the difference of each linear layer, cut to a rank.

    D = W_tuned - W_base,    B A = the nearest matrix of rank r to D      (Eckart and Young 1936)

What a full fine-tuning did to a layer is often of low rank; how much of it the rank holds is said by layer, as the
share of D's squared norm. Experts are taken apart one by one. Differences in embeddings, norms and biases cannot go
into the adapter: they are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorafit import console
from lorafit.adapter.attach import select
from lorafit.adapter.combine import LowRank, truncated
from lorafit.adapter.file import save_adapter
from lorafit.adapter.merge import put_factors
from lorafit.errors import ConfigError, Faults, LorafitError, ModelError
from lorafit.export.opened import open_model
from lorafit.export.paths import refuse_existing
from lorafit.model.sources import open_source

SHOWN = 8  # layers that are named, those of which the rank holds the least first


def extract(
    base: str, tuned: str, out: str, *, rank: int, targets: Sequence[str] = ("all-linear",), threads: int | None = None
) -> dict[str, Any]:
    """`lorafit extract`: write the adapter to `out` and say what it holds of the difference.

    base, tuned: GGUF files or folders of the same architecture and shapes. Raises ModelError or Faults for two models
    that do not belong together, ConfigError where they do not differ.
    """
    folder = Path(out)
    refuse_existing(folder, "--out")
    opened, other = open_model(base, [], threads=threads), open_source(Path(tuned))
    if opened.model.config.tie_word_embeddings:
        other.shapes.pop("lm_head.weight", None)
    shapes = {name: opened.shape(name) for name in opened.source.shapes}
    turned = {name for name in shapes if getattr(opened.stack(name), "transposed", False)}
    theirs = {name: _turned(shape) if name in turned & other.stacks.keys() else shape
              for name, shape in other.shapes.items()}  # fmt: skip
    _check_shapes(shapes, theirs, opened.source.ignorable, tuned)
    layers = {path if opened.stack(path) else f"{path}.weight": path for path in select(opened.model, targets)}
    factors: dict[str, LowRank] = {}
    shares: dict[str, float] = {}
    inside = kept = outside = 0.0
    others: list[str] = []
    for name in shapes:
        if opened.source.ignorable(name):
            continue
        tensor = other.joined(name).float()
        tensor = tensor.mT if name in turned and name not in other.stacks else tensor  # (E, O, I)
        own = opened.load(name).float()
        difference = tensor - (own.mT if name in turned else own)
        energy = float(difference.square().sum(dtype=torch.float64))
        if not energy < float("inf"):
            raise ModelError(f"{tuned}: {name}", "differs by NaN or infinity", "the file is damaged")
        if energy == 0:
            continue
        if name not in layers:
            outside += energy
            others.append(name)
            continue
        factors[layers[name]], share = truncated(difference, rank)
        shares[layers[name]] = share
        inside, kept = inside + energy, kept + share * energy
    if not factors:
        where = f", but {len(others)} others do, such as {others[0]}" if others else ""
        raise ConfigError(tuned, f"has no linear layer that differs from {base}{where}", "give the fine-tuned model")
    put_factors(opened.model, factors)
    save_adapter(
        opened.model, folder, {"base_model": base, "figures": {"kept of the difference": f"{kept / inside:.1%}"}}
    )
    least = sorted(shares, key=shares.__getitem__)[:SHOWN]
    if others:
        console.warn(f"{len(others)} other tensors differ and cannot go into the adapter, such as {others[0]}")
    return {
        "out": str(folder),
        "layers": len(factors),
        "rank": rank,
        "kept": kept / inside,
        "kept_by_layer": {layer: shares[layer] for layer in least},
        "outside": {"tensors": len(others), "share_of_all": outside / (outside + inside)},
    }


def _turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _check_shapes(ours: Any, theirs: Any, ignorable: Any, place: str) -> None:
    """Raise ModelError (or Faults) where the two models do not have the same tensors."""
    faults: list[LorafitError] = []
    for name in sorted(ours.keys() | theirs.keys()):
        if not ignorable(name) and ours.get(name) != theirs.get(name):
            has = {True: "is missing", False: f"has shape {list(theirs.get(name, ()))}"}[name not in theirs]
            wants = f"the base has {list(ours[name])}" if name in ours else "the base has none of this name"
            faults.append(ModelError(f"{place}: {name}", f"{has}, and {wants}", "give two models of one architecture"))
    if faults:
        raise Faults(faults) if len(faults) > 1 else faults[0]
