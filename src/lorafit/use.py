"""What one does with a model and an adapter besides training: load, preview, eval, generate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafit import console
from lorafit.adapter.attach import detach
from lorafit.adapter.file import load_adapter
from lorafit.config import Resolved, TrainConfig, from_values
from lorafit.data.chat import encode_prompt
from lorafit.data.records import Record, read_records
from lorafit.data.rows import Problem, Rows
from lorafit.data.split import overlap
from lorafit.data.tokens import TokenRow
from lorafit.errors import ConfigError, DataError, Faults, ModelError, NonFiniteError
from lorafit.evaluate.heldout import HeldOut, held_out
from lorafit.evaluate.report import difference
from lorafit.evaluate.tasks import matches, questions
from lorafit.formats.tokenizer import TextTokenizer
from lorafit.inputs import NO_TEMPLATE, collect_rows, read_rows, read_template
from lorafit.model.generate import stream
from lorafit.model.load import Base, context_of, load_base
from lorafit.model.sources import open_source
from lorafit.model.tokenizer import as_transformers
from lorafit.settings import MICRO_BATCHES, settle_for_machine


def open_base(config: TrainConfig) -> Base:
    """The frozen base model of `config.model`, ready for use; its settings may be "auto"."""
    source = open_source(Path(config.model))
    config = settle_for_machine(Resolved(config), source.quantised).config
    torch.set_num_threads(int(config.threads or 1))
    return load_base(source, source.tokenizer(read_template(config.template)), config.base, config.compute)


def load(model: str | Path, adapter: str | Path | None = None, base: str = "auto", compute: str = "auto") -> nn.Module:
    """A model with frozen weights and, if given, an adapter; eval mode.

    `model(input_ids=LongTensor[B, L]).logits` is [B, L, V]; `.tokenizer` is its tokenizer. base: how weights are
    stored; compute: what products run in ("auto", "bf16", "fp32"). Raises ModelError, AdapterError, ConfigError.
    """
    values = from_values({"model": str(model), "base": base, "compute": compute}, "lorafit.load")
    opened = open_base(TrainConfig(**values))
    loaded: Any = opened.model
    loaded.tokenizer = as_transformers(opened.tokenizer)
    if adapter is not None:
        for note in load_adapter(loaded, adapter):
            console.say(note)
    return loaded.eval()


def preview(config: TrainConfig, *, count: int | None, as_json: bool) -> int:
    """Show token rows as training would see them and every fault and problem; no weights are loaded.

    count: rows to show; None for 3, or all in JSON. Returns the exit code: 2 when the data has faults, which training
    would refuse.
    """
    source = open_source(Path(config.model))
    tokenizer = source.tokenizer(read_template(config.template))
    rows, records, faults = collect_rows(config.data, tokenizer, config, context_of(source))
    problems = list(rows.problems)
    if config.eval:
        _, held, held_faults = collect_rows(config.eval, tokenizer, config, context_of(source))
        pairs = overlap(records, held)
        faults += held_faults
        problems += [(place, f"is evaluation row {other} too") for place, other in pairs]
        rows.counts["overlap"] = len(pairs)
    if not tokenizer.has_template:
        problems.append((config.model, NO_TEMPLATE))
    if as_json:
        found = [*((fault.place, fault.what) for fault in faults), *problems]
        console.result_json(_preview_document(rows, found, count))
    else:
        for row in rows.rows[: 3 if count is None else count]:
            console.result(f"{row.record.place}: {len(row.ids)} tokens, {sum(row.trained)} trained")
            console.coloured(zip(row.texts(), row.trained, strict=True))
        console.table("", ("count", ""), [(key, f"{value:,}") for key, value in rows.counts.items()])
        for place, what in problems:
            console.warn(f"{place}: {what}")
    console.fail(str(fault) for fault in faults)
    return 2 if faults else 0


def _preview_document(rows: Rows, problems: Sequence[Problem], count: int | None) -> dict[str, Any]:
    shown = [
        {
            "row": row.record.number,
            "tokens": [
                {"id": int(token), "text": text, "trained": bool(trained)}
                for token, text, trained in zip(row.ids, row.texts(), row.trained, strict=True)
            ],
        }
        for row in rows.rows[:count]
    ]
    return {"rows": shown, "counts": rows.counts, "problems": [{"place": p, "what": w} for p, w in problems]}


def evaluate(
    config: TrainConfig,
    *,
    adapters: Sequence[str],
    forget_on: str | None,
    exact_match: bool,
    max_tokens: int,
    as_json: bool,
) -> None:
    """Held-out loss of the base and of each adapter, printed as a table or as JSON.

    exact_match: also the share of rows of `config.data` that are answered, greedily and in max_tokens, as they say.
    """
    loaded = open_base(config)
    _say_template(loaded.tokenizer)
    context = int(loaded.model.config.max_position_embeddings)
    sets = {"": config.data, **({"forget": (forget_on,)} if forget_on else {})}
    rows = {name: read_rows(files, loaded.tokenizer, config, context)[0].rows for name, files in sets.items()}
    for name, found in rows.items():
        if not found:
            raise ConfigError(", ".join(sets[name]), "leaves no row with a trained token", "raise --max-length")
    asked, answers = questions([row.record for row in rows[""]]) if exact_match else ([], [])
    prompts = _encode_all(asked, None, loaded.tokenizer, context)
    results: list[dict[str, Any]] = []
    plain: dict[str, HeldOut] = {}
    for adapter in (None, *adapters):
        if adapter is not None:
            for note in load_adapter(loaded.model, adapter):
                console.say(f"{adapter}: {note}")
        entry: dict[str, Any] = {"adapter": adapter}
        for name, found in rows.items():
            measured = held_out(loaded.model, loaded.head, found, max(MICRO_BATCHES))
            if not math.isfinite(measured.loss):
                what = f"gives loss {measured.loss}"
                raise NonFiniteError(adapter or config.model, what, "its file is damaged, or try --compute fp32")
            figures = _figures(measured, plain.setdefault(name, measured), found)
            entry |= {name: figures} if name else figures
        if exact_match:
            entry["exact_match"] = matches(loaded.model, loaded.tokenizer, prompts, answers, max_tokens)
        detach(loaded.model)
        results.append(entry)
    if as_json:
        return console.result_json(results)
    header = ("adapter", "loss", "perplexity", "bits per byte", "difference, 95 % interval")
    more = ("exact match",) if exact_match else ()
    console.table("", header + more, [_table_row(entry, entry) for entry in results])
    if forget_on:
        rows_shown = [_table_row(entry, entry["forget"]) for entry in results]
        console.table(f"\non {forget_on}", header, rows_shown)
    return None


def _figures(measured: HeldOut, plain: HeldOut, rows: Sequence[TokenRow]) -> dict[str, Any]:
    trained_bytes = sum(
        len(text.encode()) for row in rows for text, trained in zip(row.texts(), row.trained, strict=True) if trained
    )
    return {
        "loss": measured.loss,
        "tokens": int(measured.tokens.sum()),
        "perplexity": measured.perplexity,
        "bits_per_byte": measured.bits_per_byte(trained_bytes),
        "difference": difference(measured, plain),
    }


def _table_row(entry: dict[str, Any], figures: dict[str, Any]) -> tuple[str, ...]:
    gap, told = figures["difference"], ""
    if entry["adapter"]:
        told = f"{gap['mean']:+.4f}" + ("" if gap["low"] is None else f" ({gap['low']:+.4f} to {gap['high']:+.4f})")
    numbers = (f"{figures['loss']:.4f}", f"{figures['perplexity']:.3f}", f"{figures['bits_per_byte']:.4f}")
    share = (f"{figures['exact_match']['share']:.1%}",) if "exact_match" in figures else ()
    return (entry["adapter"] or "(base)", *numbers, told, *share)


def answer(
    config: TrainConfig,
    *,
    prompt: str | None,
    file: str | None,
    system: str | None,
    adapter: str | None,
    max_tokens: int,
    temperature: float,
    as_json: bool,
) -> None:
    """Answer a prompt on standard output, or every row of a file as JSON lines (the row's fields and `output`).

    Every prompt is rendered, exactly as in training, before the first is answered: a fault costs no answers.
    """
    if (prompt is None) == (file is None):
        raise ConfigError("lorafit generate", "needs either --prompt or --data", "give one of them")
    if not 0 <= temperature < math.inf:
        raise ConfigError("--temperature", f"is {temperature}", "give 0 or a number above it")
    records = [_prompt(prompt)] if prompt is not None else _questions(str(file))
    if system is not None and any(record.messages is None for record in records):
        raise ConfigError("--system", f"{file} holds text, not conversations", "leave it out")
    loaded = open_base(config)
    _say_template(loaded.tokenizer)
    context = int(loaded.model.config.max_position_embeddings)
    prompts = _encode_all(records, system, loaded.tokenizer, context)
    for note in load_adapter(loaded.model, adapter) if adapter else []:
        console.say(note)
    outputs = stream(
        loaded.model,
        prompts,
        max_tokens=max_tokens,
        end_ids=loaded.tokenizer.end_ids,
        temperature=temperature,
        seed=config.seed,
    )
    for record, output in zip(records, outputs, strict=True):
        text = loaded.tokenizer.decode(output, skip_special=True)
        if file or as_json:
            console.result_json({**record.fields, "output": text})
        else:
            console.result(text)


def _prompt(text: str) -> Record:
    messages = ({"role": "user", "content": text},)
    return Record("--prompt", 1, "prompt/completion", messages, None, None, {"prompt": text})


def _questions(file: str) -> list[Record]:
    read = read_records([Path(file)], for_training=False)
    if read.faults:
        raise Faults(read.faults)
    return read.records


def _encode_all(
    records: Sequence[Record], system: str | None, tokenizer: TextTokenizer, context: int
) -> list[list[int]]:
    """Token ids of every prompt; raises Faults for those that the template refuses or that fill the context."""
    prompts, faults = [], []
    for record in records:
        try:
            ids = _encode(record, system, tokenizer)
        except ModelError as error:
            faults.append(DataError(record.place, f"the chat template refuses the row: {error.what}", error.remedy))
            continue
        if len(ids) >= context:
            faults.append(DataError(record.place, f"has {len(ids)} tokens and the model's context is {context}",
                                    "shorten it"))  # fmt: skip
        prompts.append(ids)
    if faults:
        raise Faults(faults)
    return prompts


def _encode(record: Record, system: str | None, tokenizer: TextTokenizer) -> list[int]:
    """The ids after which an answer follows; a plain text starts with BOS where the model's texts do."""
    if record.messages is None:
        start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        return [*start, *tokenizer.encode(str(record.text), parse_special=False).ids]
    messages = list(record.messages)
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return encode_prompt(messages, record.tools, tokenizer)


def _say_template(tokenizer: TextTokenizer) -> None:
    if not tokenizer.has_template:
        console.warn(NO_TEMPLATE)
