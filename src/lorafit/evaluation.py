"""`lorafit eval`: the base and each adapter on the user's rows, as one table or one JSON list."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from lorafit import console
from lorafit.adapter.attach import detach, enable_adapter
from lorafit.adapter.file import tokens_of
from lorafit.config import TrainConfig
from lorafit.data.tokens import TokenRow
from lorafit.errors import ConfigError, NonFiniteError
from lorafit.evaluate.choice import choices, read_labels
from lorafit.evaluate.heldout import HeldOut, difference, held_out
from lorafit.evaluate.tasks import Judge, Task, check_json, questions, read_metrics
from lorafit.inputs import read_rows
from lorafit.model.load import Base
from lorafit.planning.fit import SIZES
from lorafit.use import encode_all, learn_tokens, open_base, put_on, say_template, templated

Entry = dict[str, Any]
BUDGET = max(SIZES)  # tokens computed at once
SHARES = {  # of the table: its name, where the figure stands in an entry, where its difference does
    "exact match": ("exact_match", "share", "difference"),
    "normalised match": ("normalised_match", "share", "difference"),
    "choice": ("choice", "accuracy", "difference"),
    "JSON valid": ("json", "valid.mean", "valid.difference"),
    "JSON field F1": ("json", "field_f1.mean", "field_f1.difference"),
    "ROUGE-1": ("rouge", "rouge1.mean", "rouge1.difference"),
    "ROUGE-2": ("rouge", "rouge2.mean", "rouge2.difference"),
    "ROUGE-L": ("rouge", "rougeL.mean", "rougeL.difference"),
}


def evaluate(
    config: TrainConfig,
    *,
    adapters: Sequence[str],
    forget_on: str | None,
    metrics: str | None,
    labels: str | None,
    exact_match: bool,
    max_tokens: int,
    as_json: bool,
) -> None:
    """Held-out loss of the base and of each adapter, and what `metrics` names besides.

    Everything that can be wrong with the rows is found before the first is measured. labels: file of choice's labels;
    without it they are the answers that the rows have.
    """
    wanted = read_metrics(metrics, exact_match)
    if labels is not None and "choice" not in wanted:
        raise ConfigError("--labels", "are for --metrics choice", "ask for it, or leave them out")
    grows = next((folder for folder in adapters if tokens_of(folder)), None)
    if grows is not None and len(adapters) > 1:
        raise ConfigError(f"--adapter {grows}", "adds tokens, and so reads the rows in its own way", "measure it alone")
    if len(adapters) == 1:  # several are compared on the same tokens, the model's own
        config = templated(config, adapters[0])
    loaded = open_base(config)
    if grows is not None:
        learn_tokens(loaded, grows)
    say_template(loaded.tokenizer)
    context = int(loaded.model.config.max_position_embeddings)
    sets = {"": config.data, **({"forget": (forget_on,)} if forget_on else {})}
    rows = {name: read_rows(files, loaded.tokenizer, config, context)[0].rows for name, files in sets.items()}
    for name, found in rows.items():
        if not found:
            raise ConfigError(", ".join(sets[name]), "leaves no row with a trained token", "raise --max-length")
    judge = Judge(_task(wanted, rows[""], labels, loaded, context, max_tokens), BUDGET)
    results: list[Entry] = []
    plain: dict[str, HeldOut] = {}
    if grows is not None:
        _put(loaded, config.model, grows)
    for adapter in (None, *adapters):
        if grows is not None:  # the base has no rows for its tokens: it is measured with the mean of all, as they began
            enable_adapter(loaded.model, adapter is not None)
        elif adapter is not None:
            _put(loaded, config.model, adapter)
        entry: Entry = {"adapter": adapter}
        for name, found in rows.items():
            measured = held_out(loaded.model, loaded.head, found, BUDGET)
            if not math.isfinite(measured.loss):
                what = f"gives loss {measured.loss}"
                raise NonFiniteError(adapter or config.model, what, "its file is damaged, or try --compute fp32")
            figures = _figures(measured, plain.setdefault(name, measured), found)
            entry |= {name: figures} if name else figures
        results.append(entry | judge(loaded.model, loaded.head, loaded.tokenizer))
        if grows is None:
            detach(loaded.model)
    if as_json:
        return console.result_json(results)
    header = ("", *(str(entry["adapter"] or "(base)") for entry in results))
    return console.table("", header, _table(results, forget_on))


def _put(loaded: Base, base: str, adapter: str) -> None:
    for note in put_on(loaded.model, base, adapter):
        console.say(f"{adapter}: {note}")


def _task(
    metrics: tuple[str, ...], rows: Sequence[TokenRow], labels: str | None, base: Base, context: int, max_tokens: int
) -> Task:
    """The rows as questions, as far as the metrics ask for them."""
    if not metrics:
        return Task((), [], [], None, max_tokens)
    option = "--exact-match" if metrics == ("exact",) else f"--metrics {','.join(metrics)}"
    records = list({row.record.number: row.record for row in rows}.values())  # a document has several rows
    asked, expected = questions(records, option)
    if "json" in metrics:
        check_json(asked, expected)
    found = None
    if "choice" in metrics:
        named = read_labels(labels) if labels else sorted({text.strip() for text in expected})
        found = choices(asked, expected, named, base.tokenizer, context)
        console.say(f"choice    among {len(named)} labels: {len(named) * len(asked):,} rows for each model")
    prompts = encode_all(asked, None, base.tokenizer, context)
    return Task(metrics, prompts, expected, found, max_tokens)


def _figures(measured: HeldOut, plain: HeldOut, rows: Sequence[TokenRow]) -> Entry:
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


def _table(results: Sequence[Entry], forget_on: str | None) -> Iterator[tuple[str, ...]]:
    """A line per measure, a column per model; the difference from the base stands beside its figure."""
    yield from _loss_lines(results, "")
    if forget_on:
        yield from _loss_lines(
            [entry["forget"] | {"adapter": entry["adapter"]} for entry in results], f" on {forget_on}"
        )
    for name, (metric, figure, gap) in SHARES.items():
        if metric in results[0]:
            yield (name, *(_share(entry, _at(entry[metric], figure), _at(entry[metric], gap)) for entry in results))
    if "choice" in results[0]:
        yield ("choice, mean chance", *(f"{entry['choice']['mean_chance']:.1%}" for entry in results))
    if "bleu" in results[0]:
        yield ("BLEU", *map(_bleu, results))


def _loss_lines(results: Sequence[Entry], where: str) -> Iterator[tuple[str, ...]]:
    def gap(entry: Entry) -> str:
        return f"{entry['loss']:.4f}" + (_interval(entry["difference"], ".4f") if entry["adapter"] else "")

    yield (f"loss{where}", *map(gap, results))
    yield (f"perplexity{where}", *(f"{entry['perplexity']:.3f}" for entry in results))
    yield (f"bits per byte{where}", *(f"{entry['bits_per_byte']:.4f}" for entry in results))


def _share(entry: Entry, share: float, gap: dict[str, float | None]) -> str:
    points = {name: None if value is None else 100 * value for name, value in gap.items()}
    return f"{share:.1%}" + (_interval(points, ".1f") if entry["adapter"] else "")


def _bleu(entry: Entry) -> str:
    found = entry["bleu"]
    return f"{found['score']:.2f}" + (_interval(found["difference"], ".2f") if entry["adapter"] else "")


def _interval(gap: dict[str, Any], form: str) -> str:
    """The difference from the base and its 95 % interval."""
    told = f"  {gap['mean']:+{form}}"
    return told if gap["low"] is None else f"{told} ({gap['low']:+{form}} to {gap['high']:+{form}})"


def _at(figures: Any, path: str) -> Any:
    for key in path.split("."):
        figures = figures[key]
    return figures
