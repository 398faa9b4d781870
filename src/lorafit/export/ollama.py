"""An Ollama Modelfile: base, adapter, chat template in Ollama's own language, and where an answer ends.

Ollama's templates are Go programs, ours are Jinja. What is translated is what most chat templates come down to: each
message stands between a beginning and an end that depend on its role alone. These are found by rendering, and the
translation is then held against the original on a set of conversations; a template that is more than this is not
translated, and the Modelfile says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorafit.errors import ModelError
from lorafit.formats.tokenizer import TextTokenizer

MARKS = {role: f"\u2983{role}\u2984" for role in ("system", "user", "assistant")}


@dataclass(frozen=True)
class Frames:
    """What stands around a message of each role; what opens an answer; what stands first without a system message."""

    around: dict[str, tuple[str, str]]
    prompt: str
    default: str

    def render(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        """A conversation as the translated template writes it."""
        parts = [] if messages[0]["role"] == "system" else [self.default]
        for message in messages:
            before, after = self.around[message["role"]]
            parts.append(before + message["content"] + after)
        return "".join(parts) + (self.prompt if prompt else "")

    def go(self) -> str:
        """The template in Ollama's language."""
        kinds: list[str] = []
        for role, (before, after) in self.around.items():
            test = "if" if not kinds else "else if"
            kinds.append(f'{{{{ {test} eq .Role "{role}" }}}}{_plain(before)}{{{{ .Content }}}}{_plain(after)}')
        default = f"{{{{ if not .System }}}}{_plain(self.default)}{{{{ end }}}}" if self.default else ""
        # an answer that Ollama has yet to hear has no message: the loop ends, and the prompt opens it
        return f"{default}{{{{ range .Messages }}}}{''.join(kinds)}{{{{ end }}}}{{{{ end }}}}{_plain(self.prompt)}"


def _plain(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def frames(tokenizer: TextTokenizer) -> Frames | None:
    """The template's frames; None where it is more than frames, or renders none of our conversations."""
    begins = tokenizer.bos_token if tokenizer.add_bos and tokenizer.bos_token else ""

    def render(messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return tokenizer.render(messages, add_generation_prompt=prompt).removeprefix(begins)

    def said(role: str, text: str = "") -> dict[str, Any]:
        return {"role": role, "content": text or MARKS[role]}

    try:
        whole = render([said("system"), said("user"), said("assistant"), said("user")])
        bare = render([said("user")])
        answered = render([said("user"), said("assistant")])
        opened = render([said("user")], prompt=True)
    except ModelError:
        return None
    pieces = _cut(whole, [MARKS[role] for role in ("system", "user", "assistant", "user")])
    if pieces is None or not opened.startswith(bare) or MARKS["user"] not in bare:
        return None
    head, after_system, after_user, after_assistant, tail = pieces
    after_answer = answered.partition(MARKS["assistant"])[2]
    if not after_user.startswith(tail) or not after_assistant.startswith(after_answer):
        return None
    before_user = after_assistant.removeprefix(after_answer)
    around = {
        "system": (head, after_system.removesuffix(before_user)),
        "user": (before_user, tail),
        "assistant": (after_user.removeprefix(tail), after_answer),
    }
    default = bare[: bare.index(MARKS["user"])].removesuffix(before_user)
    found = Frames(around, opened.removeprefix(bare), default)
    trials = [
        [said("user", "Hi {there}")],
        [said("user", "Hi"), said("assistant", "Hello."), said("user", "Who?"), said("assistant", "I.")],
        [said("system", "Be brief."), said("user", "Hi"), said("assistant", "Hello."), said("user", "Again")],
    ]
    try:
        same = all(render(m, p) == found.render(m, p) for m in trials for p in (False, True) if p or len(m) % 2 == 0)
    except ModelError:
        return None
    return found if same else None


def _cut(text: str, marks: list[str]) -> list[str] | None:
    """What stands before, between and after the marks, in their order; None if one is missing."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        pieces.append(before)
    return [*pieces, text]


def modelfile(tokenizer: TextTokenizer, base: str, adapter: str | None) -> tuple[str, bool]:
    """(the Modelfile's text, whether the chat template could be translated); base, adapter: paths as written there, the
    adapter None where it is merged into the base."""
    lines = [f"FROM {base}", *([f"ADAPTER {adapter}"] if adapter else [])]
    found = frames(tokenizer)
    if found is not None:
        lines.append(f'TEMPLATE """{found.go()}"""')
    else:
        lines.append("# The chat template is more than Ollama's language says simply: Ollama takes the base's own.")
    ends = sorted(token for token, number in tokenizer.special.items() if number in tokenizer.end_ids)
    lines += [f'PARAMETER stop "{token}"' for token in ends]
    return "\n".join(lines) + "\n", found is not None
