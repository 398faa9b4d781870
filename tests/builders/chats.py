"""Chat templates in the styles of published models, each with the tokenizer whose special tokens it writes.

They are written for the tests, short, and differ in what makes finding the assistant's words hard: default system
prompts, white space after the end token, BOS in the template, other role names, earlier turns rewritten, no end token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from builders.tokenizers_tiny import CHAT_TEMPLATE, tiny_backend
from lorafit.data.records import Record
from lorafit.data.tokens import TokenRow
from lorafit.formats.tokenizer import TextTokenizer

CALLS = (
    "{% for call in message.tool_calls %}<call>{{ call.function.name }}"
    "{% for key in call.function.arguments %} {{ key }}={{ call.function.arguments[key] }}{% endfor %}"
    "</call>{% endfor %}"
)


@dataclass(frozen=True)
class Style:
    """A template: `said` is how it writes an answer's words between header and end token."""

    template: str
    special: tuple[str, ...]
    bos: str | None
    end: str
    lead: str = ""
    system: bool = True
    tools: bool = True
    alternates: bool = False


STYLES = {
    "chatml": Style(
        CHAT_TEMPLATE, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_start|>", "<|im_end|>", tools=False
    ),
    "llama3": Style(
        "{{ bos_token }}{% for message in messages %}"
        "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
        "{% if message.tool_calls %}" + CALLS + "{% else %}{{ message.content | trim }}{% endif %}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "gemma": Style(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].nothing.here }}{% endif %}"
        "{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
        "{{ message.content | trim }}{% if message.tool_calls %}" + CALLS + "{% endif %}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<end_of_turn>",
        system=False,
    ),
    # Tools stand before the last user message, so earlier renderings are no beginnings of later ones.
    "mistral": Style(
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
        "{% if tools and (messages[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list | length) == 0 %}"
        "[TOOLS]{% for tool in tools %}{{ tool.function.name }};{% endfor %}[/TOOLS]{% endif %}"
        "[INST] {{ message.content }}[/INST]{% elif message.role == 'tool' %}[RESULT] {{ message.content }}[/RESULT]"
        "{% elif message.role == 'assistant' %} {{ message.content }}" + CALLS + "</s>{% else %}"
        "[SYS] {{ message.content }}[/SYS]{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOLS]", "[/TOOLS]", "[RESULT]", "[/RESULT]", "[SYS]", "[/SYS]"),
        "<s>",
        "</s>",
        lead=" ",
    ),
    # Thinking is dropped from all answers but the last, which has a block for it in any case.
    "qwen3": Style(
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% set text = message.content or '' %}"
        "{% if message.role == 'assistant' %}{% set words = text.split('</think>')[-1].lstrip('\n') %}"
        "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in text else '' %}"
        "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ words }}"
        + CALLS
        + "{% else %}{{ text }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None,
        "<|im_end|>",
    ),
    # The generation prompt opens a block that answers without thinking do not have.
    "opened": Style(
        "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}" + CALLS + "<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>"),
        None,
        "<|end|>",
    ),
    # Writes a header that the generation prompt, which is empty, does not announce.
    "unprompted": Style(
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        + CALLS
        + "<|im_end|>\n{% endfor %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None,
        "<|im_end|>",
    ),
    "bare": Style(
        "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}"
        + CALLS
        + "\n\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        ("<|endoftext|>",),
        None,
        "",
        lead=" ",
    ),
}


def style_tokenizer(name: str) -> TextTokenizer:
    """The tiny tokenizer with the style's special tokens, numbered after its own."""
    return template_tokenizer(STYLES[name].template, STYLES[name].special, STYLES[name].bos, STYLES[name].end or None)


def template_tokenizer(
    template: str, special: tuple[str, ...], bos: str | None = None, end: str | None = None, add_bos: bool = False
) -> TextTokenizer:
    """The tiny tokenizer with these special tokens and this template."""
    backend = tiny_backend()
    backend.add_special_tokens(list(special))
    numbers = {token: backend.token_to_id(token) for token in special}
    return TextTokenizer(
        backend=backend,
        chat_template=template,
        bos_token=bos,
        bos_id=numbers.get(bos or ""),
        eos_token=end,
        eos_id=numbers.get(end or ""),
        add_bos=add_bos,
        special=numbers,
        end_ids=frozenset({numbers[end]} if end else ()),
        place="style",
    )


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """An assistant's turn that only calls a tool, as records have it."""
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def chat(
    *messages: dict[str, Any], tools: tuple[dict[str, Any], ...] | None = None, place: str = "train.jsonl:1"
) -> Record:
    return Record(place, 1, "chat", messages, tools, None, {})


def text_record(text: str, kind: str = "text", place: str = "train.jsonl:1") -> Record:
    return Record(place, 1, kind, None, None, text, {"text": text})


def trained_texts(row: TokenRow) -> list[str]:
    """The text of each run of trained tokens."""
    runs, before = [], False
    for text, trained in zip(row.texts(), row.trained, strict=True):
        if trained:
            runs[len(runs) - 1 :] = [runs[-1] + text] if before else [*runs[-1:], text]
        before = trained
    return runs
