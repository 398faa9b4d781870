"""Records -> rows of token ids, with the tokens that are trained.

Two laws: text from the data never becomes a control token, and a row without such look-alikes has exactly the ids
of its rendering. To hold both, look-alikes ("<|im_end|>" typed by a user) are broken by a character that the row does
not hold before rendering, so that every special token left in the rendering is the template's own.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np

from lorafit.data.records import Record
from lorafit.data.spans import Renderings, Template, UnplacedError, absent, turn_spans
from lorafit.errors import DataError, ModelError

Message = dict[str, Any]
Trained = Literal["assistant", "all", "last"]

UNENDED = "the chat template has no end-of-turn token: the model cannot learn to stop"


class Encoded(Protocol):
    """Token ids and, for each, the characters [start, end) that it stands for."""

    @property
    def ids(self) -> list[int]: ...
    @property
    def offsets(self) -> list[tuple[int, int]]: ...


class Tokenizer(Template, Protocol):
    """What encoding needs of a tokenizer; formats/tokenizer.py has it."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def eos_token(self) -> str | None: ...
    @property
    def add_bos(self) -> bool: ...
    @property
    def special(self) -> dict[str, int]: ...
    def encode(self, text: str, parse_special: bool = True) -> Encoded: ...


@dataclass(frozen=True)
class TokenRow:
    """One row as the model sees it: L token ids, and which of them are trained (predicted in the loss)."""

    record: Record
    rendered: str
    """The row's text, special tokens included."""
    ids: array[int]
    trained: list[bool]
    ends: array[int]
    """For each token the position in `rendered` up to which the tokens so far reach."""
    cut: bool = False
    """Whether the end was left out (max_length)."""
    notes: tuple[str, ...] = ()
    """What the user should know about the row."""

    def texts(self) -> list[str]:
        """The tokens' texts; joined they are `rendered`. Of a character's several tokens the first has it."""
        return [self.rendered[start:end] for start, end in zip([0, *self.ends], self.ends, strict=False)]

    def shortened(self, length: int) -> TokenRow:
        """The first `length` tokens of the row, without anything in place of what is lost."""
        ids, ends = self.ids[:length], self.ends[:length]
        return replace(
            self, rendered=self.rendered[: ends[-1]], ids=ids, trained=self.trained[:length], ends=ends, cut=True
        )

    def content_hash(self) -> str:
        """SHA-256 (hex) of the rendered text; tells the rows of one document apart, as a record's hash cannot."""
        return hashlib.sha256(self.rendered.encode("utf-8")).hexdigest()


def encode_record(record: Record, tokenizer: Tokenizer, trained: Trained = "assistant") -> TokenRow:
    """The record as a token row, whole. trained: assistant turns, all tokens, or the last assistant turn; of text all.

    Raises DataError at the record's place where the chat template refuses it or does not write one of its turns.
    """
    if record.messages is None:
        return encode_document(record, tokenizer, sys.maxsize)[0]
    special = _pattern(tuple(tokenizer.special))
    try:
        return _encode_chat(record, record.messages, tokenizer, special, trained)
    except ModelError as error:
        raise DataError(record.place, f"the chat template refuses the row: {error.what}", error.remedy) from None
    except UnplacedError as error:
        raise DataError(record.place, str(error), "use another template (--template) or --trained all") from None


def tools_ignored(record: Record, tokenizer: Tokenizer) -> bool:
    """Whether the row has tools or tool calls that change nothing in its rendering: the model would not see them.

    Raises ModelError where the template refuses the row.
    """
    messages = _filled(record.messages or (), record.tools, tokenizer)
    bare = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
    changes: list[tuple[list[Message], Any]] = ([(messages, None)] if record.tools else []) + (
        [(bare, record.tools)] if bare != messages else []
    )
    full = Renderings(tokenizer, messages, record.tools).full if changes else ""
    return any(_renders_as(full, said, tools, tokenizer) for said, tools in changes)


def _renders_as(full: str, messages: list[Message], tools: Sequence[dict[str, Any]] | None, template: Template) -> bool:
    try:
        return Renderings(template, messages, tools).full == full
    except ModelError:
        return False  # a template that refuses the row without its tools reads them


def encode_document(record: Record, tokenizer: Tokenizer, length: int) -> list[TokenRow]:
    """A text record as consecutive rows of at most `length` tokens that lose none: BOS at the start of each, where
    the model wants one, EOS after the last."""
    text = record.text or ""
    tokens = _Tokens()
    tokens.add(text, tokenizer.encode(text, parse_special=False))
    tokens.add_special(tokenizer.eos_token, tokenizer.eos_id)
    found = _pattern(tuple(tokenizer.special)).search(text)
    whole = tokens.row(record, [True] * len(tokens.ids), (_stays_text(found.group()),) if found else ())
    bos = _Tokens()
    if tokenizer.add_bos:
        bos.add_special(tokenizer.bos_token, tokenizer.bos_id)
    step = length - len(bos.ids)
    return [_stretch(whole, first, first + step, bos) for first in range(0, max(len(whole.ids), 1), step)]


def _stretch(whole: TokenRow, first: int, last: int, bos: _Tokens) -> TokenRow:
    """Tokens [first, last) of a document after `bos`, all trained but the row's first."""
    begin = whole.ends[first - 1] if first else 0
    kept = whole.ends[first:last]
    ids = array("i", [*bos.ids, *whole.ids[first:last]])
    ends = array("i", [*(end for _, end in bos.offsets), *(end - begin + len(bos.text) for end in kept)])
    rendered = bos.text + whole.rendered[begin : kept[-1] if kept else begin]
    return replace(whole, rendered=rendered, ids=ids, ends=ends, trained=[place > 0 for place in range(len(ids))])


def _encode_chat(
    record: Record, messages: Sequence[Message], tokenizer: Tokenizer, special: re.Pattern[str], trained: Trained
) -> TokenRow:
    tools, mark, notes = record.tools, "", []
    look_alike = next((found for text in _strings([messages, tools]) if (found := special.search(text))), None)
    if look_alike:
        mark = next(absent(json.dumps([messages, tools], ensure_ascii=False)))
        notes.append(_stays_text(look_alike.group()))
        messages, tools = _each_string([messages, tools], lambda text: _broken(text, special, mark))
    renderings = Renderings(tokenizer, _filled(messages, tools, tokenizer), tools)
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant" and n >= record.prompt]
    if trained == "last":
        turns = turns[-1:]
    placed = zip(turns, turn_spans(renderings, turns, special), strict=True)
    spans = [
        span for turn, span in placed if not _unsaid(messages[turn], renderings.full[span.start : span.end], special)
    ]
    if any(_is_empty(messages[turn]) for turn in turns):
        notes.append("an answer is empty")
    if not all(span.ended for span in spans):
        notes.append(UNENDED)
    tokens = _Tokens()
    for piece, plain in _pieces(renderings.full, mark, special):
        tokens.add(piece, tokenizer.encode(piece, parse_special=not plain))
    if trained == "all":
        return tokens.row(record, [True] * len(tokens.ids), tuple(notes))
    unmarked = [[at - renderings.full.count(mark, 0, at) if mark else at for at in span[:2]] for span in spans]
    return tokens.row(record, tokens.within(unmarked, set(tokenizer.special.values())), tuple(notes))


class _Tokens:
    """Tokens in the making: pieces of text laid end to end."""

    def __init__(self) -> None:
        self.text = ""
        self.ids: list[int] = []
        self.offsets: list[tuple[int, int]] = []

    def add(self, text: str, encoded: Encoded) -> None:
        base = len(self.text)
        self.text += text
        self.ids += encoded.ids
        self.offsets += [(start + base, end + base) for start, end in encoded.offsets] if base else encoded.offsets

    def add_special(self, text: str | None, token: int | None) -> None:
        if token is not None:
            self.ids.append(token)
            self.offsets.append((len(self.text), len(self.text) + len(text or "")))
            self.text += text or ""

    def within(self, spans: Sequence[Sequence[int]], special: set[int]) -> list[bool]:
        """Which tokens lie in a span. A special token may take the white space after it along, past the span's end."""
        starts, ends = np.asarray(self.offsets, dtype=np.int64).reshape(-1, 2).T
        inside = np.zeros(len(self.ids), dtype=bool)
        for start, end in spans:
            began = (starts >= start) & (starts < end)
            inside |= began & (ends <= end)
            for token in np.flatnonzero(began & (ends > end)):
                inside[token] = self.ids[token] in special
        return inside.tolist()

    def row(self, record: Record, trained: list[bool], notes: tuple[str, ...]) -> TokenRow:
        ends = np.asarray(self.offsets, dtype=np.int32).reshape(-1, 2)[:, 1]
        ends = np.maximum.accumulate(ends)
        ends[-1:] = len(self.text)  # characters that no token stands for belong to the token after them, or the last
        trained[:1] = [False] * len(trained[:1])  # nothing predicts the first token
        return TokenRow(record, self.text, array("i", self.ids), trained, array("i", ends.tolist()), notes=notes)


@lru_cache(maxsize=4)
def _pattern(special: tuple[str, ...]) -> re.Pattern[str]:
    """Matches special tokens, the longest first; a token of one character cannot be broken and is left out."""
    tokens = sorted((token for token in special if len(token) > 1), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, tokens)) if tokens else r"(?!)")


def _stays_text(look_alike: str) -> str:
    return f"{look_alike!r} in the data looks like a special token and stays text"


def _broken(text: str, special: re.Pattern[str], mark: str) -> str:
    """`text` with `mark` after the first character of each look-alike, of overlapping ones too."""
    parts, at = [], 0
    while found := special.search(text, at):
        parts.append(text[at : found.start() + 1])
        at = found.start() + 1
    return mark.join([*parts, text[at:]])


def _pieces(text: str, mark: str, special: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
    """(piece, whether it is plain) for marked text: stretches between special tokens that hold a broken look-alike
    are plain and come without the marks; the rest goes together."""
    if not mark:
        yield text, False
        return
    begun = kept = 0  # text[begun:kept] is without marks so far
    bounds = [at for found in special.finditer(text) for at in found.span()]
    for start, end in zip([0, *bounds], [*bounds, len(text)], strict=True):
        if mark in text[start:end]:
            if begun < start:
                yield text[begun:start], False
            yield text[start:end].replace(mark, ""), True
            begun = end
        kept = end
    if begun < kept:
        yield text[begun:kept], False


def _filled(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, template: Template) -> list[Message]:
    """Messages whose content is null (they only call tools) as this template takes them: some templates tell tool
    calls by the null, others refuse it or would write "None", and get empty text."""

    def filled(content: str) -> list[Message]:
        return [{**m, "content": content} if m["content"] is None else m for m in messages]

    if all(message["content"] is not None for message in messages):
        return list(messages)
    try:
        given = Renderings(template, messages, tools).full
    except ModelError:
        return filled("")
    return filled("") if given == Renderings(template, filled("None"), tools).full else list(messages)


def _unsaid(message: Message, rendered: str, special: re.Pattern[str]) -> bool:
    """Whether a turn has tool calls and the template wrote nothing of it: training it would teach silence."""
    return bool(message.get("tool_calls")) and not special.sub("", rendered).strip()


def _is_empty(message: Message) -> bool:
    return not message.get("tool_calls") and not message["content"].strip()


def _strings(value: Any) -> Iterator[str]:
    """Every string in `value`, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _each_string(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of `value` with every string in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _each_string(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each_string(item, change) for item in value]
    return value
