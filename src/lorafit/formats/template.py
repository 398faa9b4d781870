"""Chat templates: a conversation becomes text by the Jinja program that came with the model.

The program is data from a stranger, so it runs in a sandbox on a budget (sandbox.py); one that asks for too much is
refused in one line. What a template sees and what it renders equal transformers'
`apply_chat_template(tokenize=False)`. A model without a template has `PLAIN_TEMPLATE`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from jinja2 import Template

from lorafit.errors import ModelError
from lorafit.formats.sandbox import FAULTS, Raised, Sandbox, TooMuch

MAX_SOURCE = 100_000  # characters of a template; the longest published ones have a third

PLAIN_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}{{ '### Tools:\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}{{ '\n' }}{% endif %}
{%- for message in messages %}
    {{- '### ' + message.role | capitalize + ':\n' }}
    {%- if message.content is string %}{{ message.content }}
    {%- elif message.content %}{{ message.content | tojson }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\n' if message.content or not loop.first }}{{ call | tojson }}
    {%- endfor %}
    {%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}
    {{- '\n\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"""
"""For models without a chat template; one message reads

    ### User:
    the content

with an empty line after it. Tools stand first, one JSON object per line; tool calls follow the content, one per line;
content that is not text is written as JSON. An answer ends with the end-of-text token, and the generation prompt ends
right where an answer begins.
"""

_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateRefusal(ModelError):
    """The template itself refused these messages with `raise_exception`; `what` is its message."""


class ChatTemplate:
    """A compiled chat template.

    source: Jinja. place: file and key, for errors. Raises ModelError when the source does not compile or is longer than
    `MAX_SOURCE`. Not for several threads at once.
    """

    def __init__(self, source: str, place: str) -> None:
        self.place = place
        self._sandbox = Sandbox()
        if len(source) > MAX_SOURCE:
            raise self._error(f"has {len(source):,} characters, more than {MAX_SOURCE:,}")
        try:
            self._template: Template = self._sandbox.metered(source)
        except (*FAULTS, SyntaxError, TooMuch) as error:
            line = getattr(error, "lineno", None)
            raise self._error(f"does not compile: {error}" + (f" (line {line})" if line else "")) from error

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        bos_token: str | None = None,
        eos_token: str | None = None,
        today: datetime | None = None,
        **extra: Any,
    ) -> str:
        """The conversation as text.

        messages, tools: plain JSON values. add_generation_prompt: end where an assistant's answer begins. A token that
        is None is not defined in the template. today: the date for templates that print one (`strftime_now`); None is
        the present, as in transformers, and makes such renderings differ from day to day: pass a fixed date to repeat a
        run. extra: more variables. Raises TemplateRefusal with the template's own message where it calls
        `raise_exception`, ModelError where it fails or asks for too much.
        """
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        variables = extra | {name: token for name, token in tokens.items() if token is not None}
        self._sandbox.begin(today)
        try:
            return self._template.render(
                messages=[_with_reasoning(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except Raised as error:
            raise TemplateRefusal(self.place, str(error)) from error
        except TooMuch as error:
            raise self._error(f"asks for too much: {error}") from error
        except FAULTS as error:
            raise self._error(f"fails: {type(error).__name__}: {error!s:.300}") from error

    def _error(self, what: str) -> ModelError:
        return ModelError(self.place, what, "give another one with --template")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Templates know a message's reasoning by different names; as in transformers, it goes by all of them."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
