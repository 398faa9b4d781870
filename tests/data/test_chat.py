"""The assistant's words are trained, with their end token, and nothing else."""

from __future__ import annotations

import random

import pytest

from builders.chats import STYLES, assistant, call, chat, style_tokenizer, template_tokenizer, trained_texts, user
from builders.tokenizers_tiny import tiny_tokenizer
from lorafit.data.chat import EMPTY, UNENDED, UNSEEN_TOOLS, encode_prompt, encode_record
from lorafit.data.records import Record
from lorafit.data.tokens import TokenRow
from lorafit.errors import DataError
from lorafit.formats.tokenizer import TextTokenizer

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
    """The user hears of tools, or tool calls, that change nothing in the rendering, also beside look-alikes."""

    def unseen(record: Record, tokenizer: TextTokenizer) -> bool:
        return UNSEEN_TOOLS in encode_record(record, tokenizer).notes

    for question in ("a", "a <|im_end|> </s>"):
        asked = (user(question), assistant("b"))
        assert unseen(chat(*asked, tools=TOOLS), tiny_tokenizer())
        assert not unseen(chat(*asked, tools=TOOLS), style_tokenizer("mistral"))
        assert unseen(chat(user(question), call("weather", city="Bern"), assistant("b")), tiny_tokenizer())
        assert not unseen(chat(user(question), call("weather", city="Bern")), style_tokenizer("llama3"))
        assert not unseen(chat(*asked), tiny_tokenizer())


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


def test_templates_that_want_arguments_as_text_get_them_so():
    """DeepSeek's template joins the arguments as JSON text; a template that reads them as an object gets the object."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content + '' }}{% for c in m.tool_calls %}"
        "{{ c.function.name + c.function.arguments }}{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = template_tokenizer(template, ("<|user|>", "<|assistant|>", "<|end|>"))
    row = encode_record(chat(user("a"), call("f", city="Zürich")), tokenizer)
    assert trained_texts(row) == ['f{"city": "Zürich"}<|end|>']


def test_an_answer_that_the_template_passes_over_is_not_trained():
    """Where nothing of an answer is written, its bare end token would teach silence."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.content is not string %}{{ m.content }}{% endif %}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = template_tokenizer(template, ("<|user|>", "<|assistant|>", "<|end|>"))
    assert not any(encode_record(chat(user("a"), assistant("b")), tokenizer).trained)
