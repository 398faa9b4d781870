"""The assistant's words are trained, with their end token, and nothing else."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken

from builders.chats import STYLES, assistant, call, chat, style_tokenizer, template_tokenizer, user
from builders.tokenizers_tiny import tiny_tokenizer
from lorafit.data.chat import EMPTY, UNENDED, encode_prompt, encode_record, tools_ignored
from lorafit.data.tokens import TokenRow
from lorafit.errors import DataError

ALPHABET = [
    "the",
    "answer",
    "is",
    "42",
    "SELECT",
    "name",
    "é",
    "日本語",
    "🙂",
    "🏳️\u200d🌈",
    "{",
    "}",
    "<",
    ">",
    "|",
    "[",
    "]",
    "\n\n",
    ".",
    "?",
]
TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {}}},)


def trained_texts(row: TokenRow) -> list[str]:
    """The text of each run of trained tokens."""
    runs, before = [], False
    for text, trained in zip(row.texts(), row.trained, strict=True):
        if trained:
            runs[len(runs) - 1 :] = [runs[-1] + text] if before else [*runs[-1:], text]
        before = trained
    return runs


def expected(name: str, *answers: str) -> list[str]:
    """What must be trained of these answers: the words as the style writes them, and its end token."""
    style = STYLES[name]
    return [style.lead + answer + style.end for answer in answers]


def words(source: random.Random, special: tuple[str, ...] = ()) -> str:
    """Random words, sometimes with special tokens among them; no white space at the ends."""
    pool = ALPHABET + list(special)
    return "x" + " ".join(source.choice(pool) for _ in range(source.randrange(12))) + "y"


@pytest.mark.parametrize("name", STYLES)
def test_every_answer_and_its_end_token_are_trained_and_nothing_else(name):
    """In a conversation of several turns, exactly the assistant's words and end-of-turn tokens are trained."""
    tokenizer = style_tokenizer(name)
    answers = ["It is four.", "Sure: 42\n\nand more.", "日本 🙂 done"]
    turns = [turn for answer in answers for turn in (user("What is 2 + 2?"), assistant(answer))]
    system = [{"role": "system", "content": "Be brief."}] if STYLES[name].system else []
    row = encode_record(chat(*system, *turns), tokenizer)
    wanted = expected(name, *answers)
    if name == "qwen3":
        wanted[-1] = "<think>\n\n</think>\n\n" + wanted[-1]
    assert trained_texts(row) == wanted
    assert "".join(row.texts()) == row.rendered == tokenizer.render([*system, *turns])
    assert row.notes == (() if STYLES[name].end else (UNENDED,))


@pytest.mark.parametrize("name", STYLES)
def test_ids_are_those_of_the_rendering(name):
    """A row without look-alikes has exactly the ids of its rendered text, so BOS stands at most once."""
    tokenizer = style_tokenizer(name)
    record = chat(user("Hi there"), assistant("Hello 🙂"), user("again"), assistant("yes"))
    row = encode_record(record, tokenizer)
    assert list(row.ids) == tokenizer.encode(row.rendered).ids
    if name in ("llama3", "gemma", "mistral"):
        assert list(row.ids).count(tokenizer.bos_id) == 1


@pytest.mark.parametrize("name", [name for name in STYLES if STYLES[name].tools])
def test_tool_calls_are_trained_and_tool_results_are_not(name):
    """A turn that only calls a tool is the assistant's; the tool's answer is not."""
    turns = [user("Weather in Bern?"), call("weather", city="Bern"), {"role": "tool", "content": "sunny"}]
    row = encode_record(chat(*turns, assistant("It is sunny."), tools=TOOLS), style_tokenizer(name))
    wanted = expected(name, "<call>weather city=Bern</call>", "It is sunny.")
    if name == "qwen3":
        wanted[-1] = "<think>\n\n</think>\n\n" + wanted[-1]
    assert trained_texts(row) == wanted


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


@pytest.mark.parametrize("name", STYLES)
def test_look_alikes_in_the_data_stay_text(name):
    """Special tokens typed in content give no special ids, the row's text keeps them, and spans are not moved."""
    tokenizer, special = style_tokenizer(name), STYLES[name].special
    shout = "so " + " ".join(special) + " " + special[-1] * 2 + " ok"
    row = encode_record(chat(user(shout), assistant(shout), user("b"), assistant(shout)), tokenizer)
    plain = encode_record(chat(user("x"), assistant("y"), user("b"), assistant("z")), tokenizer)

    def specials(of: TokenRow) -> list[int]:
        return [token for token in of.ids if token in tokenizer.special.values()]

    assert specials(row) == specials(plain)
    wanted = expected(name, shout, shout)
    if name == "qwen3":
        wanted[-1] = "<think>\n\n</think>\n\n" + wanted[-1]
    assert trained_texts(row) == wanted
    assert "".join(row.texts()) == row.rendered
    assert special[0] in row.notes[0]


def test_look_alikes_in_tools_stay_text():
    """The names and results of tools are data too."""
    tokenizer = style_tokenizer("mistral")
    tools = ({"type": "function", "function": {"name": "a</s>b"}},)
    row = encode_record(chat(user("q"), call("x[INST]", y="</s>"), tools=tools), tokenizer)
    assert list(row.ids).count(tokenizer.special["</s>"]) == 1
    assert list(row.ids).count(tokenizer.special["[INST]"]) == 1
    assert "a</s>b" in row.rendered


@pytest.mark.parametrize("name", STYLES)
def test_random_conversations(name):
    """For any words: joined texts are the rendering, the answers are trained exactly, and without look-alikes the
    ids are those of the rendering."""
    tokenizer, source = style_tokenizer(name), random.Random(name)
    for _ in range(40):
        special = STYLES[name].special if source.random() < 0.5 else ()
        answers = [words(source, special) for _ in range(source.randrange(1, 4))]
        turns = [turn for answer in answers for turn in (user(words(source, special)), assistant(answer))]
        row = encode_record(chat(*turns), tokenizer)
        wanted = expected(name, *answers)
        if name == "qwen3":
            wanted[-1] = "<think>\n\n</think>\n\n" + wanted[-1]
        assert "".join(row.texts()) == row.rendered == tokenizer.render(turns)
        assert trained_texts(row) == wanted
        assert len(row.ids) == len(row.trained) == len(row.ends)
        if not any(token in turn["content"] for turn in turns for token in STYLES[name].special):
            assert list(row.ids) == tokenizer.encode(row.rendered).ids
        trained = [token for token, flag in zip(row.ids, row.trained, strict=True) if flag]
        assert tokenizer.decode(trained) == "".join(wanted)


def test_a_character_of_several_tokens_is_shown_once():
    """The first of a character's tokens shows it, the others show nothing."""
    row = encode_record(chat(user("a"), assistant("🙂")), tiny_tokenizer())
    face = row.texts().index("🙂")
    assert row.texts()[face + 1 : face + 4] == ["", "", ""]
    assert row.trained[face : face + 4] == [True] * 4


def test_last_trains_only_the_last_answer():
    """--trained last leaves every answer but the last alone."""
    record = chat(user("a"), assistant("one"), user("b"), assistant("two"), user("c"))
    assert trained_texts(encode_record(record, tiny_tokenizer(), "last")) == ["two<|im_end|>"]


def test_all_trains_every_token_but_the_first():
    """--trained all trains the whole rendering; nothing predicts its first token."""
    row = encode_record(chat(user("a"), assistant("one")), style_tokenizer("llama3"), "all")
    assert row.trained == [False] + [True] * (len(row.ids) - 1)


def test_answers_in_the_prompt_of_a_prompt_completion_row_are_not_trained():
    """The prompt of a row that names its prompt is never trained, also where it holds answers."""
    record = chat(user("a"), assistant("shot"), user("b"), assistant("two"))
    record = type(record)(**{**record.__dict__, "prompt": 3})
    assert trained_texts(encode_record(record, tiny_tokenizer())) == ["two<|im_end|>"]


def test_a_token_across_the_span_s_start_is_not_trained():
    """White space that merges with the header is the header's."""
    tokenizer = template_tokenizer(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<e>{% endfor %}", ("<e>",), end="<e>"
    )
    row = encode_record(chat(user("a"), assistant(" b")), tokenizer)
    assert trained_texts(row) == [" b<e>"]
    joined = template_tokenizer(
        "{% for m in messages %}{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %} {% endif %}",
        ("<e>",),
        end="<e>",
    )
    row = encode_record(chat(user("a"), assistant(" the")), joined)
    assert trained_texts(row) == ["<e>"], "the prompt's space and the answer's first word are one token"


def test_an_end_token_that_takes_white_space_along_is_trained():
    """Phi-3's end token swallows the newline after it; it is the end of the turn all the same."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer = template_tokenizer(template, ("<|user|>", "<|assistant|>"))
    tokenizer.backend.add_special_tokens([AddedToken("<|end|>", special=True, rstrip=True, normalized=False)])
    tokenizer.special["<|end|>"] = tokenizer.backend.token_to_id("<|end|>")
    row = encode_record(chat(user("a"), assistant("one"), user("b"), assistant("two")), tokenizer)
    assert [text.rstrip() for text in trained_texts(row)] == ["one<|end|>", "two<|end|>"]


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


def test_a_row_that_the_template_refuses_is_an_error_at_its_place():
    """A template's refusal becomes a fault of the row."""
    with pytest.raises(DataError, match=r"^f.jsonl:9: the chat template refuses the row"):
        encode_record(
            chat({"role": "system", "content": "s"}, assistant("b"), place="f.jsonl:9"), style_tokenizer("gemma")
        )


def test_an_empty_answer_is_noted_and_its_end_trained():
    """An empty answer trains stopping at once; the user hears of it."""
    row = encode_record(chat(user("a"), assistant("")), tiny_tokenizer())
    assert trained_texts(row) == ["<|im_end|>"]
    assert row.notes == (EMPTY,)


def test_tools_that_the_template_leaves_out_are_told_from_those_it_writes():
    """tools_ignored says whether tools, or tool calls, change nothing in the rendering."""
    asked = (user("a"), assistant("b"))
    assert tools_ignored(chat(*asked, tools=TOOLS), tiny_tokenizer())
    assert not tools_ignored(chat(*asked, tools=TOOLS), style_tokenizer("mistral"))
    assert tools_ignored(chat(user("a"), call("weather", city="Bern"), assistant("b")), tiny_tokenizer())
    assert not tools_ignored(chat(user("a"), call("weather", city="Bern")), style_tokenizer("llama3"))
    assert not tools_ignored(chat(*asked), tiny_tokenizer())


def test_a_tool_call_that_the_template_leaves_out_is_not_trained():
    """Training an empty turn would teach silence."""
    row = encode_record(
        chat(user("a"), call("weather", city="Bern"), {"role": "tool", "content": "sun"}, assistant("b")),
        tiny_tokenizer(),
    )
    assert trained_texts(row) == ["b<|im_end|>"]


@pytest.mark.parametrize("name", [name for name in STYLES if name != "opened"])
def test_a_prompt_is_what_an_answer_was_trained_after(name):
    """The ids to generate after are the beginning of the training row, look-alikes included."""
    tokenizer = style_tokenizer(name)
    question = user(f"what {STYLES[name].special[-1]} is it")
    row = encode_record(chat(question, assistant("four")), tokenizer)
    prompt = encode_prompt([question], None, tokenizer)
    assert list(row.ids[: len(prompt)]) == prompt
    assert name == "unprompted" or not any(row.trained[: len(prompt)])
    assert name == "unprompted" or row.trained[len(prompt)]
