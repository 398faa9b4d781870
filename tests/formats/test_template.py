"""The laws of lorafit.formats.template: published templates render as in transformers, and refuse in one line."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from builders.templates import TEMPLATES
from lorafit.errors import ModelError
from lorafit.formats.template import MAX_SOURCE, PLAIN_TEMPLATE, ChatTemplate, TemplateRefusal

Message = dict[str, Any]
TOOLS: list[Message] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The "weather" in <a> city & its surroundings',
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "où"}}},
        },
    }
]


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CONVERSATIONS = {
    "one question": [user("Hi")],
    "three turns": [user(" Hi\n"), assistant("Hello <|im_end|>"), user("日本 <b>&'\"")],
    "a system prompt": [system("Be brief."), user("a"), assistant("b"), user("c"), assistant("d")],
    "reasoning in the text": [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c"), assistant("d")],
    "reasoning by an old name": [user("a"), assistant("b", thinking="hm")],
    "a tool": [user("w?"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": '{"t": 3}'}, assistant("3")],
    "content in parts": [user([{"type": "text", "text": "hi"}])],
    "two questions in a row": [user("a"), user("b")],
    "nothing": [],
}


def render(source: str, messages: list[Message] | None = None, **options: Any) -> str:
    return ChatTemplate(source, "model: chat template").render(messages or [], **options)


def outcome(function: Any, *args: Any, **options: Any) -> tuple[str, str]:
    """What rendering gives: the text, or the message it ends with."""
    try:
        return "text", function(*args, **options)
    except ModelError as error:
        return "refused", error.what
    except (TemplateError, TypeError, ValueError) as error:  # what transformers lets through
        return "refused", str(error)


@pytest.mark.parametrize("model", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_published_templates_render_as_in_transformers(model: str, conversation: str) -> None:
    """Text or refusal, with and without tools and generation prompt, is that of transformers."""
    messages, source = CONVERSATIONS[conversation], TEMPLATES[model]
    for tools in (None, TOOLS):
        for prompt in (False, True):
            options = {
                "tools": tools,
                "add_generation_prompt": prompt,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "enable_thinking": False,
            }
            kind, text = outcome(
                lambda options=options: render_jinja_template([messages], chat_template=source, **options)[0][0]
            )
            ours = outcome(render, source, messages, **options)
            assert ours[0] == kind
            assert ours[1] == text if kind == "text" else text in ours[1]


def test_a_template_refuses_messages_with_its_own_words() -> None:
    """`raise_exception` becomes a TemplateRefusal at the template's place, whose `what` is the template's message."""
    with pytest.raises(TemplateRefusal) as refusal:
        render(TEMPLATES["Mistral-7B-v0.1"], CONVERSATIONS["two questions in a row"])
    assert refusal.value.place == "model: chat template"
    assert refusal.value.what.startswith("Conversation roles must alternate")


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{% for %}",
        "{{ 'a' | nosuch }}",
        "{{ " + "(" * 9000 + " }}",
        "{{ " + "9" * 5000 + " }}",
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "x" * (MAX_SOURCE + 1),
    ],
)
def test_a_source_that_does_not_compile_is_one_line(source: str) -> None:
    """Bad syntax, unknown filters, too deep or too long a source are a ModelError when the template is made."""
    with pytest.raises(ModelError) as error:
        ChatTemplate(source, "model: chat template")
    assert "\n" not in str(error.value)


def test_the_date_can_be_given() -> None:
    """`strftime_now` prints the date of the call, which makes a rendering repeatable."""
    source = "{{ strftime_now('%d %B %Y') }}"
    assert render(source, today=datetime(2026, 11, 3)) == "03 November 2026"
    assert render(source) == datetime.now().strftime("%d %B %Y")


def test_the_plain_template_reads_as_documented() -> None:
    """Heads, contents, tools and calls of the plain template, an answer closed by the end-of-text token."""
    messages = [system("S"), user("U"), assistant("A", tool_calls=[{"name": "f"}, {"name": "g"}])]
    messages += [{"role": "tool", "content": {"t": 3}}, assistant(None, tool_calls=[{"name": "h"}]), user("V")]
    text = render(PLAIN_TEMPLATE, messages, tools=[{"name": "f"}], bos_token="<s>", eos_token="</s>")
    assert text == (
        '<s>### Tools:\n{"name": "f"}\n\n### System:\nS\n\n### User:\nU\n\n'
        '### Assistant:\nA\n{"name": "f"}\n{"name": "g"}</s>\n\n### Tool:\n{"t": 3}\n\n'
        '### Assistant:\n{"name": "h"}</s>\n\n### User:\nV\n\n'
    )


def test_the_plain_generation_prompt_ends_where_the_answer_begins() -> None:
    """What precedes a plain answer is the generation prompt, to the letter."""
    prompt = render(PLAIN_TEMPLATE, [user("U")], add_generation_prompt=True, eos_token="</s>")
    assert render(PLAIN_TEMPLATE, [user("U"), assistant("A")], eos_token="</s>") == prompt + "A</s>\n\n"
