"""Choice by likelihood: of a set of labels, which does the model find likeliest as the whole answer to a row?

    choice(row) = argmax over labels of log p(label, end of turn | prompt)

The end token counts, so that the labels' likelihoods are those of whole answers and need no correction for length: the
model that is asked is the one that `lorafit generate` runs, restricted to the set. Every label is written by the chat
template as training writes an answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from lorafit.data.chat import Writer
from lorafit.data.records import Record
from lorafit.data.tokens import TokenRow, encode_drafts
from lorafit.errors import ConfigError
from lorafit.evaluate.heldout import held_out
from lorafit.formats.tokenizer import TextTokenizer
from lorafit.model.head import Head

MOST, AT_ONCE = 1000, 512  # labels; rows that are packed together


@dataclass(frozen=True)
class Choices:
    """R questions with L labels each; right[r] is the place of the label that question r is answered by."""

    asked: list[Record]
    labels: list[str]
    right: np.ndarray
    tokenizer: TextTokenizer

    def likelihoods(self, model: nn.Module, head: Head, budget: int) -> np.ndarray:
        """log p(label and end | prompt), (R, L), in nats; the rows are written a few questions at a time."""
        each = max(1, AT_ONCE // len(self.labels))
        parts = []
        for first in range(0, len(self.asked), each):
            rows = answered(self.asked[first : first + each], self.labels, self.tokenizer)
            parts.append(-held_out(model, head, rows, budget).nats.reshape(-1, len(self.labels)))
        return np.concatenate(parts)


def read_labels(file: str) -> list[str]:
    """The labels in a file: one a line, or a JSON list of texts. Raises ConfigError."""
    path, place = Path(file), f"--labels: {file}"
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(place, f"does not read: {what}", "give a file with a label a line") from None
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise ConfigError(place, "is no list of texts", "write a label a line, or a JSON list of texts")
    labels = [label.strip() for label in found if label.strip()]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(place, f"names {twice[0]!r} twice", "name each label once")
    return labels


def choices(
    asked: Sequence[Record], expected: Sequence[str], labels: Sequence[str], tokenizer: TextTokenizer, context: int
) -> Choices:
    """The questions with their labels; asked: rows up to their answers, expected: those answers.

    Raises ConfigError where an answer is none of the labels, there are fewer than two of them or too many, or a row
    with a label is longer than the context.
    """
    if not 2 <= len(labels) <= MOST:
        raise ConfigError("--labels", f"are {len(labels)}", f"give 2 to {MOST}, or leave out --metrics choice")
    places = {label: number for number, label in enumerate(labels)}
    right = []
    for record, answer in zip(asked, expected, strict=True):
        if answer.strip() not in places:
            what = f"{record.place} is answered by {answer.strip()[:60]!r}, which is none of them"
            raise ConfigError("--labels", what, "add it, or take the row out")
        right.append(places[answer.strip()])
    longest = max(labels, key=len)
    for row in answered(asked, [longest], tokenizer):
        if len(row.ids) > context:
            what = f"has {len(row.ids)} tokens with label {longest!r} and the model's context is {context}"
            raise ConfigError(row.record.place, what, "shorten it")
    return Choices(list(asked), list(labels), np.array(right), tokenizer)


def answered(asked: Sequence[Record], labels: Sequence[str], tokenizer: TextTokenizer) -> list[TokenRow]:
    """Each question with each label as its answer, which alone counts, as training would see it."""
    writer = Writer(tokenizer, "last")
    said = [({"role": "assistant", "content": label},) for label in labels]
    records = (replace(record, messages=(*(record.messages or ()), *one)) for record in asked for one in said)
    return list(encode_drafts(map(writer.draft, records), tokenizer))


def chances(likelihoods_RL: np.ndarray) -> np.ndarray:
    """p(label | prompt, one of the labels), (R, L)."""
    shifted = np.exp(likelihoods_RL - likelihoods_RL.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)
