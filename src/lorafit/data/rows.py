"""Records -> the token rows of a run: encoded, cut to length, and everything found on the way counted and placed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lorafit.data.chat import Trained, Writer
from lorafit.data.records import Record, content_hash
from lorafit.data.tokens import Draft, Tokenizer, TokenRow, encode_drafts
from lorafit.errors import DataError

DOCUMENT_LENGTH = 1024  # tokens per row of a raw document, unless max_length says otherwise

Problem = tuple[str, str]


@dataclass(frozen=True)
class Rows:
    """Token rows ready for training, and what became of the others."""

    rows: list[TokenRow]
    problems: list[Problem]
    """(file:line, what): not faults, but the user should see them."""
    counts: dict[str, int]
    """rows = used + skipped; duplicates, truncated (cut by max_length), tokens, trained_tokens."""
    faults: list[DataError]
    """Rows that the chat template refuses; skipped in `counts`."""
    max_length: int
    """Tokens per row, resolved."""


def build_rows(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int | None,
    context: int,
    trained: Trained = "assistant",
) -> Rows:
    """Encode all records. max_length: tokens per row, None for the longest row up to `context`, the model's own bound.

    Longer rows lose their end, and an answer that loses its end gets no end token. A raw document is cut into
    consecutive rows instead, of 1024 tokens where max_length is None, so that every token is used. Rows without a
    trained token are left out. Duplicates stay.
    """
    bound = min(max_length or context, context)
    faults: list[DataError] = []
    writer = Writer(tokenizer, trained, min(max_length or DOCUMENT_LENGTH, context))
    whole = list(encode_drafts(_drafts(records, writer, faults), tokenizer))
    rows = [row.shortened(bound) if len(row.ids) > bound else row for row in whole]
    used = [row for row in rows if any(row.trained)]
    duplicates = _duplicates(records)
    counts = {
        "rows": len(rows) + len(faults),
        "used": len(used),
        "skipped": len(rows) + len(faults) - len(used),
        "duplicates": len(duplicates),
        "truncated": sum(row.cut for row in used),
        "tokens": sum(len(row.ids) for row in used),
        "trained_tokens": sum(sum(row.trained) for row in used),
    }
    problems = [*_notes(whole), *_length_problems(whole, rows), *duplicates]
    longest = max((len(row.ids) for row in used), default=bound)
    return Rows(used, problems, counts, faults, bound if max_length else longest)


def _drafts(records: Sequence[Record], writer: Writer, faults: list[DataError]) -> Iterator[Draft]:
    """The records written out; those that the chat template refuses go to `faults`."""
    for record in records:
        try:
            yield writer.draft(record)
        except DataError as fault:
            faults.append(fault)


def _length_problems(whole: Sequence[TokenRow], rows: Sequence[TokenRow]) -> list[Problem]:
    """Rows that were cut, and rows that are left without a trained token."""
    problems = []
    for before, after in zip(whole, rows, strict=True):
        lost = sum(before.trained) - sum(after.trained)
        what = f"cut from {len(before.ids)} to {len(after.ids)} tokens: " if after.cut else ""
        if not any(after.trained):
            what += "no trained token is left, not used" if lost else "no token is trained, not used"
        elif after.cut:
            what += f"the answer loses {lost} tokens" if lost else "no answer is touched"
        if what:
            problems.append((after.record.place, what))
    return problems


def _duplicates(records: Sequence[Record]) -> list[Problem]:
    """Records that say what an earlier one says."""
    first: dict[str, str] = {}
    problems = []
    for record in records:
        said = content_hash(record)
        if said in first:
            problems.append((record.place, f"says the same as {first[said]}"))
        first.setdefault(said, record.place)
    return problems


def _notes(rows: Sequence[TokenRow]) -> list[Problem]:
    """Each note once, at the first row that has it, with the number of rows."""
    times = Counter(note for row in rows for note in row.notes)
    first: dict[str, str] = {}
    for row in rows:
        for note in row.notes:
            first.setdefault(note, row.record.place)
    return [(place, f"{note} ({_rows(times[note])})") for note, place in first.items()]


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"
