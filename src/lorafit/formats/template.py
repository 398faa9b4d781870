from __future__ import annotations

from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorafit.errors import ModelError


class TemplateRefusal(ModelError):
    """The template itself refused the messages (`raise_exception`); `what` is its message."""


PLAIN_TEMPLATE = (
    "{% for m in messages %}### {{ m['role'] | capitalize }}:\n{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)


class ChatTemplate:
    def __init__(self, source: str, place: str) -> None:
        self._t = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)

    def render(self, messages: list, **extra: Any) -> str:
        return self._t.render(messages=messages, **extra)
