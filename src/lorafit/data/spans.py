"""Where the assistant's words stand in a rendered conversation, found by rendering it with and without them.

Marker strings are never searched for. Most templates only ever append, so a turn is what its message adds:

    render(messages before it, with the generation prompt)   ...<|im_start|>assistant\\n
    render(messages up to it)                                ...<|im_start|>assistant\\nHello.<|im_end|>\\n

Templates that rewrite earlier turns (Qwen 3 drops their thinking) are asked with the turn's content replaced by a
probe, characters that stand nowhere else: where the two renderings differ are the turn's words.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from typing import Any, NamedTuple, Protocol

from lorafit.data.lookalikes import absent
from lorafit.errors import ModelError

Messages = Sequence[dict[str, Any]]


class Template(Protocol):
    """What rendering needs of a tokenizer."""

    @property
    def bos_token(self) -> str | None: ...
    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str: ...


class Span(NamedTuple):
    """Characters [start, end) of a rendering; ended: the last of them are an end-of-turn token."""

    start: int
    end: int
    ended: bool


class UnplacedError(ValueError):
    """A turn that cannot be found in the rendering."""


class Renderings:
    """A conversation rendered whole and in part, each part once. Raises ModelError where the template refuses."""

    def __init__(self, template: Template, messages: Messages, tools: Sequence[dict[str, Any]] | None) -> None:
        self.messages = list(messages)
        self._template, self._tools = template, list(tools) if tools else None
        self._known: dict[tuple[int, bool], str] = {}

    @property
    def full(self) -> str:
        """All messages, without a generation prompt."""
        return self.first(len(self.messages))

    def first(self, count: int, prompt: bool = False) -> str:
        """The first `count` messages, with the generation prompt if asked for."""
        if (count, prompt) not in self._known:
            self._known[count, prompt] = self.of(self.messages[:count], prompt)
        return self._known[count, prompt]

    def of(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        """`messages` rendered; a template that writes BOS twice has it once."""
        text = self._template.render(messages, tools=self._tools, add_generation_prompt=prompt)
        bos = self._template.bos_token
        while bos and text.startswith(bos + bos):
            text = text.removeprefix(bos)
        return text


def turn_spans(
    renderings: Renderings, turns: Sequence[int], special: re.Pattern[str], stops: Container[str]
) -> list[Span]:
    """The span of each assistant message of `turns` (indices, ascending) in `renderings.full`.

    A span begins where the model begins to write and ends with the end-of-turn token; where the turn has none, with
    the last character that is not white space. special: matches special tokens; stops: those that end a generation.
    Raises UnplacedError.
    """
    spans: list[Span] = []
    for turn in turns:
        start, words_end, limit = _appended(renderings, turn) or _probed(renderings, turn, special)
        if spans and start < spans[-1].end:
            raise UnplacedError(f"messages[{turn}] cannot be told from the turn before it")
        spans.append(_closed(renderings.full, start, words_end, limit, special, stops))
    return spans


def _closed(text: str, start: int, words_end: int, limit: int, special: re.Pattern[str], stops: Container[str]) -> Span:
    """The span from `start` through the last special token before `limit`, unless words follow that token.

    Where there is none, a stop right after the words is theirs: gpt-oss ends the last answer with another token than
    those before it, and GLM stops at the next turn's header.
    """
    found = list(special.finditer(text, start, limit))
    if found and not text[found[-1].end() : words_end].strip():
        return Span(start, found[-1].end(), True)
    stop = special.search(text, words_end)
    if stop and stop.group() in stops and not text[words_end : stop.start()].strip():
        return Span(start, stop.end(), True)
    return Span(start, start + len(text[start:words_end].rstrip()), False)


def _appended(renderings: Renderings, turn: int) -> tuple[int, int, int] | None:
    """(start, end, end) of a turn that the template appends to what was before it; None where it does not."""
    full = renderings.full
    try:
        before, after = renderings.first(turn, prompt=True), renderings.first(turn + 1)
        if not full.startswith(after) or not full.startswith(bare := renderings.first(turn)):
            return None
    except ModelError:
        return None
    if after.startswith(before) and before != bare:
        return len(before), len(after), len(after)
    # The generation prompt says more than the turn begins with ("<think>"), or nothing: then the turn may begin with
    # a header, which is not the assistant's.
    words = _words(renderings, turn)
    start = len(before) if before == bare else _common(full, before)
    if words is not None:
        header = before == bare and full[start : words[0]].strip()
        start = words[0] if header else min(start, words[0])
    return start, len(after), len(after)


def _probed(renderings: Renderings, turn: int, special: re.Pattern[str]) -> tuple[int, int, int]:
    """(start, end of the words, limit of the end-of-turn token) of a turn of a template that rewrites turns."""
    words = _words(renderings, turn, special)
    if words is None:
        raise UnplacedError(f"the chat template does not write messages[{turn}] as it stands")
    full, (start, end) = renderings.full, words
    probe = _probe(full)
    try:
        before = renderings.first(turn, prompt=True)
        if before != renderings.first(turn) and full.startswith(before):
            start = min(start, len(before))
        # What follows the words when the turn is the last is its end, as far as it also follows them here.
        closing = renderings.of([*renderings.messages[:turn], _turn(probe)]).partition(probe)[2]
        return start, end, end + _common(full[end:], closing)
    except ModelError:
        found = special.search(full, end)
        return start, end, found.end() if found and not full[end : found.start()].strip() else end


def _words(renderings: Renderings, turn: int, special: re.Pattern[str] | None = None) -> tuple[int, int] | None:
    """Where the rendering changes when the turn's content does, with spaces before it, which belong to the first word.

    None where the turn cannot be rendered with other content, or where special tokens change along with it.
    """
    messages, full = renderings.messages, renderings.full
    probe = _probe(full)
    try:
        probed = renderings.of([*messages[:turn], _turn(probe), *messages[turn + 1 :]])
    except ModelError:
        return None
    start = _common(full, probed)
    tail = _common(full[start:][::-1], probed[start:][::-1])
    head, found, rest = probed[start : len(probed) - tail].partition(probe)
    if not found or (special is not None and (special.search(head) or len(special.findall(rest)) > 1)):
        return None
    end = len(full) - tail
    while start > 0 and full[start - 1] == " ":
        start -= 1
    return start, end


def _probe(text: str) -> str:
    characters = absent(text)
    return next(characters) + next(characters) + next(characters)


def _turn(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def _common(a: str, b: str) -> int:
    """Length of the longest common beginning, by halving."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
