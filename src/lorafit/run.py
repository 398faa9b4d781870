"""Training from a model file and examples to an adapter: `train` reads from top to bottom as the data flows."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit import console, machine, trackers
from lorafit.adapter.file import save_adapter
from lorafit.config import Resolved, TrainConfig, field_types, from_values, read_yaml, to_yaml
from lorafit.describe import describe, farewell
from lorafit.errors import ConfigError, MemoryLimitError, ResumeError
from lorafit.evaluate.heldout import held_out
from lorafit.evaluate.report import finish_report
from lorafit.formats.folders import make_folder, write_text_atomically
from lorafit.identity import refuse_changes, without
from lorafit.job import Job, prepare
from lorafit.model import buffers
from lorafit.planning import predict
from lorafit.planning.duration import Remaining
from lorafit.training.checkpoint import Checkpoints, Progress, single_writer
from lorafit.training.loop import Run, StopRequest, fit, rehearse
from lorafit.training.metrics import Metrics
from lorafit.tuned import reopen, save_tuned

MADE = ("adapter", "model")  # what a run is for: one of them
OURS = ("run.yaml", "metrics.jsonl", "checkpoints", *MADE, "report.html", "report.json", ".lock", *trackers.FILES)
MUCH_FASTER = 0.75  # of the predicted seconds: then the machine was busy when its speeds were measured
ELASTIC = ("micro_batch_tokens", "checkpointing", "checkpointed_layers")  # what a lack of memory may lower


@dataclass(frozen=True)
class Result:
    """What a finished run gives: `adapter` is its folder, or with method="full" `model`; `report` is report.json."""

    adapter: Path | None
    report: dict[str, Any]
    model: Path | None = None


def train(resolved: Resolved, *, overwrite: bool = False, started: float | None = None) -> Result:
    """Train an adapter, or all weights; everything that can be wrong is found before OUT is touched.

    started: time.perf_counter() of the command's start, for the report. Raises LorafitError's family.
    """
    started = time.perf_counter() if started is None else started
    out = Path(resolved.config.out)
    _check_free(out, overwrite)
    job = prepare(resolved)
    describe(job)
    _clear(out)
    make_folder(out)
    with single_writer(out):
        write_text_atomically(out / "run.yaml", to_yaml(job.resolved, {"identity": job.identity}))
        return _execute(job, out, started)


def resume(out: Path, changes: dict[str, Any] | None = None, *, started: float | None = None) -> Result:
    """Go on with the run in `out` from its newest complete checkpoint, or from step 0 if there is none.

    Everything that changes bits is read from run.yaml. Raises ResumeError, showing the difference, when the base,
    tokenizer, template, data or settings are not what they were, or `changes` asks for other settings.
    """
    started = time.perf_counter() if started is None else started
    if not (out / "run.yaml").is_file():
        raise ResumeError(str(out), "holds no run.yaml", "give the folder of a run that was started")
    values = read_yaml(out / "run.yaml")
    identity = values.pop("identity", None)
    stored = from_values(values, str(out / "run.yaml"))
    stored["out"] = str(out)
    config = TrainConfig(**stored)
    refuse_changes("option", {k: getattr(config, k) for k in changes or {}}, changes or {})
    with single_writer(out):
        job = prepare(Resolved(config, dict.fromkeys(field_types(), "run.yaml")), resumed=True)
        refuse_changes(str(out / "run.yaml"), identity or {}, job.identity)
        return _execute(job, out, started)


def _execute(job: Job, out: Path, started: float) -> Result:
    """The run with its trackers, which hear its last losses too."""
    with trackers.Trackers() as tracked:
        result = _go_on(job, out, started, tracked)
        losses = {name: result.report[name] for name in ("base_loss", "adapter_loss")}
        tracked.log({"step": result.report["steps"], **losses})
    return result


def _go_on(job: Job, out: Path, started: float, tracked: trackers.Trackers) -> Result:
    """From the newest checkpoint to the end of the run, then the adapter and the report."""
    checkpoints = Checkpoints(out)
    start, damaged = checkpoints.newest()
    for name in damaged:
        console.warn(f"{name} is damaged and was skipped")
    if start is not None:
        place = f"checkpoint {start.progress.step}"
        refuse_changes(place, *(without(identity, ELASTIC) for identity in (start.identity, job.identity)))
        console.say(f"going on after step {start.progress.step}")
    config, base = job.resolved.config, job.base
    metrics = Metrics(out / "metrics.jsonl", start.progress.step if start else 0)
    left = job.prediction.remaining()
    progress_bar = console.Steps(job.plan.steps, left.seconds)
    tracked.begin(config.report_to, out, vars(config), start.progress.step if start else 0)
    run = Run(
        config=config,
        plan=job.plan,
        model=base.model,
        head=base.head,
        rows=job.training,
        checkpoints=checkpoints,
        metrics=metrics,
        identity=job.identity,
        evaluate=(lambda: held_out(base.model, base.head, job.evaluation, int(run.config.micro_batch_tokens or 1)).loss)
        if job.evaluation
        else None,
        report=tracked.also(lambda line: _tell(left, progress_bar, line)),
        memory=machine.memory_bytes,
    )
    run.lower = lambda step: _stay_inside(job, run, out, step)
    try:
        with _signals(run.stop), progress_bar:
            progress = fit(run, start)
    finally:
        metrics.close()
    if left.ratio < MUCH_FASTER:
        job.prediction.clock.speeds.forget()
    predicted = job.prediction.figures(started, start.progress.step if start else 0)
    return _finish(job, run, progress, out, started, predicted)


def _stay_inside(job: Job, run: Run, out: Path, step: int) -> TrainConfig | None:
    """Settings that need less memory, where what is left will not do; they are written to run.yaml, and said.

    Before step 1 of a run that is near its budget the largest pack is run once, so that it shows at once.
    Raises MemoryLimitError where not even one pack of it can be had.
    """
    guard = job.prediction.guard()
    if step == 0 and not guard.rehearses:
        return None
    lowered = None
    while True:
        config = lowered or run.config
        try:
            if step == 0:
                rehearse(dataclasses.replace(run, config=config), min(job.plan.steps, predict.SEEN))
            lacking = guard.lacks(before=step == 0)
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            lacking = 1
        if not lacking:
            return lowered
        smaller = guard.lowered(config)
        if smaller is None and step == 0:
            what = f"{console.gigabytes(guard.budget)} are not enough: {console.gigabytes(lacking)} are missing"
            raise MemoryLimitError("--memory", what, "give more, or a lower --max-length, --rank or --base")
        if smaller is None:
            return lowered
        lowered = smaller
        _say_lowered(job, run, out, lowered, step, lacking)
        buffers.forget()
        buffers.expect(max(int(lowered.micro_batch_tokens or 1), guard.longest))
        machine.trim()
        if step:
            return lowered


def _say_lowered(job: Job, run: Run, out: Path, config: TrainConfig, step: int, lacking: int) -> None:
    """Into run.yaml and onto the screen: the run's bits are now those of this machine's memory."""
    what = f"{config.micro_batch_tokens} tokens at once, {config.checkpointed_layers} layers computed twice"
    why = f"lowered after step {step}: {console.gigabytes(lacking)} of memory were missing"
    console.warn(f"{why}; from here on {what}. Another run of this configuration may differ in rounding")
    resolved = job.resolved
    for name in ELASTIC:
        if getattr(config, name) != getattr(run.config, name):
            resolved = Resolved(config, {**resolved.origin, name: why})
    settings: Any = run.identity["settings"]
    run.identity = {**run.identity, "settings": {**settings, **{name: getattr(config, name) for name in ELASTIC}}}
    write_text_atomically(out / "run.yaml", to_yaml(resolved, {"identity": run.identity}))


def _tell(left: Remaining, bar: console.Steps, line: dict[str, Any]) -> None:
    """Each line of metrics.jsonl, to the estimate of what is left and to the person who watches."""
    if "loss" in line:
        left.took(line["step"], line["seconds"])
    bar.line(line)


def _finish(job: Job, run: Run, progress: Progress, out: Path, started: float, predicted: dict[str, float]) -> Result:
    """The best checkpoint's adapter into OUT/adapter, or its weights into OUT/model, then the report."""
    run.trained.load(run.checkpoints.read(progress.best_step, optimizer=False).adapter)
    about: dict[str, Any] = {"base_model": job.resolved.config.model}
    about |= {key: job.identity[key] for key in ("tokenizer", "template", "data")}
    about["figures"] = {"steps": progress.best_step}
    if job.resolved.config.template is not None:
        about["chat_template"] = job.base.tokenizer.chat_template
    if progress.best_loss is not None:
        about["figures"]["held-out loss"] = f"{progress.best_loss:.4f}"
    tuned = None
    if job.resolved.config.method == "full":
        about["base"] = job.identity["base"]
        save_tuned(job.base, run.trained, job.training, job.resolved.config, out / "model", about)
        tuned = reopen(out / "model", job.resolved.config)
    else:
        save_adapter(job.base.model, out / "adapter", about)
    report = finish_report(
        out,
        resolved=job.resolved,
        base=job.base if tuned is None else reopen(job.resolved.config.model, job.resolved.config),
        tuned=tuned,
        trainable=sum(parameter.numel() for parameter in run.trained.parameters.values()),
        data=job.data,
        evaluation=job.evaluation,
        budget=int(run.config.micro_batch_tokens or 1),
        save_seconds=run.save_seconds,
        predicted=predicted,
        started=started,
    )
    farewell(out, report)
    if tuned is not None:
        return Result(None, report, out / "model")
    return Result(out / "adapter", report)


def _check_free(out: Path, overwrite: bool) -> None:
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        what = f"{existing} is no folder" if not existing.is_dir() else f"{existing} may not be written"
        raise ConfigError("--out", what, "name another folder")
    begun = (".lock", ".tmp-run.yaml")  # all that a run leaves which was killed before it wrote run.yaml
    if out.is_dir() and any(path.name not in begun for path in out.iterdir()) and not overwrite:
        raise ConfigError("--out", f"{out} is not empty", "name another folder, or give --overwrite")


def _clear(out: Path) -> None:
    """Remove an earlier run's files, and nothing that lorafit did not write."""
    for name in OURS:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _signals(stop: StopRequest) -> Iterator[None]:
    """SIGINT and SIGTERM end the run after the step in hand; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:
        stop.signal_number = number
        console.say("finishing this step, then saving; once more ends it at once")
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
