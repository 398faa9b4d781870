"""What one does with a model and an adapter besides training: load, preview, eval, generate, info."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lorafit import console
from lorafit.adapter.attach import detach
from lorafit.adapter.file import load_adapter
from lorafit.config import Resolved, TrainConfig
from lorafit.data.chat import encode_prompt
from lorafit.data.records import Record, read_records
from lorafit.data.rows import Rows, build_rows
from lorafit.data.tokens import TokenRow
from lorafit.errors import ConfigError, Faults
from lorafit.evaluate.heldout import HeldOut, held_out, paired_difference
from lorafit.inputs import read_rows, read_template
from lorafit.model.generate import generate as generate_ids
from lorafit.model.load import Base, context_of, load_base
from lorafit.model.sources import open_source
from lorafit.model.tokenizer import as_transformers
from lorafit.settings import settle_for_machine


def open_base(model: str, base: str, compute: str, threads: int | None = None, template: str | None = None) -> Base:
    """A frozen base model ready for use, with settings that may be "auto"."""
    config = settle_for_machine(
        Resolved(TrainConfig(model=model, base=base, compute=compute, threads=threads))  # type: ignore[arg-type]
    ).config
    torch.set_num_threads(int(config.threads or 1))
    source = open_source(Path(model))
    return load_base(source, source.tokenizer(template), config.base, config.compute)


def load(model: str | Path, adapter: str | Path | None = None, base: str = "auto", compute: str = "auto") -> nn.Module:
    """A model with frozen weights and, if given, an adapter; eval mode.

    `model(input_ids=LongTensor[B, L]).logits` is [B, L, V]; `.tokenizer` is its tokenizer. base: how weights are
    stored; compute: what products run in ("auto", "bf16", "fp32"). Raises ModelError, AdapterError.
    """
    opened = open_base(str(model), base, compute)
    loaded: Any = opened.model
    loaded.tokenizer = as_transformers(opened.tokenizer)
    if adapter is not None:
        for note in load_adapter(loaded, adapter):
            console.say(note)
    return loaded.eval()


def preview(
    model: str,
    data: Sequence[str],
    *,
    count: int | None,
    as_json: bool,
    max_length: int | None,
    trained: str | None,
    template: str | None,
) -> int:
    """Show token rows as training would see them and every fault and problem; no weights are loaded.

    Returns the exit code: 2 when the data has faults, which training would refuse.
    """
    source = open_source(Path(model))
    tokenizer = source.tokenizer(read_template(template))
    read = read_records([Path(path) for path in data])
    rows = build_rows(
        read.records, tokenizer, max_length=max_length, trained=trained or "assistant", context=context_of(source)
    )  # fmt: skip
    faults = [*read.faults, *rows.faults]
    problems = [(fault.place, fault.what) for fault in faults] + list(rows.problems)
    if not tokenizer.has_template:
        problems.append((model, "the model has no chat template: rows use lorafit's plain one"))
    if as_json:
        console.result_json(_preview_document(rows, problems, count))
        return 2 if faults else 0
    for row in rows.rows[: 3 if count is None else count]:
        console.result(f"{row.record.place}: {len(row.ids)} tokens, {sum(row.trained)} trained")
        console.coloured(zip(row.texts(), row.trained, strict=True))
    console.table("", ("count", ""), [(key, f"{value:,}") for key, value in rows.counts.items()], on_stdout=True)
    for place, what in problems:
        console.warn(f"{place}: {what}")
    return 2 if faults else 0


def _preview_document(rows: Rows, problems: Sequence[tuple[str, str]], count: int | None) -> dict[str, Any]:
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
    model: str,
    data: Sequence[str],
    adapters: Sequence[str],
    *,
    forget_on: str | None,
    as_json: bool,
    base: str | None,
    compute: str | None,
    threads: int | None,
    max_length: int | None,
    trained: str | None,
    template: str | None,
    skip_bad_rows: bool | None,
) -> None:
    """Held-out loss of the base and of each adapter, printed as a table or as JSON."""
    loaded = open_base(model, base or "auto", compute or "auto", threads, read_template(template))
    context = int(loaded.model.config.max_position_embeddings)
    config = TrainConfig(max_length=max_length, trained=trained or "assistant", skip_bad_rows=bool(skip_bad_rows))  # type: ignore[arg-type]
    sets = {"": data, **({"forget": [forget_on]} if forget_on else {})}
    rows = {name: read_rows(tuple(files), loaded.tokenizer, config, context)[0].rows for name, files in sets.items()}
    for name, found in rows.items():
        if not found:
            raise ConfigError(", ".join(sets[name]), "leaves no row with a trained token", "raise --max-length")
    results: list[dict[str, Any]] = []
    plain: dict[str, HeldOut] = {}
    for adapter in (None, *adapters):
        if adapter is not None:
            for note in load_adapter(loaded.model, adapter):
                console.say(f"{adapter}: {note}")
        entry: dict[str, Any] = {"adapter": adapter}
        for name, found in rows.items():
            measured = held_out(loaded.model, loaded.head, found, TrainConfig.micro_batch_tokens)
            figures = _figures(measured, plain.setdefault(name, measured), found)
            entry |= {name: figures} if name else figures
        detach(loaded.model)
        results.append(entry)
    if as_json:
        console.result_json(results)
        return
    console.table("", ("adapter", "loss", "perplexity", "bits per byte", "difference, 95 % interval"),
                  [_table_row(entry, entry) for entry in results], on_stdout=True)  # fmt: skip
    if forget_on:
        console.table(f"on {forget_on}", ("adapter", "loss", "perplexity", "bits per byte", "difference"),
                      [_table_row(entry, entry["forget"]) for entry in results], on_stdout=True)  # fmt: skip


def _figures(measured: HeldOut, plain: HeldOut, rows: Sequence[TokenRow]) -> dict[str, Any]:
    mean, low, high = paired_difference(measured, plain)
    trained_bytes = sum(
        len(text.encode()) for row in rows for text, trained in zip(row.texts(), row.trained, strict=True) if trained
    )
    return {
        "loss": measured.loss,
        "tokens": int(measured.tokens.sum()),
        "perplexity": measured.perplexity,
        "bits_per_byte": measured.bits_per_byte(trained_bytes),
        "difference": {"mean": mean, "low": low, "high": high} if np.isfinite([low, high]).all() else None,
    }


def _table_row(entry: dict[str, Any], figures: dict[str, Any]) -> tuple[str, ...]:
    gap = figures["difference"]
    told = f"{gap['mean']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})" if gap and entry["adapter"] else ""
    numbers = (f"{figures['loss']:.4f}", f"{figures['perplexity']:.3f}", f"{figures['bits_per_byte']:.4f}")
    return (entry["adapter"] or "(base)", *numbers, told)


def answer(
    model: str,
    *,
    prompt: str | None,
    file: str | None,
    system: str | None,
    adapter: str | None,
    max_tokens: int,
    temperature: float,
    base: str | None,
    compute: str | None,
    threads: int | None,
    template: str | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Answer a prompt on standard output, or every row of a file as JSON lines (the row's fields and `output`)."""
    if (prompt is None) == (file is None):
        raise ConfigError("lorafit generate", "needs either --prompt or --data", "give one of them")
    records = list(_questions(file)) if file else []
    loaded = open_base(model, base or "auto", compute or "auto", threads, read_template(template))
    for note in load_adapter(loaded.model, adapter) if adapter else []:
        console.say(note)
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed or 0}
    if prompt is not None:
        text = respond(loaded, [{"role": "user", "content": prompt}], None, system, **options)
        return console.result_json({"prompt": prompt, "output": text}) if as_json else console.result(text)
    for record in records:
        if record.messages is None:
            text = complete_text(loaded, str(record.text), **options)
        else:
            text = respond(loaded, list(record.messages), record.tools, system, **options)
        console.result_json({**record.fields, "output": text})
    return None


def _questions(file: str) -> Iterator[Record]:
    read = read_records([Path(file)], for_training=False)
    if read.faults:
        raise Faults(read.faults)
    return iter(read.records)


def respond(loaded: Base, messages: list[dict[str, Any]], tools: Any, system: str | None, **options: Any) -> str:
    """The model's answer to a conversation, rendered exactly as in training."""
    if system is not None and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system}, *messages]
    ids = encode_prompt(messages, tools, loaded.tokenizer)
    return _generate(loaded, ids, **options)


def complete_text(loaded: Base, text: str, **options: Any) -> str:
    """What follows a plain text; it starts with BOS where the model's texts do."""
    start = [loaded.tokenizer.bos_id] if loaded.tokenizer.add_bos and loaded.tokenizer.bos_id is not None else []
    return _generate(loaded, [*start, *loaded.tokenizer.encode(text, parse_special=False).ids], **options)


def _generate(loaded: Base, ids: list[int], max_tokens: int, temperature: float, seed: int) -> str:
    context = int(loaded.model.config.max_position_embeddings)
    if len(ids) >= context:
        raise ConfigError("prompt", f"has {len(ids)} tokens and the model's context is {context}", "shorten it")
    out = generate_ids(
        loaded.model,
        ids,
        max_tokens=min(max_tokens, context - len(ids)),
        end_ids=loaded.tokenizer.end_ids,
        temperature=temperature,
        seed=seed,
    )
    return loaded.tokenizer.decode(out, skip_special=True)
