"""Records -> drafts of token rows: the chat template writes the row, the assistant's words in it are trained.

A row has exactly the ids of its rendering; only rows with look-alikes of special tokens are encoded in stretches.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lorafit.data.document import draft_document, text_notes
from lorafit.data.lookalikes import Stretch, broken, first_look_alike, special_pattern, stretches
from lorafit.data.records import Record
from lorafit.data.spans import Renderings, Span, Template, UnplacedError, turn_spans
from lorafit.data.tokens import Draft, Joined, Piece, Tokenizer, TokenRow, encode_drafts, encode_stretches
from lorafit.errors import DataError, ModelError

Message = dict[str, Any]
Tools = Sequence[dict[str, Any]] | None
Trained = Literal["assistant", "all", "last"]

UNENDED = "the chat template has no end-of-turn token: the model cannot learn to stop"
EMPTY = "an answer is empty"
UNSEEN_TOOLS = "the chat template leaves out tools or tool calls: the model will not see them"


def encode_record(record: Record, tokenizer: Tokenizer, trained: Trained = "assistant") -> TokenRow:
    """The record as a token row, whole. trained: assistant turns, all tokens, or the last assistant turn; of text all.

    Raises DataError at the record's place where the chat template refuses it or does not write one of its turns.
    """
    return next(encode_drafts([Writer(tokenizer, trained).draft(record)], tokenizer))


def encode_prompt(messages: Sequence[Message], tools: Tools, tokenizer: Tokenizer) -> list[int]:
    """The ids of a conversation with the generation prompt: what an answer is generated after, as in training.

    Raises ModelError where the chat template refuses the messages.
    """
    chat = Writer(tokenizer).prepared(messages, tools)
    text = chat.renderings.first(len(messages), prompt=True)
    return Joined(encode_stretches(chat.stretches(text), tokenizer)).ids


@dataclass(frozen=True)
class _Chat:
    """A conversation whose look-alikes of special tokens are broken by `mark`; look_alike: the first, if any."""

    renderings: Renderings
    tools: Tools
    special: re.Pattern[str]
    mark: str
    look_alike: str | None

    def stretches(self, text: str) -> list[Stretch]:
        """A rendering in stretches, without the marks."""
        return list(stretches(text, self.mark, self.special)) if self.mark else [Stretch(text, plain=False)]

    def unmarked(self, span: Span) -> tuple[int, int]:
        """Where the span stands once the marks are gone."""
        start, end = (at - (self.renderings.full.count(self.mark, 0, at) if self.mark else 0) for at in span[:2])
        return start, end


class Writer:
    """Writes records out as drafts; what follows from the tokenizer's special tokens alone is made once, for all rows.

    trained: as in `encode_record`. document_length: tokens per row of a raw document.
    """

    def __init__(
        self, tokenizer: Tokenizer, trained: Trained = "assistant", document_length: int = sys.maxsize
    ) -> None:
        self._tokenizer, self._trained, self._length = tokenizer, trained, document_length
        self._special = special_pattern(tokenizer.special)
        self._ids = frozenset(tokenizer.special.values())
        self._stops = {token for token, number in tokenizer.special.items() if number in tokenizer.end_ids}

    def draft(self, record: Record) -> Draft:
        """The record written out. Raises DataError at its place where the chat template refuses it or does not write
        one of its turns."""
        if record.messages is None:
            length = self._length if record.format == "raw" else sys.maxsize
            return draft_document(record, self._tokenizer, self._special, length)
        try:
            return self._draft_chat(record, record.messages)
        except ModelError as error:
            raise DataError(record.place, f"the chat template refuses the row: {error.what}", error.remedy) from None
        except UnplacedError as error:
            raise DataError(record.place, str(error), "use another template (--template) or --trained all") from None

    def prepared(self, messages: Sequence[Message], tools: Tools) -> _Chat:
        """The conversation, ready to be rendered. Raises ModelError where the template refuses it."""
        mark, look_alike = "", first_look_alike([messages, tools], self._special)
        if look_alike:
            (messages, tools), mark = broken([messages, tools], self._special)
        accepted = _accepted(messages, tools, self._tokenizer)
        return _Chat(Renderings(self._tokenizer, accepted, tools), tools, self._special, mark, look_alike)

    def _draft_chat(self, record: Record, messages: Sequence[Message]) -> Draft:
        chat = self.prepared(messages, record.tools)
        text = chat.renderings.full
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant" and n >= record.prompt]
        wanted = {"assistant": turns, "last": turns[-1:], "all": []}[self._trained]
        spans = turn_spans(chat.renderings, wanted, self._special, self._stops)
        said = [
            span
            for turn, span in zip(wanted, spans, strict=True)
            if not _unsaid(messages[turn], text[span.start : span.end], self._special)
        ]
        written = chat.stretches(text)
        notes = [*text_notes("".join(stretch.text for stretch in written), chat.look_alike, self._tokenizer)]
        if any(_is_empty(messages[turn]) for turn in turns):
            notes.append(EMPTY)
        if not all(span.ended for span in said):
            notes.append(UNENDED)
        if _tools_unseen(chat, self._tokenizer):
            notes.append(UNSEEN_TOOLS)
        trained = None if self._trained == "all" else [chat.unmarked(span) for span in said]
        return Draft(written, partial(_rows, record, trained, self._ids, tuple(notes)))


def _rows(
    record: Record,
    spans: Sequence[tuple[int, int]] | None,
    special: frozenset[int],
    notes: tuple[str, ...],
    pieces: list[Piece],
) -> list[TokenRow]:
    """The one row of a conversation; spans: characters that are trained, None for all."""
    joined = Joined(pieces)
    flags = [True] * len(joined.ids) if spans is None else joined.within(spans, special)
    return [joined.row(record, flags, notes)]


def _tools_unseen(chat: _Chat, template: Template) -> bool:
    """Whether the row has tools or tool calls that change nothing in its rendering: the model would not see them."""
    said = chat.renderings.messages
    without: list[tuple[list[Message], Tools]] = [(said, None)] if chat.tools else []
    if any("tool_calls" in message for message in said):
        without.append(([{k: v for k, v in message.items() if k != "tool_calls"} for message in said], chat.tools))
    return any(_renders_as(chat.renderings.full, messages, tools, template) for messages, tools in without)


def _renders_as(full: str, messages: list[Message], tools: Tools, template: Template) -> bool:
    try:
        return Renderings(template, messages, tools).full == full
    except ModelError:
        return False  # a template that refuses the row without its tools reads them


def _accepted(messages: Sequence[Message], tools: Tools, template: Template) -> list[Message]:
    """Messages spelled as this template takes them. Turns of tool calls have no content and arguments as objects;
    some templates refuse one or the other, and get empty content or arguments in JSON text."""
    given = list(messages)
    if not any(message.get("tool_calls") for message in given):
        return given
    filled = [{"content": "", **message} for message in given]
    for spelled in (given, filled, _arguments_as_text(given), _arguments_as_text(filled)):
        try:
            Renderings(template, spelled, tools).first(len(spelled))
        except ModelError:
            continue
        return spelled
    return filled


def _arguments_as_text(messages: Sequence[Message]) -> list[Message]:
    def text(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [m | {"tool_calls": [text(call) for call in m["tool_calls"]]} if "tool_calls" in m else m for m in messages]


def _unsaid(message: Message, rendered: str, special: re.Pattern[str]) -> bool:
    """Whether a turn says something and the template wrote nothing of it: training it would teach silence."""
    return not _is_empty(message) and not special.sub("", rendered).strip()


def _is_empty(message: Message) -> bool:
    return not message.get("tool_calls") and not message["content"].strip()
