"""Adapters added into their base, written as a plain Hugging Face folder, one tensor in memory at a time.

A multimodal model's folder becomes one again: only its text part changes.

    W' = W + sum of w_i D_i      or another way of combining (adapter/combine.py); fp32, rounded once at the end

A quantised base is unpacked: its own format could not hold the update, whose values are smaller than its steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit import console
from lorafit.adapter.attach import detach
from lorafit.adapter.combine import (
    LowRank,
    added,
    concatenated,
    dropped,
    generator,
    scaled,
    ties,
    truncated,
)
from lorafit.adapter.file import save_adapter
from lorafit.adapter.merge import EMBEDDING, HEAD, Change, grown, put_factors
from lorafit.errors import ConfigError
from lorafit.export.opened import EXACT, Opened, Part, about, open_model
from lorafit.export.paths import nothing_left, refuse_existing
from lorafit.export.probes import log_probabilities, probes
from lorafit.export.text_files import write_config, write_tokenizer
from lorafit.export.verify import ours, rounding_facts, rounding_steps
from lorafit.formats.folders import commit
from lorafit.formats.safetensors import BYTES, INDEX, SINGLE, stream_safetensors

DTYPES = {"fp32": (torch.float32, "F32"), "fp16": (torch.float16, "F16"), "bf16": (torch.bfloat16, "BF16")}
Plan = dict[str, tuple[tuple[int, ...], str]]
"""(shape, dtype) by name."""
SHARD = 5_000_000_000  # bytes of a file at most, unless one tensor is larger


@dataclass(frozen=True)
class Combination:
    """How several adapters become one."""

    method: str = "add"
    """add, ties, dare, or dare-ties (values dropped at random, then TIES)."""
    weights: tuple[float, ...] = ()
    """One for each adapter; all 1 if there are none."""
    density: float = 0.2
    """Share of an update's values that ties and dare keep."""
    seed: int = 0

    def check(self, count: int) -> tuple[float, ...]:
        """The weights of `count` adapters. Raises ConfigError."""
        weights = self.weights or (1.0,) * count
        if len(weights) != count:
            what = f"gives {len(weights)} numbers for {count} adapters"
            raise ConfigError("--weights", what, "give one for each, separated by commas")
        if not all(abs(weight) < float("inf") for weight in weights):
            raise ConfigError("--weights", f"is {','.join(map(str, weights))}", "give numbers")
        if not 0 < self.density <= 1:
            raise ConfigError("--density", f"is {self.density}", "give a share above 0, at most 1")
        return weights

    def of(self, updates: Sequence[Tensor], weights: Sequence[float], places: Sequence[str]) -> Tensor:
        """One update of several of the same tensor; places: what each one's random numbers belong to."""
        if self.method.startswith("dare"):
            updates = [
                dropped(update, self.density, generator(self.seed, where))
                for update, where in zip(updates, places, strict=True)
            ]
        if self.method in ("ties", "dare-ties"):
            return ties(updates, weights, 1.0 if self.method == "dare-ties" else self.density)
        return added(updates, weights)


def combined(parts: Sequence[Part], how: Combination) -> dict[str, Change]:
    """What all adapters together add to each tensor of the base."""
    weights = how.check(len(parts))

    def change(name: str) -> Change:
        own = [(n, part.changes[name]) for n, part in enumerate(parts) if name in part.changes]

        def of(weight: Tensor) -> Tensor:
            updates = [one(weight) for _, one in own]
            return how.of(updates, [weights[n] for n, _ in own], [f"{n}:{name}" for n, _ in own])

        return of

    names = dict.fromkeys(name for part in parts for name in part.changes)
    return {name: change(name) for name in names}


@dataclass
class Rounding:
    """What rounding the merged tensors to their dtype took away."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0
    squares: float = 0.0
    update_squares: float = field(default=0.0)

    def round(self, base: Tensor, update: Tensor, dtype: torch.dtype) -> Tensor:
        """base + update in `dtype`, counted."""
        exact = base + update
        rounded = exact.to(dtype)
        self.note(exact, rounded.float(), update)
        return rounded

    def note(self, exact: Tensor, rounded: Tensor, update: Tensor) -> None:
        """Count what became of a tensor; all fp32."""
        error = (rounded - exact).abs()
        self.largest = max(self.largest, float(error.max()))
        self.total += float(error.sum(dtype=torch.float64))
        self.squares += float(error.square().sum(dtype=torch.float64))
        self.update_squares += float(update.square().sum(dtype=torch.float64))
        self.count += error.numel()

    def facts(self) -> dict[str, float]:
        """Largest and mean error, and how large the errors are beside the update (root of the ratio of squares)."""
        share = (self.squares / self.update_squares) ** 0.5 if self.update_squares else 0.0
        return {
            "largest_error": self.largest,
            "mean_error": self.total / max(self.count, 1),
            "error_beside_update": share,
        }


def merge(
    model: str,
    adapters: Sequence[str],
    out: str,
    *,
    how: Combination,
    dtype: str = "auto",
    as_adapter: bool = False,
    rank: int | None = None,
    template: str | None = None,
    threads: int | None = None,
    data: str | None = None,
) -> dict[str, Any]:
    """`lorafit merge`: write the folder `out` and return what became of the weights, and the check of the result.

    as_adapter: write the combined adapter in PEFT's layout instead, of `rank` if given. Raises LorafitError's family;
    then nothing is left at `out`.
    """
    folder = Path(out)
    refuse_existing(folder, "--out")
    how.check(len(adapters))
    opened = open_model(model, adapters, template, threads, grows=not as_adapter)
    if as_adapter:
        return write_combined(opened, folder, how, rank)
    if rank is not None:
        raise ConfigError("--rank", "is given without --as-adapter", "a merged model has no rank; leave it out")
    if dtype == "auto":
        dtype = EXACT.get(opened.format, "bf16")
    if opened.source.quantised:
        console.say(f"the base is quantised ({opened.format}): it is unpacked, and the result is in {dtype}")
    rounding = Rounding()

    def write(path: Path) -> None:
        with nothing_left(path):
            tied = write_weights(opened, combined(opened.parts, how), path, dtype, rounding)
            write_config(opened, path, dtype, tied)
            write_tokenizer(opened, path)
            told.update(_verify(opened, path, dtype, data))

    told: dict[str, Any] = {}
    commit(folder, write, manifest=False)
    return {"out": str(folder), "dtype": dtype, **rounding.facts(), **told}


@dataclass(frozen=True)
class Exact:
    """A model's tensors before they are rounded."""

    opened: Opened
    changes: dict[str, Change]

    def of(self, name: str) -> tuple[Tensor, Tensor | None]:
        """(a tensor of the base, with rows for added tokens; what is added to it, fp32, or None)."""
        rows = grown(self.opened.model)
        base = self.opened.load(EMBEDDING if name == HEAD and name not in self.opened.source.shapes else name)
        base = F.pad(base, (0, 0, 0, rows[name] - len(base))) if name in rows else base
        change = self.changes.get(name)
        return base, None if change is None else change(base.float())

    def pairs(self, merged: Opened) -> Iterator[tuple[Tensor, Tensor]]:
        """(exact, as the merged model's files have it) of every matrix."""
        for name, shape in merged.source.shapes.items():
            if len(shape) > 1:
                base, update = self.of(name)
                yield base.float() if update is None else base.float() + update, merged.load(name)


def write_weights(opened: Opened, changes: dict[str, Change], folder: Path, dtype: str, rounding: Rounding) -> bool:
    """All tensors, in files of at most SHARD bytes; returns whether the head is still the embedding. What a multimodal
    folder has beside its text part is copied, unpacked if it is quantised."""
    source, (kind, code) = opened.source, DTYPES[dtype]
    exact = Exact(opened, changes)
    shapes = {name: opened.shape(name) for name in source.shapes if not source.ignorable(name)}
    rows = grown(opened.model)
    shapes |= {name: (rows[name], *shape[1:]) for name, shape in shapes.items() if name in rows}
    tied = HEAD not in shapes
    if tied and HEAD in changes:
        shapes[HEAD], tied = shapes[EMBEDDING], False  # the head goes its own way from here
    own = {source.file_name(name): name for name in shapes}
    plan = {name: (shapes[ours], code) for name, ours in own.items()}
    for name, shape in source.others.items():
        plan[name] = (shape, source.format(name) if source.format(name) in BYTES else code)

    def load(name: str) -> Tensor:
        if name not in own:
            return source.load(name) if plan[name][1] == source.format(name) else source.load(name).to(kind)
        base, update = exact.of(own[name])
        merged = base.to(kind) if update is None else rounding.round(base.float(), update, kind)
        if not bool(torch.isfinite(merged).all()):
            raise ConfigError("--dtype", f"{dtype} cannot hold {name}: infinity or NaN", "give bf16 or fp32")
        return merged

    files = list(_shards(plan))
    named: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        file = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        stream_safetensors(folder / file, part, load)
        named |= dict.fromkeys(part, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(map(_size, plan.values()))}, "weight_map": named}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return tied


def _shards(plan: Plan) -> Iterator[Plan]:
    """The tensors by file, in order."""
    part: Plan = {}
    filled = 0
    for name, entry in plan.items():
        if part and filled + _size(entry) > SHARD:
            yield part
            part, filled = {}, 0
        part[name] = entry
        filled += _size(entry)
    yield part


def _size(entry: tuple[tuple[int, ...], str]) -> int:
    """Bytes of a tensor of this shape and dtype."""
    return torch.Size(entry[0]).numel() * BYTES[entry[1]]


def _verify(opened: Opened, folder: Path, dtype: str, data: str | None) -> dict[str, float]:
    """The folder, loaded here, against the base with its adapter. Several adapters are on no model at once."""
    merged, kind = opened.beside(folder), DTYPES[dtype][1]
    if len(opened.parts) > 1:
        return {}
    found = probes(opened.tokenizer, data, int(opened.model.config.max_position_embeddings))
    mine, theirs = ours(opened.model, found, str(folder)), log_probabilities(merged.model, found)
    exact = Exact(opened, opened.parts[0].changes)
    return rounding_facts(mine, theirs, kind, str(folder), lambda: rounding_steps(exact.pairs(merged), kind))


def write_combined(opened: Opened, folder: Path, how: Combination, rank: int | None) -> dict[str, Any]:
    """The adapters as one, in PEFT's layout, of the ranks' sum or cut to `rank`."""
    for part in opened.parts:
        part.refuse_more()
    factors, kept = combined_factors(opened, how, rank)
    detach(opened.model)
    put_factors(opened.model, factors)
    facts = {
        key: value for key, value in about(opened.parts[0].folder).items() if key in ("tokenizer", "template", "data")
    }
    save_adapter(opened.model, folder, {**facts, "base_model": str(opened.path)})
    return {"out": str(folder), "rank": max(update.rank for update in factors.values()), "kept": kept}


def combined_factors(opened: Opened, how: Combination, rank: int | None) -> tuple[dict[str, LowRank], float]:
    """(the combined update of each layer as factors, the share of the squared norm that they keep)."""
    weights = how.check(len(opened.parts))
    layers = dict.fromkeys(layer for part in opened.parts for layer in part.low_rank)
    if how.method != "add" and rank is None:
        what = f"{how.method} gives updates of full rank, which no adapter holds"
        raise ConfigError("--rank", what, "give the rank to cut them to")
    factors, kept, total = {}, 0.0, 0.0
    for layer in layers:
        own = [(n, part.low_rank[layer]) for n, part in enumerate(opened.parts) if layer in part.low_rank]
        if how.method == "add":
            update: Tensor | LowRank = concatenated([scaled(one, weights[n]) for n, one in own])
        else:
            places = [f"{n}:{layer}.weight" for n, _ in own]
            update = how.of([one.dense() for _, one in own], [weights[n] for n, _ in own], places)
        if rank is None:
            assert isinstance(update, LowRank), "only a sum keeps its rank"
            factors[layer], share = update, 1.0
        else:
            factors[layer], share = truncated(update, rank)
        size = float((update.dense() if isinstance(update, LowRank) else update).square().sum(dtype=torch.float64))
        kept, total = kept + share * size, total + size
    return factors, kept / total if total else 1.0
