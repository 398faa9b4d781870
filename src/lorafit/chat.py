"""`lorafit chat`: a conversation with the base, with an adapter, or with both beside each other.

Each side has a history of its own, as it would have alone. An answer appears as it is made; Ctrl-C ends it and keeps
what was said. A conversation that fills the context loses its oldest turns, and that is said.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lorafit import console
from lorafit.adapter.attach import enable_adapter
from lorafit.config import TrainConfig
from lorafit.data.chat import encode_prompt
from lorafit.errors import ConfigError, ModelError
from lorafit.model.generate import tokens
from lorafit.model.load import Base
from lorafit.use import check_temperature, check_text, learn_tokens, open_base, put_on, say_template, templated

Message = dict[str, Any]
HELP = "/clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C ends an answer"


@dataclass
class Side:
    """One voice of the chat: the base or the adapter, and the conversation that it has had."""

    name: str
    adapted: bool
    said: list[Message] = field(default_factory=list)


@dataclass(frozen=True)
class Talk:
    """The model and how it answers."""

    base: Base
    system: tuple[Message, ...]
    max_tokens: int
    temperature: float
    seed: int

    @property
    def context(self) -> int:
        """Tokens that the model was made for."""
        return int(self.base.model.config.max_position_embeddings)

    def prompt(self, said: list[Message]) -> tuple[list[int], list[Message]]:
        """Token ids after which the answer follows, and the messages that they hold: the oldest are left out until
        an answer has room. Raises ConfigError where the last message alone is too long, ModelError where the chat
        template refuses the conversation."""
        room = min(self.max_tokens, self.context // 4)
        kept = list(said)
        while True:
            ids = encode_prompt([*self.system, *kept], None, self.base.tokenizer)
            if len(ids) + room <= self.context:
                return ids, kept
            if len(kept) == 1:
                what = f"has {len(ids)} tokens with its template, and the model's context is {self.context}"
                raise ConfigError("the message", f"{what}, {room} of them for an answer", "shorten it")
            kept = kept[2:]  # a question and its answer

    def pieces(self, prompt: list[int], turn: int) -> Iterator[str]:
        """The answer's text as it grows, a piece for each token; half a character waits for its other half, and is
        nothing until then. turn: numbers the draws."""
        model, tokenizer = self.base.model, self.base.tokenizer
        ids: list[int] = []
        shown = ""
        for token in tokens(
            model,
            prompt,
            max_tokens=self.max_tokens,
            end_ids=tokenizer.end_ids,
            temperature=self.temperature,
            seed=self.seed + turn,
        ):
            ids.append(token)
            text = tokenizer.decode(ids, skip_special=True)
            whole = shown if text.endswith("\ufffd") else text
            yield whole[len(shown) :]
            shown = whole
        yield tokenizer.decode(ids, skip_special=True)[len(shown) :]


def chat(
    config: TrainConfig,
    *,
    adapter: str | None,
    compare: bool,
    system: str | None,
    max_tokens: int,
    temperature: float,
) -> None:
    """Answer line after line of standard input until it ends."""
    if compare and adapter is None:
        raise ConfigError("--compare", "needs an adapter to compare the base with", "give --adapter DIR")
    check_temperature(temperature)
    check_text("--system", system)
    base = open_base(templated(config, adapter))
    if adapter:
        learn_tokens(base, adapter)
    say_template(base.tokenizer)
    for note in put_on(base.model, config.model, adapter) if adapter else []:
        console.say(note)
    sides = [Side("base", False)] if compare or adapter is None else []
    sides += [Side("adapter", True)] if adapter else []
    first = ({"role": "system", "content": system},) if system is not None else ()
    talk = Talk(base, first, max_tokens, temperature, config.seed)
    try:
        talk.prompt([{"role": "user", "content": "Hi"}])
    except ModelError as error:  # many templates know no system message
        option = "--system" if system is not None else "the chat template"
        raise ConfigError(option, f"the chat template refuses it: {error.what}", "leave it out") from None
    console.say(HELP)
    for turn, line in enumerate(console.lines("> ")):
        if line == "/exit":
            return
        if line == "/clear":
            for side in sides:
                side.said.clear()
            console.say("the conversation begins anew")
        elif line.startswith("/"):
            console.say(HELP)
        else:
            for side in sides:
                _answer(talk, side, line, turn, named=len(sides) > 1)


def _answer(talk: Talk, side: Side, line: str, turn: int, named: bool) -> None:
    """One side's answer, shown as it grows; a message that cannot be answered is not part of the conversation."""
    try:
        ids, kept = talk.prompt([*side.said, {"role": "user", "content": line}])
    except (ConfigError, ModelError) as error:
        return console.warn(str(error))
    left_out = len(side.said) + 1 - len(kept)
    if left_out:
        console.say(f"the context of {talk.context} tokens is full: the oldest {left_out} messages are left out")
    enable_adapter(talk.base.model, side.adapted)
    if named:
        console.piece(f"{side.name}: ")
    answer = ""
    with _stoppable() as stop:
        for piece in talk.pieces(ids, turn):
            answer += piece
            console.piece(piece)
            if stop.is_set():
                break
    console.piece("\n")
    if stop.is_set():
        console.say("(stopped)")
    side.said[:] = [*kept, {"role": "assistant", "content": answer}]
    return None


@contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """SIGINT asks for the end of the answer instead of raising in the middle of a product."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
