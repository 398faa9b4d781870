"""Records become rows of a run, and everything that happens to them on the way is counted with its place."""

from __future__ import annotations

import random

import pytest

from builders.chats import STYLES, assistant, call, chat, style_tokenizer, template_tokenizer, text_record, user
from builders.tokenizers_tiny import gappy_tokenizer, tiny_tokenizer
from lorafit.data.chat import UNENDED, encode_record
from lorafit.data.records import Record
from lorafit.data.rows import Rows, build_rows
from lorafit.data.tokens import CHUNK

CONTEXT = 512


def numbered(*pairs: tuple[str, str]) -> list[Record]:
    return [chat(user(q), assistant(a), place=f"d.jsonl:{n}") for n, (q, a) in enumerate(pairs, 1)]


def built(records: list[Record], max_length: int | None = None, context: int = CONTEXT) -> Rows:
    return build_rows(records, tiny_tokenizer(), max_length=max_length, context=context)


def test_counts_are_those_of_the_rows():
    """Tokens and trained tokens are counted as they stand in the rows; nothing is skipped without a reason."""
    done = built(numbered(("a", "one"), ("b", "two words"), ("c", "three")))
    assert done.counts == {
        "rows": 3,
        "used": 3,
        "skipped": 0,
        "duplicates": 0,
        "truncated": 0,
        "tokens": sum(len(list(row.ids)) for row in done.rows),
        "trained_tokens": sum(flag for row in done.rows for flag in row.trained),
    }
    assert done.problems == []
    assert done.max_length == max(len(row.ids) for row in done.rows)


def test_planted_duplicates_are_counted_exactly_and_kept():
    """Ten planted copies are ten duplicates, each named with the row that it repeats; all rows are used."""
    pairs = [(f"question {n}", f"answer {n}") for n in range(20)]
    done = built(numbered(*pairs, *pairs[:7], *pairs[:3]))
    assert done.counts["duplicates"] == 10
    assert done.counts["used"] == 30
    assert done.problems[0] == ("d.jsonl:21", "says the same as d.jsonl:1")
    assert done.problems[9] == ("d.jsonl:30", "says the same as d.jsonl:3")


def test_a_cut_answer_gets_no_end_token_and_is_counted():
    """A row over max_length loses its end: the ids are the beginning of the whole row's and no more."""
    record = numbered(("a", "one two three four five six seven"))[0]
    whole = encode_record(record, tiny_tokenizer())
    done = built([record], max_length=len(whole.ids) - 4)
    row = done.rows[0]
    assert list(row.ids) == list(whole.ids[:-4])
    assert row.cut
    assert whole.rendered.startswith(row.rendered)
    assert "".join(row.texts()) == row.rendered
    assert done.counts["truncated"] == 1
    assert done.problems == [
        ("d.jsonl:1", f"cut from {len(whole.ids)} to {len(row.ids)} tokens: the answer loses 3 tokens")
    ]


def test_a_row_left_without_a_trained_token_is_not_used():
    """Where the question alone fills max_length nothing can be learned: dropped, counted, named."""
    records = numbered(("a", "one"), ("why " * 60, "two"))
    done = built(records, max_length=60)
    assert [row.record.place for row in done.rows] == ["d.jsonl:1"]
    assert (done.counts["rows"], done.counts["used"], done.counts["skipped"]) == (2, 1, 1)
    place, what = done.problems[0]
    assert place == "d.jsonl:2"
    assert "no trained token is left" in what


@pytest.mark.parametrize(
    ("max_length", "context", "longest"), [(None, 512, 107), (None, 64, 64), (80, 64, 64), (80, 512, 80)]
)
def test_rows_are_never_longer_than_max_length_and_context(max_length, context, longest):
    """max_length defaults to the longest row; the model's context bounds it in any case."""
    done = built(numbered(("a", "one " * 20)), max_length, context)
    assert max(len(row.ids) for row in done.rows) == min(
        longest, len(encode_record(*numbered(("a", "one " * 20)), tiny_tokenizer()).ids)
    )
    assert done.max_length <= context


def test_rows_that_the_template_refuses_are_faults_and_the_others_stay():
    """A refused row has its place, and counts as skipped."""
    records = [
        chat(user("a"), assistant("b")),
        chat({"role": "system", "content": "s"}, user("a"), assistant("b"), place="d.jsonl:2"),
    ]
    done = build_rows(records, style_tokenizer("gemma"), max_length=None, context=CONTEXT)
    assert [fault.place for fault in done.faults] == ["d.jsonl:2"]
    assert (done.counts["rows"], done.counts["used"], done.counts["skipped"]) == (2, 1, 1)


def test_notes_are_given_once_with_the_number_of_rows():
    """What holds for many rows is one problem, at the first of them."""
    records = [chat(user("a"), assistant(str(n)), place=f"d.jsonl:{n}") for n in range(1, 6)]
    done = build_rows(records, style_tokenizer("bare"), max_length=None, context=CONTEXT)
    assert done.problems == [("d.jsonl:1", f"{UNENDED} (5 rows)")]


def test_tools_that_the_template_leaves_out_are_a_problem():
    """The user hears that the model will not see tools or tool calls, with the number of rows."""
    record = chat(user("a"), call("f", x=1), assistant("b"))
    problems = built([record, chat(user("a"), assistant("c"))]).problems
    assert len(problems) == 1
    assert "leaves out tools" in problems[0][1]
    assert "(1 row)" in problems[0][1]


def test_rows_are_those_of_records_encoded_alone():
    """Encoding many rows at once changes nothing: chats, look-alikes, text, lost characters, over two chunks."""
    tokenizer, source = gappy_tokenizer(), random.Random(0)
    pool = ["the answer ", "is 42. ", "日本 ", "🙂", "é\n\n", "<|im_end|>", "\x04", "\U00040000"]

    def words() -> str:
        return "".join(source.choice(pool) for _ in range(source.randrange(1, 12))) * source.choice([1, 1, 1, 700])

    records = []
    for number in range(60):
        turns = [turn for _ in range(source.randrange(1, 3)) for turn in (user(words()), assistant(words()))]
        place = f"d.jsonl:{number}"
        records.append(source.choice([chat(*turns, place=place), text_record(words(), place=place)]))
    done = build_rows(records, tokenizer, max_length=None, context=1 << 20)
    assert sum(len(row.rendered) for row in done.rows) > CHUNK
    alone = [encode_record(record, tokenizer) for record in records]
    assert done.rows == [row for row in alone if any(row.trained)]


def test_characters_without_a_token_are_a_problem():
    """What the tokenizer leaves out is named once with the number of rows, and the rows' texts still hold it."""
    records = numbered(("a\x04", "one\x04"), ("b", "two"), ("\x04 \U00040000", "three"))
    done = build_rows(records, gappy_tokenizer(), max_length=None, context=CONTEXT)
    assert done.problems == [
        ("d.jsonl:1", "the tokenizer has no token for '\\x04': it is left out (2 rows)"),
        ("d.jsonl:3", "the tokenizer has no token for '\\U00040000': it is left out (1 row)"),
    ]
    assert all("".join(row.texts()) == row.rendered for row in done.rows)
    assert done.rows[0].rendered.count("\x04") == 2


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_raw_document_is_cut_without_losing_a_token(add_bos):
    """The rows of a document, BOS aside, are its tokens and EOS in their order; only the last has EOS."""
    tokenizer = template_tokenizer("", STYLES["mistral"].special, "<s>", "</s>", add_bos)
    text = "The question is 日本 🙂 what the answer is. " * 20
    record = text_record(text, "raw")
    done = build_rows([record], tokenizer, max_length=16, context=CONTEXT)
    bos = [tokenizer.bos_id] if add_bos else []
    joined = []
    for row in done.rows:
        assert list(row.ids[: len(bos)]) == bos
        assert len(row.ids) <= 16
        assert row.trained == [False] + [True] * (len(row.ids) - 1)
        assert "".join(row.texts()) == row.rendered
        joined += row.ids[len(bos) :]
    assert joined == [*tokenizer.encode(text).ids, tokenizer.eos_id]
    assert done.counts["truncated"] == 0


def test_a_raw_document_has_rows_of_1024_tokens_unless_told_otherwise():
    """A whole book is not one row."""
    done = build_rows([text_record("word " * 3000, "raw")], tiny_tokenizer(), max_length=None, context=8192)
    assert max(len(row.ids) for row in done.rows) == 1024
