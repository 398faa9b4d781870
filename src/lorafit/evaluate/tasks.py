"""Held-out rows as questions: what is asked, what should be said, and how near a model's answers come to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from lorafit.data.records import Record
from lorafit.errors import ConfigError
from lorafit.evaluate import scores
from lorafit.evaluate.choice import Choices, chances
from lorafit.evaluate.heldout import HeldOut, difference
from lorafit.formats.tokenizer import TextTokenizer
from lorafit.model.generate import generate
from lorafit.model.head import Head

Metric = Literal["exact", "normalised", "choice", "json", "bleu", "rouge"]
METRICS: tuple[str, ...] = get_args(Metric)


@dataclass(frozen=True)
class Task:
    """Rows to answer. prompts: token ids; expected: the right answers; choices: the rows with their labels."""

    metrics: tuple[str, ...]
    prompts: list[list[int]]
    expected: list[str]
    choices: Choices | None
    max_tokens: int


def read_metrics(words: str | None, exact_match: bool) -> tuple[str, ...]:
    """The metrics that the options ask for, in METRICS' order. Raises ConfigError for another name, and where a
    library is missing."""
    asked = {word.strip() for word in words.split(",")} if words else set()
    unknown = sorted(asked - set(METRICS))
    if unknown:
        raise ConfigError("--metrics", f"{unknown[0]!r} is none", f"there are {', '.join(METRICS)}")
    asked |= {"exact"} if exact_match else set()
    found = tuple(metric for metric in METRICS if metric in asked)
    for metric in found:
        scores.needed(metric)
    return found


def questions(records: Sequence[Record], option: str = "--exact-match") -> tuple[list[Record], list[str]]:
    """Each row up to its last assistant turn, and what that turn says. option: what asks for them, for errors.

    Raises ConfigError at the first row that has no such turn, or one without content, which only calls a tool.
    """
    asked, said = [], []
    for record in records:
        messages = record.messages or ()
        last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        if last < 0 or "content" not in messages[last]:
            what = f"{record.place} holds no assistant's words to compare an answer with"
            raise ConfigError(option, what, "leave out the option or the row")
        asked.append(replace(record, messages=messages[:last]))
        said.append(messages[last]["content"])
    return asked, said


def check_json(records: Sequence[Record], expected: Sequence[str]) -> None:
    """Raises ConfigError at the first right answer that is no JSON."""
    for record, right in zip(records, expected, strict=True):
        try:
            scores.read_json(right)
        except ValueError as error:
            what = f"the answer of {record.place} is no JSON: {error}"
            raise ConfigError("--metrics json", what, "leave out json or the row") from None


class Judge:
    """Measures one model after another on a task; the first is what the others are compared with."""

    def __init__(self, task: Task, budget: int) -> None:
        self._task, self._budget = task, budget
        self._first: scores.Scores = {}
        self._counts: np.ndarray | None = None

    def __call__(self, model: Any, head: Head, tokenizer: TextTokenizer) -> dict[str, Any]:
        """The task's figures of the model as it stands, by metric."""
        task, found = self._task, {}
        answers = self._answers(model, tokenizer)
        for metric in task.metrics:
            if metric in scores.PER_ROW:
                equal = [scores.PER_ROW[metric](a, e) for a, e in zip(answers, task.expected, strict=True)]
                share = self._share(metric, equal)
                matches = {"share": share["mean"], "rows": len(equal), "matches": int(sum(equal))}
                found[f"{metric}_match"] = {**matches, "difference": share["difference"]}
            elif metric == "choice":
                found[metric] = self._choice(model, head)
            elif metric == "bleu":
                found[metric] = self._bleu(answers)
            else:
                rate = {"json": scores.json_scores, "rouge": scores.rouge_scores}[metric]
                parts = rate(answers, task.expected)
                found[metric] = {name: self._share(f"{metric}.{name}", rows) for name, rows in parts.items()}
                found[metric]["rows"] = len(answers)
        return found

    def _answers(self, model: Any, tokenizer: TextTokenizer) -> list[str]:
        """Greedy answers, none where no metric reads them."""
        if set(self._task.metrics) <= {"choice"}:
            return []
        told = generate(model, self._task.prompts, max_tokens=self._task.max_tokens, end_ids=tokenizer.end_ids)
        return [tokenizer.decode(ids, skip_special=True) for ids in told]

    def _bleu(self, answers: list[str]) -> dict[str, Any]:
        """Corpus BLEU, and its difference from the first model's."""
        counts = scores.bleu_counts(answers, self._task.expected)
        self._counts = counts if self._counts is None else self._counts
        gap = scores.bleu_difference(counts, self._counts)
        return {**scores.corpus_bleu(answers, self._task.expected), "rows": len(answers), "difference": gap}

    def _choice(self, model: Any, head: Head) -> dict[str, Any]:
        """Accuracy of the likeliest label, and the mean chance of the right one among all."""
        choices = self._task.choices
        assert choices is not None, "choice is asked with labels"
        found_RL = choices.likelihoods(model, head, self._budget)
        rows = np.arange(len(found_RL))
        right = (found_RL.argmax(1) == choices.right).astype(float)
        accuracy = self._share("choice", right.tolist())
        return {
            "accuracy": accuracy["mean"],
            "rows": len(right),
            "labels": len(choices.labels),
            "mean_chance": float(chances(found_RL)[rows, choices.right].mean()),
            "difference": accuracy["difference"],
        }

    def _share(self, name: str, rows: list[float]) -> dict[str, Any]:
        """The mean over the rows, and its difference from the first model's with the paired 95 % interval."""
        first = self._first.setdefault(name, rows)
        ones = np.ones(len(rows), dtype=np.int64)
        gap = difference(HeldOut(np.array(rows), ones), HeldOut(np.array(first), ones))
        return {"mean": float(np.mean(rows)), "difference": gap}
