"""The training loop: steps, evaluations, checkpoints, and nothing that depends on how long anything took."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from lorafit import machine
from lorafit.adapter.attach import adapted_layers
from lorafit.config import TrainConfig
from lorafit.data.batch import Tokens, cut, pack_rows
from lorafit.data.order import order
from lorafit.errors import ConfigError, Interrupted, NonFiniteError
from lorafit.model.head import Head
from lorafit.training.checkpoint import Checkpoint, Checkpoints, Progress
from lorafit.training.finite import blame, sums_finite
from lorafit.training.metrics import Metrics
from lorafit.training.optim import (
    clip_gradient,
    load_optimizer_tensors,
    lr_at,
    make_optimizer,
    optimizer_tensors,
    set_lr,
)
from lorafit.training.step import accumulate
from lorafit.training.trained import Trained

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What follows from settings and data: the run's length in optimizer steps."""

    steps: int
    steps_per_epoch: int


@dataclass
class StopRequest:
    """Set by a signal handler: finish the step, save, leave. `signal_number` 0 = go on."""

    signal_number: int = 0


@dataclass
class Run:
    """Everything that the loop needs; `config` has nothing left to choose.

    `evaluate` gives the held-out loss in nats per token; `report` hears of each metrics line; `memory` gives bytes.
    """

    config: TrainConfig
    plan: Plan
    model: nn.Module
    head: Head
    rows: Sequence[Tokens]
    checkpoints: Checkpoints
    metrics: Metrics
    identity: dict[str, object]
    evaluate: Callable[[], float] | None
    report: Callable[[dict[str, object]], None]
    memory: Callable[[], int]
    lower: Callable[[int], TrainConfig | None] = lambda step: None
    """Called before step 1 (with 0) and after each step: settings that need less memory, None to go on as it is."""
    stop: StopRequest = field(default_factory=StopRequest)
    save_seconds: float = 0.0
    trained: Trained = None  # type: ignore[assignment]  # made below, once for a model: a copy of the run keeps it

    def __post_init__(self) -> None:
        if self.trained is None:
            self.trained = Trained(self.model)


def _set(value: T | None) -> T:
    """A setting that is settled before the loop begins."""
    assert value is not None, "settings are resolved before training"
    return value


def step_rows(seed: int, step: int, rows: int, batch_size: int) -> list[int]:
    """Row numbers of optimizer step `step` (from 1): a pure function of its arguments. The last batch of an epoch
    may be smaller; batches never reach over an epoch's end."""
    per_epoch = math.ceil(rows / batch_size)
    epoch, place = divmod(step - 1, per_epoch)
    return [int(n) for n in order(seed, epoch, rows)[place * batch_size : (place + 1) * batch_size]]


def fit(run: Run, start: Checkpoint | None) -> Progress:
    """Train from `start` (None: from step 0), whose tensors are used up, to the end, or until patience or a signal.

    Raises NonFiniteError within the step in which a NaN or infinity appears, before any weight has changed by it;
    Interrupted after a signal, when the checkpoint is on disk.
    """
    named = run.trained.parameters
    faster = [layer.adapter.B for _, layer in adapted_layers(run.model)]
    optimizer = make_optimizer(named.values(), run.config.weight_decay, faster, run.config.lora_plus_ratio)
    progress = Progress()
    if start is not None:
        progress = start.progress
        run.trained.load(start.adapter)
        load_optimizer_tensors(optimizer, named, start.optimizer)
        start.adapter.clear()  # of a whole model they would be 12 bytes a weight for the rest of the run
        start.optimizer.clear()
    run.model.train()
    run.config = run.lower(0) or run.config
    while progress.step < run.plan.steps and not progress.finished:
        step = progress.step + 1
        _train_step(run, optimizer, step)
        run.config = run.lower(step) or run.config
        progress = dataclasses.replace(progress, step=step)
        config, last = run.config, step == run.plan.steps
        if run.evaluate is not None and (last or step % _set(config.eval_every) == 0):
            progress = _evaluate(run, run.evaluate, progress)
        if run.evaluate is None:  # then the newest counts as the best
            progress = dataclasses.replace(progress, best_step=step)
        progress = dataclasses.replace(progress, finished=progress.finished or last)
        improved = run.evaluate is not None and progress.best_step == step
        if improved or progress.finished or step % _set(config.save_every) == 0 or run.stop.signal_number:
            _save(run, progress, optimizer)
        if run.stop.signal_number and not progress.finished:
            out = run.checkpoints.folder.parent
            what = f"stopped by signal {run.stop.signal_number} after step {step}, checkpoint written"
            raise Interrupted(str(out), what, f"go on with: lorafit train --resume {out}", run.stop.signal_number)
    run.model.eval()
    return progress


def _train_step(run: Run, optimizer: torch.optim.Optimizer, step: int) -> None:
    started = time.perf_counter()
    config, plan, named = run.config, run.plan, run.trained.parameters
    numbers = step_rows(config.seed, step, len(run.rows), _set(config.batch_size))
    packs = pack_rows(run.rows, numbers, _set(config.micro_batch_tokens), config.packing == "auto")
    lr = lr_at(step, plan.steps, _set(config.lr), config.schedule, config.warmup)
    loss = accumulate(
        run.model, run.head, packs, seed=config.seed, step=step, checkpointed=config.checkpointed_layers or 0
    )  # fmt: skip
    missing = run.trained.without_gradient() if config.method == "full" else None
    if missing is not None:
        raise ConfigError("--method full", f"{missing} gets no gradient", "use --method lora")
    norm = clip_gradient(named.values(), config.clip_norm)
    moments = optimizer_tensors(optimizer, named)
    if not (math.isfinite(loss) and math.isfinite(norm) and sums_finite(moments.values())):
        raise blame(run.model, run.head, packs, named, moments, step=step, loss=loss, norm=norm)
    set_lr(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # evaluations and saves need no gradients in memory
    run.trained.round()
    seconds = time.perf_counter() - started
    tokens = sum(len(pack.ids_T) for pack in packs)
    line: dict[str, object] = {
        "step": step,
        "epoch": round(step / plan.steps_per_epoch, 4),
        "loss": loss,
        "lr": lr,
        "grad_norm": norm,
        "tokens": tokens,
        "trained_tokens": sum(len(pack.targets_N) for pack in packs),
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        "memory_bytes": run.memory(),
    }
    run.metrics.add(**line)
    run.report(line)


def rehearse(run: Run, steps: int) -> None:
    """The largest pack of the first `steps` steps there and back, without a change to any weight or bit of the run."""
    config = run.config
    numbered = [
        (pack_tokens, step, members)
        for step in range(1, steps + 1)
        for pack_tokens, members in _packs_of(run, step_rows(config.seed, step, len(run.rows), _set(config.batch_size)))
    ]
    _, step, members = max(numbered)
    packs = pack_rows(run.rows, members, sum(len(run.rows[n].ids) for n in members))
    run.model.train()
    accumulate(
        run.model, run.head, packs, seed=config.seed, step=step, checkpointed=config.checkpointed_layers or 0
    )  # fmt: skip
    for parameter in run.trained.parameters.values():
        parameter.grad = None


def _packs_of(run: Run, numbers: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(tokens, row numbers) of each pack."""
    lengths = {n: len(run.rows[n].ids) for n in numbers}
    packs = cut(lengths, _set(run.config.micro_batch_tokens), run.config.packing == "auto")
    return [(sum(lengths[n] for n in members), members) for members in packs]


def _evaluate(run: Run, evaluate: Callable[[], float], progress: Progress) -> Progress:
    run.model.eval()
    loss = evaluate()
    run.model.train()
    if not math.isfinite(loss):
        remedy = "look at the held-out rows, or use --compute fp32"
        raise NonFiniteError("held-out loss", f"is {loss} at step {progress.step}", remedy)
    line: dict[str, object] = {"step": progress.step, "eval_loss": loss}
    run.metrics.add(**line)
    run.report(line)
    if progress.best_loss is None or loss < progress.best_loss:
        return dataclasses.replace(progress, best_loss=loss, best_step=progress.step, stale_evaluations=0)
    stale = progress.stale_evaluations + 1
    patience = run.config.patience
    return dataclasses.replace(progress, stale_evaluations=stale, finished=patience is not None and stale >= patience)


def _save(run: Run, progress: Progress, optimizer: torch.optim.Optimizer) -> None:
    started = time.perf_counter()
    run.metrics.sync()
    values = {name: tensor.detach() for name, tensor in run.trained.state().items()}
    optimizer_state = optimizer_tensors(optimizer, run.trained.parameters)
    run.checkpoints.save(Checkpoint(progress, run.identity, values, optimizer_state))
    machine.trim()  # copies of a thousand small tensors have left holes
    run.save_seconds += time.perf_counter() - started
