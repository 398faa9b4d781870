"""Training from a model file and examples to an adapter: `train` reads from top to bottom as the data flows."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorafit import console, machine, trackers
from lorafit.adapter.attach import adapted_layers, attach, trained
from lorafit.adapter.experts import refuse
from lorafit.adapter.file import load_adapter, save_adapter, tokens_of
from lorafit.adapter.peft_config import method_of
from lorafit.adapter.variants.dora import DoraLinear
from lorafit.config import Resolved, TrainConfig, field_types, from_values, pattern, read_yaml, to_yaml
from lorafit.data.records import Record
from lorafit.data.rows import Rows
from lorafit.data.split import overlap, split
from lorafit.data.tokens import TokenRow
from lorafit.errors import ConfigError, Faults, MemoryLimitError, ResumeError
from lorafit.evaluate.heldout import held_out
from lorafit.evaluate.report import finish_report
from lorafit.formats.folders import file_hash, make_folder, write_text_atomically
from lorafit.formats.tokenizer import TextTokenizer
from lorafit.frozen.fingerprint import EXACT_FORMATS, digest, fingerprint
from lorafit.inputs import read_rows, read_template
from lorafit.kernels import native
from lorafit.kernels.product import onednn_is_faster
from lorafit.model import buffers
from lorafit.model.head import decoder_of
from lorafit.model.load import Base, bytes_by_format, configuration, context_of, load_base
from lorafit.model.sources import WeightSource, open_source
from lorafit.planning import predict
from lorafit.planning.duration import Remaining
from lorafit.planning.outline import of_source
from lorafit.planning.predict import Held, Prediction
from lorafit.settings import settle_for_data, settle_for_machine
from lorafit.training.checkpoint import Checkpoints, Progress, single_writer
from lorafit.training.loop import Plan, Run, StopRequest, fit, rehearse
from lorafit.training.metrics import Metrics
from lorafit.training.sample import feed
from lorafit.training.trained import train_everything
from lorafit.tuned import disk_bytes, reopen, save_tuned

MADE = ("adapter", "model")  # what a run is for: one of them
OURS = ("run.yaml", "metrics.jsonl", "checkpoints", *MADE, "report.html", "report.json", ".lock", *trackers.FILES)
MUCH_FASTER = 0.75  # of the predicted seconds: then the machine was busy when its speeds were measured
ELASTIC = ("micro_batch_tokens", "checkpointing", "checkpointed_layers")  # what a lack of memory may lower
PATHS = ("model", "data", "eval", "out", "template", "init_adapter")  # may move; what they hold may not change
ASIDE = (*PATHS, "report_to")  # settings that are no part of what a run is


@dataclass(frozen=True)
class Result:
    """What a finished run gives: `adapter` is its folder, or with method="full" `model`; `report` is report.json."""

    adapter: Path | None
    report: dict[str, Any]
    model: Path | None = None


@dataclass(frozen=True)
class Job:
    """A run that is ready to start: model with adapter, rows, and what both are."""

    resolved: Resolved
    plan: Plan
    base: Base
    data: Rows
    training: list[TokenRow]
    evaluation: list[TokenRow]
    identity: dict[str, Any]
    prediction: Prediction
    source_formats: dict[str, int]
    """Bytes of the model's file by format."""


def train(resolved: Resolved, *, overwrite: bool = False, started: float | None = None) -> Result:
    """Train an adapter, or all weights; everything that can be wrong is found before OUT is touched.

    started: time.perf_counter() of the command's start, for the report. Raises LorafitError's family.
    """
    started = time.perf_counter() if started is None else started
    out = Path(resolved.config.out)
    _check_free(out, overwrite)
    job = prepare(resolved)
    _describe(job)
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
    _refuse_changes("option", {k: getattr(config, k) for k in changes or {}}, changes or {})
    with single_writer(out):
        job = prepare(Resolved(config, dict.fromkeys(field_types(), "run.yaml")), resumed=True)
        _refuse_changes(str(out / "run.yaml"), identity or {}, job.identity)
        return _execute(job, out, started)


@dataclass(frozen=True)
class Input:
    """What a run starts from, before the weights are loaded."""

    resolved: Resolved
    plan: Plan
    source: WeightSource
    tokenizer: TextTokenizer
    data: Rows
    training: list[TokenRow]
    evaluation: list[TokenRow]
    prediction: Prediction


def read_input(resolved: Resolved, *, resumed: bool = False) -> Input:
    """From settings to token rows, settled settings and what they will need; no weights are loaded.

    resumed: every setting is run.yaml's, and none is chosen again.
    """
    trackers.check(resolved.config.report_to)
    libraries = machine.memory_bytes()
    source = open_source(Path(resolved.config.model))
    resolved = settle_for_machine(resolved, source.quantised)
    config = resolved.config
    torch.set_num_threads(int(config.threads or 1))
    native.use(config.kernels)
    machine.bound_primitives()
    tokenizer = source.tokenizer(read_template(config.template))
    tokenizer.add(tokens_of(config.init_adapter) if config.init_adapter else config.new_tokens)
    data, records = read_rows(config.data, tokenizer, config, context_of(source))
    if config.eval:
        held, held_records = read_rows(config.eval, tokenizer, config, context_of(source))
        training, evaluation = data.rows, held.rows
        _warn_overlap(records, held_records)
    else:
        training, evaluation = split(data.rows, config.eval_fraction, key=TokenRow.content_hash)
    if not training:
        raise ConfigError(", ".join(config.data), "leaves no row with a trained token", "raise --max-length")
    shape = configuration(source).to_dict()
    longest = max(data.max_length, held.max_length) if config.eval else data.max_length  # a resumed run cuts no others
    resolved, plan = settle_for_data(resolved, training, longest, shape)
    before = Held(libraries, machine.memory_bytes() - libraries)
    seen = predict.Rows(training, evaluation)
    resolved, prediction = predict.settle(resolved, plan, of_source(source, shape), seen, before, resumed=resumed)
    if int(resolved.config.max_length or 0) < data.max_length:  # --shorten
        return read_input(resolved, resumed=resumed)
    return Input(resolved, plan, source, tokenizer, data, training, evaluation, prediction)


def prepare(resolved: Resolved, *, resumed: bool = False) -> Job:
    """From settings to a model with its adapter and token rows; nothing is written. resumed: see `read_input`."""
    read = read_input(resolved, resumed=resumed)
    resolved, tokenizer, config = read.resolved, read.tokenizer, read.resolved.config
    base = load_base(read.source, tokenizer, config.base, config.compute, paged=config.paging == "on")
    base = replace(base, head=replace(base.head, chunk=int(config.loss_chunk or base.head.chunk)))
    own_memory = config.compute == "fp32" and onednn_is_faster()  # a product's, in every step
    machine.settle_allocator(keeps=base.fused < len(decoder_of(base.model).layers) or config.use_dora or own_memory)
    buffers.expect(max(int(config.micro_batch_tokens or 1), read.prediction.use.longest))  # one size, no holes
    base_digest = digest(fingerprint(base.model))
    if config.method == "full":
        train_everything(base.model)
    elif config.init_adapter:
        _start_from(base, config)
    else:
        # a checkpoint has what EVA's start has become
        begun = config.init == "eva" and resumed and Checkpoints(Path(config.out)).newest()[0] is not None
        _attach(base, read, replace(config, init="default") if begun else config)
    identity = _identity(config, base_digest, tokenizer)
    rows = read.data, read.training, read.evaluation
    return Job(resolved, read.plan, base, *rows, identity, read.prediction, read.source.bytes_by_format())


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
        _refuse_changes(place, *(_without(identity, ELASTIC) for identity in (start.identity, job.identity)))
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
    _farewell(out, report)
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


def _warn_overlap(records: list[Record], held: list[Record]) -> None:
    pairs = overlap(records, held)
    if pairs:
        console.warn(f"{len(pairs)} evaluation rows are training rows too, for example {' = '.join(pairs[0])}")


def _start_from(base: Base, config: TrainConfig) -> None:
    """Go on from an adapter on disk; its shapes rule, and this run's dropout."""
    base.model.new_tokens = base.tokenizer.added  # type: ignore[assignment]
    for note in load_adapter(base.model, str(config.init_adapter)):
        console.say(note)
    layers = dict(adapted_layers(base.model))
    if config.dropout:
        refuse(base.model, list(layers), "--dropout", config.dropout)
    for layer in layers.values():
        layer.adapter.dropout.p = config.dropout


def _attach(base: Base, read: Input, config: TrainConfig) -> None:
    """A new adapter, of the kind that the settings say."""
    source = read.source
    if config.init == "loftq" and config.base != "nf4":
        raise ConfigError("--init", f"is loftq, and the base is in {config.base}", "give --base nf4")

    def original(path: str) -> torch.Tensor:
        name = f"{path}.weight"
        if source.format(name) == "NF4":
            raise ConfigError(
                "--init", f"is loftq, and {source.place} holds 4 bits only", "give the model it came from"
            )
        return source.load(name)

    attach(
        base.model,
        config.rank,
        config.alpha,
        config.targets,
        dropout=config.dropout,
        seed=config.seed,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init=config.init,
        rank_pattern={name: int(value) for name, value in pattern(config.rank_pattern).items()},
        alpha_pattern=pattern(config.alpha_pattern),
        bias=config.bias,
        modules_to_save=config.modules_to_save,
        token_ids=[_token_id(base.tokenizer, token) for token in (*config.train_tokens, *config.new_tokens)],
        new_tokens=config.new_tokens,
        originals=original,
        feed=lambda: feed(base.model, read.training, config.seed, config.packing == "auto"),
    )


def _token_id(tokenizer: TextTokenizer, token: str) -> int:
    number = tokenizer.backend.token_to_id(token)
    if number is None:
        raise ConfigError("--train-tokens", f"{token!r} is no token of the model", "give tokens that it has")
    return int(number)


def _identity(config: TrainConfig, base: str, tokenizer: TextTokenizer) -> dict[str, Any]:
    """What must be equal for a run to go on: contents by hash, settings by value."""
    values = {name: getattr(config, name) for name in field_types() if name not in ASIDE}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    files = {"data": config.data, "evaluation": config.eval}
    init = Path(config.init_adapter or "") / "adapter_model.safetensors"
    return {
        "base": base,
        "tokenizer": tokenizer.fingerprint(),
        "template": tokenizer.template_fingerprint(),
        **{key: _hash_files(paths) for key, paths in files.items()},
        "init_adapter": file_hash(init)[:16] if config.init_adapter else None,
        "settings": settings,
    }


def _without(identity: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The same without these settings: what a run may lower while it goes on."""
    kept = {name: value for name, value in identity["settings"].items() if name not in names}
    return {**identity, "settings": kept}


def _hash_files(paths: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in map(Path, paths):
        members = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        found |= {member.name: file_hash(member)[:16] for member in members}
    return found


def _refuse_changes(place: str, stored: dict[str, Any], now: dict[str, Any]) -> None:
    """One ResumeError line for each difference between what a run was and what it is now."""
    faults = []
    for key in sorted(stored.keys() | now.keys()):
        was, is_ = stored.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(is_, dict):
            differing = [k for k in sorted(was.keys() | is_.keys()) if was.get(k) != is_.get(k)]
            faults += [ResumeError(f"{place}: {key}.{k}", f"was {was.get(k)}, is {is_.get(k)}") for k in differing]
        elif was != is_:
            faults.append(ResumeError(f"{place}: {key}", f"was {was}, is {is_}", "put it back, or start a new run"))
    if faults:
        raise Faults(faults) if len(faults) > 1 else faults[0]


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


def _describe(job: Job) -> None:
    """What is about to happen, and every value that was chosen rather than given."""
    config, counts = job.resolved.config, job.data.counts
    layers, full = list(adapted_layers(job.base.model)), config.method == "full"
    trainable = sum(parameter.numel() for parameter in trained(job.base.model).values())
    told = "all weights trained" if full else f"{len(layers)} layers adapted"
    console.say(f"model     {config.model}: {job.base.model.config.model_type}, {told}")
    if job.base.part_of:
        console.say(f"          the text part of {job.base.part_of}: its vision tower is neither read nor trained")
    console.say(f"data      {counts['used']} rows, {counts['tokens']} tokens, "
                f"{counts['trained_tokens']} trained; {len(job.evaluation)} rows held out")  # fmt: skip
    if full:
        _describe_full(trainable, job.source_formats, out=Path(config.out))
    else:
        console.say(f"adapter   {method_of(job.base.model)}, {trainable:,} parameters")
    console.say(f"steps     {job.plan.steps} of {config.batch_size} rows")
    for name in ("lr", "base", "compute"):
        console.say(f"{name:<9} {getattr(config, name)}  ({job.resolved.origin.get(name, 'default')})")
    needed = job.prediction.memory.total, job.prediction.seconds()
    console.say(f"needs     about {console.gigabytes(needed[0])} and {console.duration(needed[1])}, predicted")
    sizes = [f"{name} {console.gigabytes(size)}" for name, size in bytes_by_format(job.base.model).items()]
    console.say(f"weights   {', '.join(sizes)}; kernels {native.describe()[0]}")
    if config.packing == "off":
        console.say(f"packing   off  ({job.resolved.origin.get('packing', 'default')})")
    if any(isinstance(layer, DoraLinear) for _, layer in layers):
        console.say("layers    transformers' own where DoRA is: it needs outputs that the fused ones do not keep")
    elif not job.base.fused:
        console.say(f"layers    transformers' own: {job.base.model.config.model_type} has no fused ones here")
    if config.checkpointed_layers:
        console.say(
            f"computed twice: {config.checkpointed_layers} layers  ({job.resolved.origin['checkpointed_layers']})"
        )
    if job.base.kept:
        first = ", ".join(job.base.kept[:3]) + (", ..." if len(job.base.kept) > 3 else "")
        console.warn(f"{len(job.base.kept)} layers stay in 16 bits, their rows are no whole blocks: {first}")
    for place, what in job.data.problems[:8]:
        console.warn(f"{place}: {what}")
    if len(job.data.problems) > 8:
        console.warn(f"and {len(job.data.problems) - 8} more; `lorafit preview` lists them all")
    if not job.base.tokenizer.has_template:
        console.warn("the model has no chat template: rows use the plain one of the documentation")


def _describe_full(trainable: int, formats: dict[str, int], out: Path) -> None:
    """What full fine-tuning takes: 16 bytes a weight in memory, and on disk at most four checkpoints at once."""
    weights, state = console.gigabytes(4 * trainable), console.gigabytes(8 * trainable)
    console.say(
        f"trained   {trainable:,} parameters: {weights} in fp32, as much of gradients, {state} of AdamW's state"
    )
    packed = [name for name in formats if name not in EXACT_FORMATS]
    if packed:
        console.say(f"from      the values that the file's {', '.join(packed)} stand for: dequantised, then trained")
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    needed, free = disk_bytes(trainable), shutil.disk_usage(place).free
    console.say(f"disk      {console.gigabytes(needed)} at most, for checkpoints and the model")
    if free < needed:
        console.warn(f"{out} has {console.gigabytes(free)} free: a save that does not fit stops the run")


def _farewell(out: Path, report: dict[str, Any]) -> None:
    base, adapter = report["base_loss"], report["adapter_loss"]
    if adapter is not None:
        console.say(f"held-out loss {base:.4f} -> {adapter:.4f} nats per trained token")
    console.say(f"{report['steps']} steps in {console.duration(report['training_seconds'])}, "
                f"{report['tokens_per_second']:.0f} tokens/s")  # fmt: skip
    predicted = report["predicted"]
    console.say(f"memory    {console.gigabytes(report['peak_memory_bytes'])} at the peak, "
                f"{console.gigabytes(predicted['memory_bytes'])} predicted")  # fmt: skip
    console.say(f"time      {console.duration(report['seconds'])} in all, "
                f"{console.duration(predicted['seconds'])} predicted")  # fmt: skip
    made = next(name for name in MADE if (out / name).is_dir())
    console.say(f"{made:<9} {out / made}")
    console.say(f"report    {out / 'report.html'}")
