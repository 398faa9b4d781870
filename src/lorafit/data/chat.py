"""Records -> token rows: the chat template writes the row, the assistant's words in it are trained.

A row has exactly the ids of its rendering; only rows with look-alikes of special tokens are encoded in stretches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorafit.data.document import STAYS_TEXT, encode_document
from lorafit.data.lookalikes import broken, first_look_alike, special_pattern, stretches
from lorafit.data.records import Record
from lorafit.data.spans import Renderings, Span, Template, UnplacedError, turn_spans
from lorafit.data.tokens import Pieces, Tokenizer, TokenRow
from lorafit.errors import DataError, ModelError

Message = dict[str, Any]
Tools = Sequence[dict[str, Any]] | None
Trained = Literal["assistant", "all", "last"]

UNENDED = "the chat template has no end-of-turn token: the model cannot learn to stop"
EMPTY = "an answer is empty"


def encode_record(record: Record, tokenizer: Tokenizer, trained: Trained = "assistant") -> TokenRow:
    """The record as a token row, whole. trained: assistant turns, all tokens, or the last assistant turn; of text all.

    Raises DataError at the record's place where the chat template refuses it or does not write one of its turns.
    """
    if record.messages is None:
        return encode_document(record, tokenizer)[0]
    try:
        return _encode_chat(record, record.messages, tokenizer, trained)
    except ModelError as error:
        raise DataError(record.place, f"the chat template refuses the row: {error.what}", error.remedy) from None
    except UnplacedError as error:
        raise DataError(record.place, str(error), "use another template (--template) or --trained all") from None


def encode_prompt(messages: Sequence[Message], tools: Tools, tokenizer: Tokenizer) -> list[int]:
    """The ids of a conversation with the generation prompt: what an answer is generated after, as in training.

    Raises ModelError where the chat template refuses the messages.
    """
    chat = _prepared(messages, tools, tokenizer)
    text = chat.renderings.first(len(messages), prompt=True)
    return chat.encoded(text, tokenizer).ids


def tools_ignored(record: Record, tokenizer: Tokenizer) -> bool:
    """Whether the row has tools or tool calls that change nothing in its rendering: the model would not see them.

    Raises ModelError where the template refuses the row.
    """
    messages = _accepted(record.messages or (), record.tools, tokenizer)
    silent = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
    without: list[tuple[list[Message], Tools]] = []
    if record.tools:
        without.append((messages, None))
    if silent != messages:
        without.append((silent, record.tools))
    full = Renderings(tokenizer, messages, record.tools).full if without else ""
    return any(_renders_as(full, said, tools, tokenizer) for said, tools in without)


def _renders_as(full: str, messages: list[Message], tools: Tools, template: Template) -> bool:
    try:
        return Renderings(template, messages, tools).full == full
    except ModelError:
        return False  # a template that refuses the row without its tools reads them


@dataclass(frozen=True)
class _Chat:
    """A conversation whose look-alikes of special tokens are broken by `mark`; look_alike: the first, if any."""

    renderings: Renderings
    special: re.Pattern[str]
    mark: str
    look_alike: str | None

    def encoded(self, text: str, tokenizer: Tokenizer) -> Pieces:
        """A rendering's tokens, without the marks."""
        pieces = Pieces()
        for stretch, plain in stretches(text, self.mark, self.special) if self.mark else [(text, False)]:
            pieces.add(stretch, tokenizer.encode(stretch, parse_special=not plain))
        return pieces

    def unmarked(self, span: Span) -> tuple[int, int]:
        """Where the span stands once the marks are gone."""
        start, end = (at - (self.renderings.full.count(self.mark, 0, at) if self.mark else 0) for at in span[:2])
        return start, end


def _prepared(messages: Sequence[Message], tools: Tools, tokenizer: Tokenizer) -> _Chat:
    special, mark = special_pattern(tokenizer.special), ""
    look_alike = first_look_alike([messages, tools], special)
    if look_alike:
        (messages, tools), mark = broken([messages, tools], special)
    return _Chat(Renderings(tokenizer, _accepted(messages, tools, tokenizer), tools), special, mark, look_alike)


def _encode_chat(record: Record, messages: Sequence[Message], tokenizer: Tokenizer, trained: Trained) -> TokenRow:
    chat = _prepared(messages, record.tools, tokenizer)
    text = chat.renderings.full
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant" and n >= record.prompt]
    wanted = {"assistant": turns, "last": turns[-1:], "all": []}[trained]
    stops = {token for token, number in tokenizer.special.items() if number in tokenizer.end_ids}
    placed = zip(wanted, turn_spans(chat.renderings, wanted, chat.special, stops), strict=True)
    spans = [span for turn, span in placed if not _unsaid(messages[turn], text[span.start : span.end], chat.special)]
    notes = [STAYS_TEXT.format(chat.look_alike)] if chat.look_alike else []
    if any(_is_empty(messages[turn]) for turn in turns):
        notes.append(EMPTY)
    if not all(span.ended for span in spans):
        notes.append(UNENDED)
    pieces = chat.encoded(text, tokenizer)
    if trained == "all":
        return pieces.row(record, [True] * len(pieces.ids), tuple(notes))
    flags = pieces.within([chat.unmarked(span) for span in spans], set(tokenizer.special.values()))
    return pieces.row(record, flags, tuple(notes))


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
