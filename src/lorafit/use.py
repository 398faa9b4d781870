"""What one does with a model and an adapter besides training: load, preview, generate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafit import console, machine
from lorafit.adapter.file import TEMPLATE_FILE, load_adapter, tokens_of
from lorafit.config import Resolved, TrainConfig, from_values
from lorafit.data.chat import encode_prompt
from lorafit.data.records import Record, read_records
from lorafit.data.rows import Problem, Rows
from lorafit.data.split import overlap
from lorafit.errors import ConfigError, DataError, Faults, ModelError
from lorafit.formats.tokenizer import TextTokenizer
from lorafit.inputs import NO_TEMPLATE, collect_rows, read_template
from lorafit.model.generate import stream
from lorafit.model.load import Base, context_of, load_base
from lorafit.model.sources import open_source
from lorafit.model.tokenizer import as_transformers
from lorafit.settings import settle_for_machine


def open_base(config: TrainConfig) -> Base:
    """The frozen base model of `config.model`, ready for use; its settings may be "auto"."""
    source = open_source(Path(config.model))
    config = settle_for_machine(Resolved(config), source.quantised).config
    torch.set_num_threads(int(config.threads or 1))
    machine.bound_primitives()
    return load_base(source, source.tokenizer(read_template(config.template)), config.base, config.compute)


def templated(config: TrainConfig, adapter: str | None) -> TrainConfig:
    """The configuration with the chat template that the adapter brings, unless another one is given; said."""
    file = Path(adapter or "") / TEMPLATE_FILE
    if adapter is None or config.template is not None or not file.is_file():
        return config
    console.say(f"template  {file}: what the adapter was trained with")
    return replace(config, template=str(file))


def load(model: str | Path, adapter: str | Path | None = None, base: str = "auto", compute: str = "auto") -> nn.Module:
    """A model with frozen weights and, if given, an adapter; eval mode.

    `model(input_ids=LongTensor[B, L]).logits` is [B, L, V]; `.tokenizer` is its tokenizer. base: how weights are
    stored; compute: what products run in ("auto", "bf16", "fp32"). Raises ModelError, AdapterError, ConfigError.
    """
    values = from_values({"model": str(model), "base": base, "compute": compute}, "lorafit.load")
    opened = open_base(TrainConfig(**values))
    loaded: Any = opened.model
    if adapter is not None:
        learn_tokens(opened, adapter)
        for note in put_on(loaded, model, adapter):
            console.say(note)
    loaded.tokenizer = as_transformers(opened.tokenizer)
    return loaded.eval()


def put_on(model: nn.Module, base: str | Path, adapter: str | Path) -> list[str]:
    """Put an adapter's folder, or a GGUF adapter file, on the plain model of `base`; notes for the user."""
    if Path(adapter).is_file():
        from lorafit.export.gguf_adapter import put_gguf_adapter

        return put_gguf_adapter(model, Path(base), Path(adapter))
    return load_adapter(model, adapter)


def learn_tokens(opened: Base, adapter: str | Path) -> None:
    """Give a base's tokenizer the tokens that an adapter adds, before anything is encoded for it."""
    if Path(adapter).is_dir():
        opened.tokenizer.add(tokens_of(adapter))
        opened.model.new_tokens = opened.tokenizer.added  # type: ignore[assignment]


def preview(config: TrainConfig, *, count: int | None, as_json: bool) -> int:
    """Show token rows as training would see them and every fault and problem; no weights are loaded.

    count: rows to show; None for 3, or all in JSON. Returns the exit code: 2 when the data has faults, which training
    would refuse.
    """
    source = open_source(Path(config.model))
    tokenizer = source.tokenizer(read_template(config.template))
    tokenizer.add(config.new_tokens)
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
    check_temperature(temperature)
    check_text("--prompt", prompt)
    check_text("--system", system)
    records = [_prompt(prompt)] if prompt is not None else _questions(str(file))
    if system is not None and any(record.messages is None for record in records):
        raise ConfigError("--system", f"{file} holds text, not conversations", "leave it out")
    loaded = open_base(templated(config, adapter))
    if adapter:
        learn_tokens(loaded, adapter)
    say_template(loaded.tokenizer)
    context = int(loaded.model.config.max_position_embeddings)
    prompts = encode_all(records, system, loaded.tokenizer, context)
    for note in put_on(loaded.model, config.model, adapter) if adapter else []:
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


def encode_all(
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


def check_temperature(temperature: float) -> None:
    """Raises ConfigError for one that no draw can have."""
    if not 0 <= temperature < math.inf:
        raise ConfigError("--temperature", f"is {temperature}", "give 0 or a number above it")


def check_text(option: str, text: str | None) -> None:
    """Raises ConfigError for what was typed in another encoding than UTF-8."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise ConfigError(option, f"is not UTF-8: {text!r}", "give UTF-8") from None


def say_template(tokenizer: TextTokenizer) -> None:
    """Say it where conversations get lorafit's own plain template."""
    if not tokenizer.has_template:
        console.warn(NO_TEMPLATE)
