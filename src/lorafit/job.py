"""From settings to a run that is ready to start: rows, a prediction, the model with its adapter. Nothing is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorafit import console, machine, trackers
from lorafit.adapter.attach import adapted_layers, attach
from lorafit.adapter.experts import refuse
from lorafit.adapter.file import load_adapter, tokens_of
from lorafit.config import Resolved, TrainConfig, pattern
from lorafit.data.records import Record
from lorafit.data.rows import Rows
from lorafit.data.split import overlap, split
from lorafit.data.tokens import TokenRow
from lorafit.errors import ConfigError
from lorafit.formats.tokenizer import TextTokenizer
from lorafit.frozen.fingerprint import digest, fingerprint
from lorafit.identity import identity_of
from lorafit.inputs import read_rows, read_template
from lorafit.kernels import native
from lorafit.kernels.product import onednn_is_faster
from lorafit.model import buffers
from lorafit.model.head import decoder_of
from lorafit.model.load import Base, configuration, context_of, load_base
from lorafit.model.sources import WeightSource, open_source
from lorafit.planning import predict
from lorafit.planning.outline import of_source
from lorafit.planning.predict import Held, Prediction
from lorafit.settings import settle_for_data, settle_for_machine
from lorafit.training.checkpoint import Checkpoints
from lorafit.training.loop import Plan
from lorafit.training.sample import feed
from lorafit.training.trained import train_everything


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
    machine.settle_allocator(keeps=base.fused < len(decoder_of(base.model).layers) or own_memory)
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
        base.model.lora_init = config.init  # type: ignore[assignment]  # what the card says
    identity = identity_of(config, base_digest, tokenizer)
    rows = read.data, read.training, read.evaluation
    return Job(resolved, read.plan, base, *rows, identity, read.prediction, read.source.bytes_by_format())


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
