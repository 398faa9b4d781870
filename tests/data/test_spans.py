"""Turns are found by rendering, whatever the template does to the conversation."""

from __future__ import annotations

import pytest

from builders.chats import STYLES, assistant, call, chat, style_tokenizer, template_tokenizer, trained_texts, user
from lorafit.data.chat import UNENDED, encode_record
from lorafit.errors import DataError

TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {}}},)
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = ("<|im_start|>", "<|im_end|>")


def test_thinking_that_the_template_drops_is_not_trained():
    """Qwen 3's template strips the thinking of earlier answers; of the last one it is trained."""
    thought = "<think>\nhm\n</think>\n\n"
    row = encode_record(
        chat(user("a"), assistant(thought + "one"), user("b"), assistant(thought + "two")), style_tokenizer("qwen3")
    )
    assert trained_texts(row) == ["one<|im_end|>", thought + "two<|im_end|>"]


def test_what_the_generation_prompt_says_is_not_trained():
    """Words of the template that stand in the prompt when an answer is generated are not the answer's."""
    row = encode_record(chat(user("a"), assistant("<think>\nhm\n</think>\none")), style_tokenizer("opened"))
    assert trained_texts(row) == ["hm\n</think>\none<|end|>"]
    row = encode_record(chat(user("a"), assistant("<b>one</b>")), style_tokenizer("opened"))
    assert trained_texts(row) == ["<b>one</b><|end|>"], "an answer may begin like the prompt's last words"


def test_a_template_that_writes_bos_twice_has_it_once():
    """Two beginnings of text never stand in a row."""
    tokenizer = template_tokenizer(
        "{{ bos_token }}{{ bos_token }}" + STYLES["chatml"].template, ("<s>", "<|im_start|>", "<|im_end|>"), "<s>"
    )
    row = encode_record(chat(user("a"), assistant("b")), tokenizer)
    assert list(row.ids).count(tokenizer.bos_id) == 1
    assert trained_texts(row) == ["b<|im_end|>"]


def test_a_final_token_of_the_whole_conversation_does_not_hide_the_end_of_turns():
    """Where the template ends only the conversation with EOS, earlier turns still end with their own token."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<eos>{% endif %}"
    )
    tokenizer = template_tokenizer(template, ("<|im_start|>", "<|im_end|>", "<eos>"))
    row = encode_record(chat(user("a"), assistant("one"), user("b"), assistant("two")), tokenizer)
    assert trained_texts(row) == ["one<|im_end|>", "two<|im_end|>\n<eos>"]


def test_the_next_turn_s_header_is_no_end_token():
    """A template that rewrites turns and ends none: the special token that follows belongs to the next turn."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ '!' if loop.last }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = template_tokenizer(template, ("<|user|>", "<|assistant|>"))
    row = encode_record(chat(user("a"), assistant("one"), user("b"), assistant("two")), tokenizer)
    assert trained_texts(row) == ["one", "two"]
    assert UNENDED in row.notes


def test_a_turn_that_the_template_does_not_write_is_an_error():
    """An answer that is not in the rendering cannot be trained: error at the row's place."""
    tokenizer = template_tokenizer(
        "{% for m in messages if m.role == 'user' %}{{ m.content }}<e>{% endfor %}{{ messages | length }}", ("<e>",)
    )
    with pytest.raises(DataError, match=r"^f.jsonl:9: .*does not write messages\[1\]"):
        encode_record(chat(user("a"), assistant("b"), user("c"), place="f.jsonl:9"), tokenizer)


def test_a_template_that_moves_the_tools_along_is_read_turn_by_turn():
    """Mistral's tools stand before the last question: no earlier rendering begins a later one."""
    turns = [user("q"), call("weather", city="Bern"), {"role": "tool", "content": "sun"}, assistant("one")]
    row = encode_record(chat(*turns, user("and?"), assistant("two"), tools=TOOLS), style_tokenizer("mistral"))
    assert trained_texts(row) == [" <call>weather city=Bern</call></s>", " one</s>", " two</s>"]


@pytest.mark.parametrize("least", [2, 3, 4])
def test_a_template_that_refuses_parts_of_a_conversation_is_asked_for_the_whole(least):
    """Where conversations of fewer messages are refused, only whole ones are rendered, and the spans are the same."""
    refuses = "{% if messages | length < " + str(least) + " %}{{ messages.nothing.here }}{% endif %}"
    tokenizer = template_tokenizer(refuses + TURNS + PROMPT, CHATML)
    row = encode_record(chat(user("a"), assistant("one"), user("b"), assistant("two")), tokenizer)
    assert trained_texts(row) == ["one<|im_end|>", "two<|im_end|>"]


def test_a_conversation_may_begin_with_an_answer():
    """A first message of the assistant is trained like any other."""
    tokenizer = template_tokenizer("{{ messages[0].role[:0] }}" + TURNS + PROMPT, CHATML)
    assert trained_texts(encode_record(chat(assistant("hi"), user("a")), tokenizer)) == ["hi<|im_end|>"]


def test_the_last_answer_may_end_otherwise_than_those_before_it():
    """gpt-oss ends the conversation with <|return|> and other answers with <|end|>; all begin after the prompt."""
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>"
        "{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    tokenizer = template_tokenizer(template, ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"))
    tokenizer.end_ids = frozenset({tokenizer.special["<|end|>"], tokenizer.special["<|return|>"]})
    row = encode_record(chat(user("a"), assistant("one"), user("b"), assistant("two")), tokenizer)
    wanted = "<|channel|>final<|message|>"
    assert trained_texts(row) == [wanted + "one<|end|>", wanted + "two<|return|>"]
    assert row.notes == ()


def test_a_stop_that_is_the_next_turn_s_header_is_trained():
    """GLM's answers end where <|user|> begins: where that token ends a generation, it is the answer's end."""
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    tokenizer = template_tokenizer(template, ("<|user|>", "<|assistant|>"))
    tokenizer.end_ids = frozenset({tokenizer.special["<|user|>"]})
    row = encode_record(chat(user("a"), assistant("one"), user("b"), assistant("two")), tokenizer)
    assert trained_texts(row) == ["one<|user|>", "two"]
    assert row.notes == (UNENDED,)
