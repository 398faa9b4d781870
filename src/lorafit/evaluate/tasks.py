"""Held-out rows as questions: is a row answered as it says?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorafit.data.records import Record
from lorafit.errors import ConfigError
from lorafit.formats.tokenizer import TextTokenizer
from lorafit.model.generate import generate


def questions(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Each row up to its last assistant turn, and what that turn says.

    Raises ConfigError at the first row that has no such turn, or one without content, which only calls a tool.
    """
    asked, said = [], []
    for record in records:
        messages = record.messages or ()
        last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        if last < 0 or "content" not in messages[last]:
            what = f"{record.place} holds no assistant's words to compare an answer with"
            raise ConfigError("--exact-match", what, "leave out the option or the row")
        asked.append(replace(record, messages=messages[:last]))
        said.append(messages[last]["content"])
    return asked, said


def matches(
    model: Any, tokenizer: TextTokenizer, prompts: Sequence[Sequence[int]], expected: Sequence[str], max_tokens: int
) -> dict[str, Any]:
    """How many greedy answers of at most max_tokens are the expected text, white space at both ends aside."""
    answers = generate(model, prompts, max_tokens=max_tokens, end_ids=tokenizer.end_ids)
    pairs = zip(answers, expected, strict=True)
    equal = sum(tokenizer.decode(ids, skip_special=True).strip() == text.strip() for ids, text in pairs)
    return {"share": equal / len(expected), "rows": len(expected), "matches": equal}
