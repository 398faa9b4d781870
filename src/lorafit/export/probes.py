"""Texts whose next tokens are compared between two programs, and what our model says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.data.chat import encode_record
from lorafit.data.records import Record, read_records
from lorafit.errors import ConfigError, Faults
from lorafit.formats.tokenizer import TextTokenizer

ROWS, LENGTH = 8, 256  # of the data at most: rows, and tokens of a row
BUNDLED = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Write a SQL query that counts the rows of the table people.", "SELECT COUNT(*) FROM people"),
    ("Add 17 and 25.", "17 + 25 = 42."),
    ("Say in one sentence why the sky is blue.", "Air scatters blue light more than red light."),
)


@dataclass(frozen=True)
class Probe:
    """One text. Compared are the next tokens after each of its beginnings of these lengths."""

    ids: tuple[int, ...]
    lengths: tuple[int, ...]
    plain: int = 0
    """A token that is a whole character and ends nothing."""

    @property
    def prefixes(self) -> list[list[int]]:
        """The beginnings themselves."""
        return [list(self.ids[:length]) for length in self.lengths]


def probes(tokenizer: TextTokenizer, file: str | None, context: int) -> list[Probe]:
    """The first rows of a data file, or the bundled conversations, as training would write them.

    Compared are the token that begins the answer, one in its middle, and the last. Raises Faults, ConfigError.
    """
    if file is None:
        said = [({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in BUNDLED]
        records = [Record(f"bundled:{n}", n, "prompt/completion", m, None, None, {}, 1) for n, m in enumerate(said, 1)]
    else:
        read = read_records([Path(file)])
        if read.faults:
            raise Faults(read.faults)
        records = read.records[:ROWS]
    found, plain = [], tokenizer.encode("a", parse_special=False).ids[-1]
    for record in records:
        row = encode_record(record, tokenizer)
        ids = [int(token) for token in row.ids][: min(LENGTH, context)]
        first = next((n for n, trained in enumerate(row.trained) if trained), 1)
        last = len(ids) - 1
        lengths = sorted({n for n in (first, (first + last) // 2, last) if 0 < n <= last})
        if lengths:
            found.append(Probe(tuple(ids), tuple(lengths), plain))
    if not found:
        raise ConfigError(str(file), "has no row to compare answers on", "give rows with an answer")
    return found


@torch.no_grad()
def log_probabilities(model: Any, found: Sequence[Probe]) -> Tensor:
    """What `model` expects after each beginning: (beginnings, V) fp32 natural logarithms, in the probes' order."""
    rows = []
    for probe in found:
        last = torch.tensor(probe.lengths) - 1
        logits = model(input_ids=torch.tensor([probe.ids]), logits_to_keep=last, use_cache=False).logits[0]
        rows.append(torch.log_softmax(logits.float(), dim=-1))
    return torch.cat(rows)
