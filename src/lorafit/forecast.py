"""`lorafit plan`: what a run will need, before it, on this machine or on a device that is not here."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafit import catalogue, console, machine
from lorafit.config import Resolved, TrainConfig, bytes_of
from lorafit.data.batch import Tokens
from lorafit.data.records import Record, read_records
from lorafit.data.split import split
from lorafit.data.tokens import TokenRow
from lorafit.errors import ConfigError, Faults, ModelError
from lorafit.inputs import read_rows, read_template
from lorafit.model.architectures import WRAPPERS
from lorafit.model.load import configuration, context_of
from lorafit.model.shapes import shapes_of
from lorafit.model.sources import WeightSource, open_source
from lorafit.planning import devices, predict
from lorafit.planning.memory import parameters
from lorafit.planning.outline import Outline, of_shapes, of_source
from lorafit.planning.predict import Elsewhere, Held, Prediction
from lorafit.planning.saved import adapter_bytes
from lorafit.settings import settle_for_data, settle_for_machine
from lorafit.training.loop import Plan

BYTES_PER_TOKEN = 4  # of text, where there is no tokenizer: English in a vocabulary of 50,000 to 250,000
ROW_BYTES, TOKEN_BYTES = 1500, 24  # of a row in memory, and of each of its tokens (measured)
SHARE = 0.5  # of tokens that are trained, where only --rows and --length are given
SHOWN = (
    "base", "compute", "rank", "alpha", "targets", "batch_size", "max_length", "micro_batch_tokens", "checkpointing",
    "checkpointed_layers", "loss_chunk", "paging", "epochs", "max_steps", "lr", "threads",
)  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """What `lorafit plan --json` prints; bytes, seconds, and the settings that were chosen."""

    fits: bool
    memory_bytes: dict[str, int]
    seconds: float
    tokens: int
    trained_tokens: int
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    settings: dict[str, Any]
    notes: list[str]
    why: str
    """Where it does not fit: by how much, and the cheapest ways out."""


@dataclass(frozen=True)
class Imagined:
    """A row of which only the number of tokens is known, and the share of them that is trained."""

    length: int
    share: float
    what: str

    @property
    def ids(self) -> Sequence[int]:
        return range(self.length)

    @property
    def trained(self) -> Sequence[bool]:
        first = self.length - max(1, round(self.share * self.length))
        return [number >= first for number in range(self.length)]


def plan(
    resolved: Resolved,
    *,
    rows: int | None = None,
    length: int | None = None,
    device: str | None = None,
    device_memory: str | None = None,
    started: float | None = None,
) -> Forecast:
    """Predict a run of these settings; no weight is loaded.

    rows, length: instead of data, so many rows of so many tokens. device: a name of planning/devices.py;
    device_memory: bytes in words. started: time.perf_counter() of the command's start.
    Raises LorafitError's family; where nothing fits the result says so.
    """
    started = time.perf_counter() if started is None else started
    libraries = machine.memory_bytes()
    notes: list[str] = []
    elsewhere = _elsewhere(device, device_memory, notes)
    outline, source, config = _model(resolved.config.model, notes)
    resolved = settle_for_machine(_for_device(resolved) if elsewhere else resolved, outline.quantised)
    training, evaluation, longest = _rows(resolved.config, source, outline, rows, length, notes)
    if not training:
        raise ConfigError(", ".join(resolved.config.data), "leaves no row with a trained token", "raise --max-length")
    resolved, steps = settle_for_data(resolved, training, longest, config)
    data = machine.memory_bytes() - libraries
    if rows is not None:
        data = max(data, rows * (ROW_BYTES + TOKEN_BYTES * (length or 0)))
    seen = predict.Rows(training, evaluation)
    why = ""
    try:
        resolved, found = predict.settle(resolved, steps, outline, seen, Held(libraries, data), elsewhere=elsewhere)
    except predict.DoesNotFit as small:
        resolved, found, why = small.resolved, small.prediction, str(small)
    passed = 0.0 if elsewhere else found.made - started  # what a run does before it is ready to load the model, too
    return _forecast(resolved, found, steps, outline, training, notes, why, passed)


def run(resolved: Resolved, *, as_json: bool, **options: Any) -> int:
    """The command: prints the forecast; exit code 3 where it does not fit."""
    found = plan(resolved, **options)
    if as_json:
        console.result_json(asdict(found))
    else:
        _print(found, resolved)
    if found.why:
        console.fail([found.why])
    return 0 if found.fits else 3


def _elsewhere(device: str | None, memory: str | None, notes: list[str]) -> Elsewhere | None:
    """The device that is not here, if one is named."""
    if device is None and memory is None:
        return None
    known = devices.find(device) if device else None
    try:
        size = bytes_of(memory) if memory else known.memory if known else 0
    except ValueError:
        raise ConfigError("--device-memory", f"is {memory!r}", "give a size such as 48GB") from None
    if known:
        notes.append(f"{device}: {known.source}; the time is at that rate, which no run reaches; never run there")
    else:
        notes.append("only the device's memory is given, so there is no time; never run there")
    notes.append("not counted: a device's context, workspaces and fragmentation")
    return Elsewhere(size, known.flops if known else None)


def _for_device(resolved: Resolved) -> Resolved:
    config = resolved.config
    if config.compute == "auto":
        resolved = resolved.settle("compute", "bf16", "auto: devices have fast bf16 products")
    return resolved if config.threads else resolved.settle("threads", 1, "auto: on a device")


def _model(name: str, notes: list[str]) -> tuple[Outline, WeightSource | None, dict[str, Any]]:
    """(outline, the source where there are weights, configuration) of a file, a folder, or a built-in name."""
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    alone = file.suffix == ".json" and file.is_file() and not (path.is_dir() and list(path.glob("*.safetensors*")))
    if path.exists() and not alone:
        source = open_source(path)
        shape = configuration(source).to_dict()
        return of_source(source, shape), source, shape
    if alone:
        config, place = _read_config(file), str(file)
    else:
        try:
            config, place = catalogue.find(name), name
        except ConfigError as unknown:
            what = "is no file, no folder and no built-in name"
            raise ModelError(name, what, unknown.remedy) from None
        notes.append(f"configuration: {catalogue.source(name)}")
    notes.append("no weights are here: taken as 16 bits, as models are published")
    text, shapes = shapes_of(config, place)
    if "vision_config" in config:
        notes.append("the text model alone; its vision tower is not counted")
    part_of = str(config["model_type"]) if config["model_type"] in WRAPPERS else ""
    return of_shapes(text, shapes, part_of=part_of), None, text


def _read_config(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(str(file), f"does not read: {error}", "download it again") from None
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise ModelError(f"{file}: model_type", "is missing", "give a Hugging Face configuration")
    return found


def _rows(
    config: TrainConfig,
    source: WeightSource | None,
    outline: Outline,
    rows: int | None,
    length: int | None,
    notes: list[str],
) -> tuple[list[Any], list[Any], int]:
    """(training rows, evaluation rows, tokens of the longest): the data's, or so many of one length."""
    if (rows is None) != (length is None) or (rows is None) == (not config.data):
        raise ConfigError("lorafit plan", "needs DATA, or --rows and --length", "give one of them")
    if rows is not None and length is not None:
        longest = min(length, config.max_length or length, outline.context)
        if longest < length:
            notes.append(f"rows are cut to {longest:,} tokens: the model's context, or --max-length")
        notes.append(f"{SHARE:.0%} of the tokens are taken as trained")
        found: list[Any] = [Imagined(longest, SHARE, f"{n}") for n in range(rows)]
        return (*_split(found, [], config), longest)
    if source is not None:
        tokenizer = source.tokenizer(read_template(config.template))
        data, _ = read_rows(config.data, tokenizer, config, context_of(source))
        if config.eval:
            held, _ = read_rows(config.eval, tokenizer, config, context_of(source))
            return data.rows, held.rows, data.max_length
        training, evaluation = split(data.rows, config.eval_fraction, key=TokenRow.content_hash)
        return training, evaluation, data.max_length
    notes.append(f"no tokenizer is here: tokens are estimated, {BYTES_PER_TOKEN} bytes of text each")
    bound = min(config.max_length or outline.context, outline.context)
    found = [_guess(record, bound) for record in _records(config.data)]
    held_rows = [_guess(record, bound) for record in _records(config.eval)] if config.eval else []
    return (*_split(found, held_rows, config), max(len(row.ids) for row in found))


def _records(paths: Sequence[str]) -> list[Record]:
    read = read_records([Path(path) for path in paths])
    if read.faults:
        raise Faults(read.faults)
    return read.records


def _split(found: list[Any], held: list[Any], config: TrainConfig) -> tuple[list[Any], list[Any]]:
    return (found, held) if config.eval else split(found, config.eval_fraction, key=lambda row: row.what)


def _guess(record: Record, bound: int) -> Imagined:
    """The tokens of a record from its text, with a few for each turn's marks."""
    if record.messages is None:
        said = trained = len((record.text or "").encode())
    else:
        sizes = [len(str(m.get("content") or "").encode()) + 4 * BYTES_PER_TOKEN for m in record.messages]
        answers = [
            size
            for number, (m, size) in enumerate(zip(record.messages, sizes, strict=True))
            if m.get("role") == "assistant" and number >= record.prompt
        ]
        said, trained = sum(sizes), sum(answers)
    tokens = max(2, min(bound, round(said / BYTES_PER_TOKEN)))
    return Imagined(tokens, trained / max(1, said), record.place)


def _forecast(
    resolved: Resolved, found: Prediction, plan: Plan, model: Outline, rows: Sequence[Tokens], notes: list[str],
    why: str, passed: float,
) -> Forecast:  # fmt: skip
    work, config = found.work, resolved.config
    packs = [pack for step in work.steps for pack in step]
    scale = work.count / max(1, len(work.steps))
    trainable = parameters(model, found.use)
    settings = {name: getattr(config, name) for name in SHOWN}
    settings["targets"], settings["steps"], settings["rows"] = list(config.targets), plan.steps, len(rows)
    return Forecast(
        fits=not why,
        memory_bytes={"total": found.memory.total, **found.memory.parts},
        seconds=round(passed + found.seconds(), 1),
        tokens=round(sum(pack.tokens for pack in packs) * scale),
        trained_tokens=round(sum(pack.trained for pack in packs) * scale),
        trainable_parameters=trainable,
        total_parameters=model.parameters + (0 if found.use.full else trainable),
        adapter_bytes=adapter_bytes(model, found.use),
        settings=settings,
        notes=notes,
        why=why,
    )


def _print(found: Forecast, resolved: Resolved) -> None:
    """The forecast as a table."""
    total = found.memory_bytes["total"]
    parts = [(name, size) for name, size in found.memory_bytes.items() if size and name != "total"]
    lines = [(name.replace("_", " "), console.gigabytes(size), f"{size / total:.0%}") for name, size in parts]
    console.table("", ("memory", "", ""), [*lines, ("at the peak", console.gigabytes(total), "")])
    facts = {
        "time": console.duration(found.seconds) if found.seconds else "not known",
        "tokens": f"{found.tokens:,} ({found.trained_tokens:,} trained)",
        "tokens/s": f"{found.tokens / found.seconds:,.0f} over the whole command" if found.seconds else "not known",
        "parameters": f"{found.trainable_parameters:,} trained, {found.total_parameters:,} in all",
        "adapter": console.gigabytes(found.adapter_bytes),
        **{name: value for name, value in found.settings.items() if value is not None},
    }
    console.result("")
    console.facts(facts, as_json=False)
    for note in found.notes:
        console.say(f"note: {note}")
