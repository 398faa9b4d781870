"""A run's memory and seconds, predicted from its settings and the lengths of its rows, and the settings that fit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from lorafit import console, machine
from lorafit.config import Resolved, TrainConfig, bytes_of, pattern
from lorafit.data.batch import Tokens, cut
from lorafit.errors import MemoryLimitError
from lorafit.planning import devices, fit
from lorafit.planning.duration import Clock, Pack, Remaining, Work
from lorafit.planning.guard import Guard
from lorafit.planning.memory import OPTIMIZER, Memory, Use, casts, parameters
from lorafit.planning.outline import Outline
from lorafit.planning.speeds import Speeds
from lorafit.training.loop import Plan, step_rows
from lorafit.training.sample import TOKENS

SEEN = 400  # optimizer steps whose packs are worked out; they stand for those of a longer run
SAMPLES = 4  # answers in the report


@dataclass(frozen=True)
class Rows:
    """Rows as a prediction needs them."""

    training: Sequence[Tokens]
    evaluation: Sequence[Tokens]


@dataclass(frozen=True)
class Held:
    """Bytes that this process holds before the model comes: libraries, and rows with what reads them."""

    libraries: int
    data: int


@dataclass(frozen=True)
class Elsewhere:
    """A device that is not here: bytes of its memory, and its published operations a second, if they are known."""

    memory: int
    flops: float | None


@dataclass(frozen=True)
class Prediction:
    """What a run will need; `memory.total` predicts VmHWM, `seconds` the time from here to the command's end."""

    memory: Memory
    use: Use
    clock: Clock
    work: Work
    budget: int
    made: float
    """time.perf_counter() when it was made."""
    elsewhere: Elsewhere | None = None
    given: bool = False
    """Whether the budget is --memory's."""

    def seconds(self, done: int = 0) -> float:
        """From before the model is loaded to the end, with `done` steps behind it; on a device that is not here, of
        the steps alone at its published rate, 0 where there is none."""
        if self.elsewhere is not None:
            work = devices.flops(self.clock.model, self.use, self.work)
            return work / self.elsewhere.flops if self.elsewhere.flops else 0.0
        share = 1 - done / max(1, self.work.count)
        fixed = self.clock.whole(replace(self.work, count=0, evaluations=0, saves=0))
        return fixed + share * (self.clock.whole(self.work) - fixed)

    def figures(self, started: float, done: int = 0) -> dict[str, float]:
        """For report.json: the peak in bytes, and seconds of the command that began at `started`."""
        seconds = self.made - started + self.seconds(done)
        return {"memory_bytes": self.memory.total, "seconds": round(seconds, 1)}

    def guard(self) -> Guard:
        """What keeps the run inside its budget."""
        trainable, layers = parameters(self.clock.model, self.use), len(self.clock.model.layers)
        sizes = self.memory.total, casts(self.clock.model, self.use), OPTIMIZER * trainable
        return Guard(self.budget, self.given, *sizes, self.use.longest, layers)

    def remaining(self) -> Remaining:
        """What is left at each step, for the progress line."""
        others = self.work.evaluations * self.clock.evaluation(self.work) + self.work.saves * self.clock.save()
        return Remaining([self.clock.step(packs) for packs in self.work.steps], self.work.count, others)


class DoesNotFit(MemoryLimitError):
    """Nothing fits; `resolved` and `prediction` are of the settings that need least."""

    resolved: Resolved
    prediction: Prediction


def settle(
    resolved: Resolved,
    plan: Plan,
    model: Outline,
    rows: Rows,
    held: Held,
    *,
    resumed: bool = False,
    elsewhere: Elsewhere | None = None,
) -> tuple[Resolved, Prediction]:
    """The settings that memory decides, each with its reason, and what the run will then need.

    resumed: every setting is run.yaml's, and none is chosen again. elsewhere: the device to plan for, if it is not this
    machine. Raises DoesNotFit (exit code 3) where nothing fits: by how much, and the three cheapest ways out.
    """
    config = resolved.config
    speeds = Speeds(int(config.threads or 1), config.compute)
    lengths = [len(row.ids) for row in rows.training]
    room = elsewhere.memory if elsewhere else machine.available_memory()
    budget = room if elsewhere else room + machine.memory_bytes()
    if config.memory:
        budget = min(bytes_of(config.memory), budget) if elsewhere else bytes_of(config.memory)

    @cache
    def packs(limit: int) -> fit.Largest:
        work = _work(replace(config, micro_batch_tokens=limit), plan, rows)
        training = [pack for step in work.steps for pack in step]
        trained = max(1, *(pack.trained for pack in (*training, *work.evaluation)))
        evaluated = max((pack.tokens for pack in work.evaluation), default=0)
        return fit.Largest(max(pack.tokens for pack in training), trained, evaluated)

    here = fit.Situation(model, held.libraries, held.data, budget, lengths, packs, on_device=elsewhere is not None)
    use, free = _use(config, rows), _free(resolved, model)
    if elsewhere:
        free = replace(free, paging=False)
    bounded = config.memory is not None or elsewhere is not None

    def seconds(one: Use) -> float:
        work = _work(_with(config, one), plan, rows, few=8)
        return devices.flops(model, one, work) if elsewhere else Clock(model, one, speeds).steps(work)

    small: DoesNotFit | None = None
    if not resumed:
        chosen: Use | None = use if bounded else fit.courteous(here, use, free, room // 2)
        if bounded or not here.fits(chosen or use):
            chosen = fit.fastest(here, use, free, seconds)
        if chosen is None:
            chosen = fit.least(here, use, free)
            place = "--memory" if config.memory else "the device's memory" if elsewhere else "memory"
            small = _too_small(here, use, free, place)
        resolved = _settled(resolved, chosen, here)
    resolved = _named(resolved, len(model.layers))
    use = here.sized(_use(resolved.config, rows), int(resolved.config.micro_batch_tokens or 1))
    clock = Clock(model, use, speeds)
    work, now = _work(resolved.config, plan, rows), time.perf_counter()
    given = config.memory is not None
    prediction = Prediction(here.memory(use), use, clock, work, budget, now, elsewhere, given)
    prediction.seconds()  # measures what is not known yet
    speeds.keep()
    if small is not None:
        small.resolved, small.prediction = resolved, prediction
        raise small
    return resolved, prediction


def _use(config: TrainConfig, rows: Rows) -> Use:
    """The largest pack under these settings; what is not settled yet is as large as it may become."""
    tokens = config.micro_batch_tokens or max(fit.SIZES)
    longest = max((len(row.ids) for row in (*rows.training, *rows.evaluation)), default=1)
    longest = min(longest, config.max_length or longest)
    total, trained = (sum(map(count, rows.training)) for count in (_length, _trained))
    most = max(longest, min(tokens, total))  # until packs are cut
    return Use(
        base=config.base,
        compute=config.compute,
        rank=0 if config.method == "full" else config.rank,
        targets=config.targets,
        limit=tokens,
        tokens=most,
        trained=max(1, round(most * trained / max(1, total))),
        longest=longest,
        chunk=config.loss_chunk or max(fit.CHUNKS),
        checkpointed=config.checkpointed_layers or 0,
        threads=int(config.threads or 1),
        paged=config.paging == "on",
        full=config.method == "full",
        dora=config.use_dora,
        init=config.init,
        pattern=tuple((name, int(value)) for name, value in pattern(config.rank_pattern).items()),
        bias=config.bias,
        whole=config.modules_to_save,
        rows=len(config.train_tokens) + len(config.new_tokens),
    )


def _free(resolved: Resolved, model: Outline) -> fit.Free:
    config = resolved.config
    given = config.checkpointed_layers is not None or config.checkpointing in ("off", "all")
    return fit.Free(
        base=config.method == "lora" and resolved.origin.get("base", "").startswith("auto"),
        tokens=config.micro_batch_tokens is None,
        chunk=config.loss_chunk is None,
        checkpointed=not given,
        paging=config.paging == "auto" and model.pageable,
        length=config.shorten,
    )


def _with(config: TrainConfig, use: Use) -> TrainConfig:
    return replace(config, micro_batch_tokens=use.limit)


def _settled(resolved: Resolved, use: Use, here: fit.Situation) -> Resolved:
    """The chosen settings with the reason, where they were free."""
    config = resolved.config
    need = here.memory(use).total / 1e9
    why = f"auto: the run needs about {need:.2f} GB, and may take {here.budget / 1e9:.2f} GB"
    values: dict[str, Any] = {}
    if config.micro_batch_tokens is None:
        values["micro_batch_tokens"] = use.limit
    if config.loss_chunk is None:
        values["loss_chunk"] = use.chunk
    if config.checkpointed_layers is None and config.checkpointing == "auto":
        values["checkpointed_layers"] = use.checkpointed
    if config.paging == "auto":
        values["paging"] = "on" if use.paged else "off"
    if use.base != config.base:
        values["base"] = use.base
    if use.longest < max(here.lengths, default=0):
        values["max_length"] = use.longest
    for name, value in values.items():
        resolved = resolved.settle(name, value, why)
    return resolved


def _named(resolved: Resolved, layers: int) -> Resolved:
    """Whatever is still open: checkpointing and its layers say the same, chunks have their size."""
    config = resolved.config
    if config.checkpointed_layers is None:
        count = layers if config.checkpointing == "all" else 0
        resolved = resolved.settle("checkpointed_layers", count, f"as --checkpointing {config.checkpointing}")
    count = int(resolved.config.checkpointed_layers or 0)
    if config.checkpointing == "auto":
        mode = "off" if count == 0 else "all" if count >= layers else "some"
        resolved = resolved.settle("checkpointing", mode, resolved.origin.get("checkpointed_layers", "default"))
    if config.loss_chunk is None:
        resolved = resolved.settle("loss_chunk", max(fit.CHUNKS), "auto: default")
    if config.micro_batch_tokens is None:
        resolved = resolved.settle("micro_batch_tokens", min(fit.COURTEOUS), "auto: default")
    if config.paging == "auto":
        resolved = resolved.settle("paging", "off", "auto: the base fits")
    return resolved


def _too_small(here: fit.Situation, use: Use, free: fit.Free, place: str) -> DoesNotFit:
    need = here.memory(fit.least(here, use, free)).total * fit.SAFETY
    budget, lack, least = map(console.gigabytes, (here.budget, need - here.budget, need))
    what = f"{budget} is {lack} less than the {least} that this run needs at least"
    ways = fit.ways_out(here, use, free)
    return DoesNotFit(place, what, "the cheapest ways out: " + "; or ".join(ways))


def _work(config: TrainConfig, plan: Plan, rows: Rows, few: int = SEEN) -> Work:
    """The packs of the first steps, and how often all else happens."""
    budget, together = int(config.micro_batch_tokens or 1), config.packing == "auto"
    size, n = int(config.batch_size or 1), len(rows.training)
    steps = [
        _packs(rows.training, step_rows(config.seed, step, n, size), budget, together)
        for step in range(1, min(plan.steps, few) + 1)
    ]
    every = int(config.save_every or plan.steps)
    evaluated = -(-plan.steps // int(config.eval_every or plan.steps)) if rows.evaluation else 0
    asked = rows.evaluation[:SAMPLES]
    return Work(
        steps=steps,
        count=plan.steps,
        evaluation=_packs(rows.evaluation, range(len(rows.evaluation)), budget, True),
        evaluations=evaluated,
        saves=-(-plan.steps // every),
        samples=len(asked),
        prompts=sum(list(row.trained).index(True) for row in asked),
        looked=min(TOKENS, sum(map(_length, rows.training))) if config.init == "eva" else 0,
    )


def _packs(rows: Sequence[Tokens], numbers: Sequence[int], budget: int, together: bool) -> list[Pack]:
    found = []
    for members in cut({n: len(rows[n].ids) for n in numbers}, budget, together):
        lengths = [len(rows[n].ids) for n in members]
        squares = sum(length * length for length in lengths)
        found.append(Pack(sum(lengths), sum(_trained(rows[n]) for n in members), squares / sum(lengths)))
    return found


def _length(row: Tokens) -> int:
    return len(row.ids)


def _trained(row: Tokens) -> int:
    return sum(row.trained)
