"""Every row of every format in one shape; every fault with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builders.chats import assistant, user
from lorafit.data.records import Read, Record, content_hash, read_records

GOOD = '{"prompt": "q", "completion": "a"}'
CHAT = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
AROUND = {
    b'"messages"': CHAT,
    b'"conversations"': '{"conversations": [{"from": "gpt", "value": "a"}]}',
    b'"instruction"': '{"instruction": "i", "output": "o"}',
    b'"text"': '{"text": "t"}',
}
DEEP = "[" * 100_000 + "]" * 100_000
BIG = '{"prompt": "' + "x" * 1_000_000 + '", "completion": 5}'


def messages(*turns: object) -> str:
    return json.dumps({"messages": turns})


def called(*calls: object) -> str:
    return messages(user("q"), {"role": "assistant", "content": None, "tool_calls": calls})


def beside(**columns: object) -> str:
    return json.dumps({**columns, "messages": [user("q"), assistant("a")]})


def answered(content: object, **more: object) -> str:
    return messages(user("q"), {"role": "assistant", "content": content, **more})


# (the third line of a file, words that must stand in its fault)
LINES = [
    ('{"prompt": "q", "completion": null}', "completion is null"),
    ('{"prompt": "q"}', "completion is missing"),
    ('{"completion": "a"}', "prompt is missing"),
    ('{"prompt": 5, "completion": "a"}', "prompt is 5, not text"),
    ('{"prompt": "q", "completion": ["a"]}', "completion is a list"),
    ('{"prompt": "q", "completion": true}', "completion is true, not text"),
    (json.dumps({"prompt": [user("q")], "completion": "a"}), 'completion is text "a", not a list'),
    ('{"prompt": null, "completion": "a"}', "prompt is null"),
    (answered(None), "messages[1].content is null"),
    (messages(user("q"), {"role": "assistant"}), "messages[1].content is missing"),
    (answered(7), "messages[1].content is 7, not text"),
    (answered({"a": 1}), "messages[1].content is an object"),
    (answered([{"type": "image_url", "image_url": {}}]), 'of type "image_url": not supported yet'),
    (answered([{"type": "text"}]), "messages[1].content[0].text is null"),
    ('{"prompt": "<image> q", "completion": "a", "images": ["x.png"]}', "the row has images, which no model"),
    (beside(image="x.png"), "the row has image, which no model is trained on yet"),
    (answered(["a"]), 'messages[1].content[0] is text "a", not an object'),
    (messages(user("q"), {"role": "tool", "content": None}, assistant("a")), "messages[1].content is null"),
    (messages({"role": "robot", "content": "q"}, assistant("a")), 'unknown role "robot" at messages[0].role'),
    (messages({"role": 3, "content": "q"}, assistant("a")), "messages[0].role is 3, not text"),
    (messages({"content": "q"}, assistant("a")), "messages[0].role is missing"),
    (messages({"role": None, "content": "q"}), "messages[0].role is null"),
    (messages({"from": "human", "value": "q"}), 'the message has the keys "from", "value"'),
    (messages(user("q")), "no assistant turn"),
    ('{"messages": "hello"}', 'messages is text "hello", not a list'),
    ('{"messages": null}', "messages is null"),
    ('{"messages": []}', "there is no message"),
    ('{"messages": ["hi"]}', 'messages[0] is text "hi", not an object'),
    ('{"messages": [null]}', "messages[0] is null"),
    (json.dumps({"system": "s", "messages": [{"role": "system", "content": "t"}, assistant("a")]}), "given twice"),
    (beside(system=1), "system is 1, not text"),
    (beside(tools=1), "tools is 1, not a list"),
    (beside(tools="[{"), "tools holds invalid JSON at column"),
    (beside(tools=["t"]), 'tools[0] is text "t"'),
    (called({"function": {}}), "messages[1].tool_calls[0] has no function name"),
    (answered(None, tool_calls=["f"]), 'messages[1].tool_calls[0] is text "f"'),
    (answered(None, tool_calls={"f": 1}), "messages[1].tool_calls is an object, not a list"),
    (called({"name": "f", "arguments": [1]}), "arguments is a list, not an object"),
    (called({"name": "f", "arguments": "{"}), "arguments holds invalid JSON"),
    ('{"conversations": [{"from": "alien", "value": "q"}]}', 'unknown role "alien" at conversations[0].from'),
    ('{"conversations": [{"from": "human", "value": null}]}', "conversations[0].value is null"),
    ('{"conversations": [{"from": "gpt"}]}', "conversations[0].value is missing"),
    ('{"conversations": [{"from": "function_call", "value": "f(x)"}]}', "conversations[0].value holds invalid JSON"),
    ('{"instruction": "i", "input": ""}', "output is missing"),
    ('{"instruction": "i", "output": null}', "output is null"),
    ('{"instruction": "i", "input": [1], "output": "o"}', "input is a list"),
    ('{"text": null}', "text is null"),
    ('{"text": 1.5}', "text is 1.5, not text"),
    ('{"text": "  "}', "text is empty"),
    ('{"prompt": "q", "chosen": "a", "rejected": "b"}', "preference rows are not supported yet"),
    ('{"question": "q", "answer": "a"}', 'no known format: the row has the keys "question", "answer"'),
    ("{}", "the row has no keys"),
    ("[1, 2]", "the row is a list, not an object"),
    ('"hello"', 'the row is text "hello", not an object'),
    ("null", "the row is null"),
    ('{"prompt": "q", "prompt": "r", "completion": "a"}', 'the key "prompt" stands twice'),
    ('{"messages": [{"role": "user", "content": "q", "content": "r"}]}', 'the key "content" stands twice'),
    ("{'prompt': 'q'}", "invalid JSON at column 2"),
    ('{"prompt": "q",}', "invalid JSON at column 1"),
    ('{"prompt": "q" "completion": "a"}', "invalid JSON at column 16"),
    (GOOD + GOOD, "invalid JSON at column 35: text after the row"),
    ('{"prompt": "a\tb", "completion": "a"}', "invalid control character"),
    ("hello", "invalid JSON at column 1"),
    ('{"prompt": "q", "completion": "a", "score": NaN}', "NaN is no JSON number"),
    ('{"prompt": "q", "completion": "a", "score": -Infinity}', "-Infinity is no JSON number"),
    ('{"prompt": "q", "completion": "a", "score": 1e999}', "1e999 is too large"),
    ('{"prompt": "q", "completion": "a", "n": ' + "9" * 5000 + "}", "a number of 5000 digits"),
    ('{"prompt": "q\\u0000", "completion": "a"}', "a NUL character"),
    ('{"prompt": "q", "completion": "\\ud83d"}', "half of a surrogate pair"),
    ('{"prompt": "q", "completion": "a", "\\uDC00": 1}', "half of a surrogate pair"),
    ('{"prompt": "q", "completion": "a", "x": ' + "[" * 70 + "]" * 70 + "}", "nesting deeper than 64 levels"),
    (DEEP, "nesting deeper than 64 levels"),
    (BIG, "completion is 5, not text"),
]  # fmt: skip

BYTES = [
    (b'{"prompt": "q\0", "completion": "a"}', "a NUL byte at column 14"),
    ('{"prompt": "é", "completion": "a"}'.encode("latin-1"), "not UTF-8: byte 0xe9 at column 13"),
    (b'{"prompt": "\xf0\x9f", "completion": "a"}', "not UTF-8: byte 0xf0 at column 13"),
]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def only_fault(read: Read) -> str:
    assert len(read.faults) == 1, [str(fault) for fault in read.faults]
    return str(read.faults[0])


@pytest.mark.parametrize(("line", "words"), LINES + BYTES, ids=[words for _, words in LINES + BYTES])
def test_a_bad_row_is_named_by_file_and_line(line, words, tmp_path):
    """Each faulty row gives one fault with its line and telling words, and does not hide the rows around it."""
    raw = line.encode() if isinstance(line, str) else line
    around = next((row for key, row in AROUND.items() if key in raw), GOOD).encode()
    path = write(tmp_path, "train.jsonl", b"\n".join([around, b"", raw, around]) + b"\n")
    read = read_records([path])
    fault = only_fault(read)
    assert fault.startswith(f"{path}:3: "), fault
    assert words in fault
    assert "\n" not in fault
    assert [record.place for record in read.records] == [f"{path}:1", f"{path}:4"]
    assert [record.number for record in read.records] == [1, 3]


FILES = [
    ("empty file", "t.jsonl", "", 1, "empty"),
    ("blank lines only", "t.jsonl", "\n \n\n", 1, "empty"),
    ("empty array", "t.json", "[]", 1, "empty"),
    ("empty JSON file", "t.json", " ", 1, "empty"),
    ("empty CSV", "t.csv", "", 1, "empty"),
    ("header only", "t.csv", "prompt,completion\n", 1, "empty"),
    ("empty document", "t.txt", " \n", 1, "empty"),
    ("cut last line", "t.jsonl", GOOD + "\n" + GOOD[:-8], 2, "the file ends in the middle of this row"),
    ("two formats", "t.jsonl", GOOD + '\n{"text": "t"}\n', 2, "a text row among prompt/completion rows"),
    ("UTF-16", "t.jsonl", GOOD.encode("utf-16"), 1, "UTF-16"),
    ("cut array", "t.json", "[\n" + GOOD + ",\n" + GOOD[:-5], 3, "the file ends in the middle of a row"),
    ("array without an end", "t.json", "[\n" + GOOD + "\n", 3, "the file ends before its array does"),
    ("array without a comma", "t.json", "[" + GOOD + "\n" + GOOD + "]", 2, "no comma between two rows"),
    ("array with a last comma", "t.json", "[" + GOOD + ",\n]", 2, "invalid JSON"),
    ("text after the array", "t.json", "[" + GOOD + "]\n\nx", 3, "text after the end of the array"),
    ("a wrapped array", "t.json", '{\n"data": [' + GOOD + "]}", 1, 'no known format: the row has the keys "data"'),
    ("a row in an array", "t.json", "[\n" + GOOD + ",\n\n5,\n" + GOOD + "]", 4, "the row is 5, not an object"),
    ("duplicate key in an array", "t.json", "[\n" + GOOD + ',\n{"a": 1, "a": 2},' + GOOD + "]", 3, "stands twice"),
    ("deep array", "t.json", "[\n" + DEEP + "]", 2, "nesting deeper than 64 levels"),
    ("Latin-1 array", "t.json", '[\n{"text": "é"}]'.encode("latin-1"), 2, "not UTF-8: byte 0xe9 at column 11"),
    ("JSON Lines in .json", "t.json", GOOD + "\n" + GOOD + "\n{]\n", 3, "invalid JSON at column 2"),
    ("missing cell", "t.csv", "prompt,completion\nq,a\nq\n", 3, "the row has 1 cells, the header has 2"),
    ("extra cell", "t.csv", "prompt,completion\nq,a,b\n", 2, "the row has 3 cells, the header has 2"),
    ("extra cell after a long one", "t.csv", 'prompt,completion\n"q\nq",a\nq,a,b\n', 4, "the row has 3 cells"),
    ("duplicate header", "t.csv", "prompt,prompt,completion\nq,q,a\n", 1, 'the column "prompt" stands twice'),
    ("no known columns", "t.csv", "mr,ref\na,b\nc,d\n", 1, 'no known format: the row has the keys "mr", "ref"'),
    ("open quote", "t.csv", 'prompt,completion\nq,a\nq,"a\nb\nc\n', 3, "a quoted cell never ends"),
    ("text after a quote", "t.csv", 'prompt,completion\n"q"r,a\nq,a\n', 2, "invalid CSV"),
    ("NUL in CSV", "t.csv", b"prompt,completion\nq,a\nq,a\0\n", 3, "a NUL byte"),
    ("Latin-1 CSV", "t.csv", "prompt,completion\nq,a\nq,é\n".encode("latin-1"), 3, "not UTF-8: byte 0xe9"),
    ("Latin-1 header", "t.csv", "prompt,réponse\nq,a\n".encode("latin-1"), 1, "not UTF-8: byte 0xe9"),
    ("Latin-1 document", "t.txt", "a\nb é".encode("latin-1"), 2, "not UTF-8: byte 0xe9 at column 3"),
    ("NUL in a document", "t.txt", b"a\nb\n\0", 3, "a NUL byte at column 1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "content", "line", "words"), FILES, ids=[case[0] for case in FILES])
def test_a_bad_file_is_named_by_line(name, file, content, line, words, tmp_path):
    """Faults of whole files have the line where they stand too."""
    path = write(tmp_path, file, content)
    fault = only_fault(read_records([path]))
    assert fault.startswith(f"{path}:{line}: "), fault
    assert words in fault


PATHS = [
    ("no.jsonl", "No such file"),
    ("no", "No such file"),
    ("rows.tsv", ".tsv is not supported yet"),
    ("rows.parquet", ".parquet is not supported yet"),
    ("rows.zip", ".zip is no kind of data"),
    ("rows", "a file without a suffix"),
]


@pytest.mark.parametrize(("name", "words"), PATHS)
def test_a_file_that_cannot_be_read_is_named(name, words, tmp_path):
    """Missing files and kinds that are not read are one fault each, with the path."""
    if "no" not in name:
        write(tmp_path, name, GOOD)
    fault = only_fault(read_records([tmp_path / name]))
    assert fault.startswith(f"{tmp_path / name}: ")
    assert words in fault


def test_a_folder_is_its_data_files_by_name(tmp_path):
    """Of a folder the non-hidden data files are read in the order of their names; one without any is a fault."""
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "notes.md"):
        write(tmp_path, name, GOOD)
    read = read_records([tmp_path])
    assert [record.place for record in read.records] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.jsonl:1"]
    assert [record.number for record in read.records] == [1, 2]
    (tmp_path / "empty").mkdir()
    assert "holds no data file" in only_fault(read_records([tmp_path / "empty"]))


def test_files_of_several_formats_are_counted(tmp_path):
    """Each file has its own format; the counts name them all."""
    files = [
        write(tmp_path, "a.jsonl", GOOD),
        write(tmp_path, "b.jsonl", CHAT + "\n" + CHAT),
        write(tmp_path, "c.txt", "x"),
    ]
    assert read_records(files).formats == {"prompt/completion": 1, "chat": 2, "raw": 1}


def read_one(folder: Path, row: object, **options: bool) -> Record:
    read = read_records([write(folder, "one.jsonl", json.dumps(row))], **options)
    assert not read.faults, read.faults[0]
    return read.records[0]


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def said(speaker: str, value: str | None) -> dict[str, str | None]:
    return {"from": speaker, "value": value}


SYSTEM = {"role": "system", "content": "s"}
NAMED = {"role": "user", "content": "q", "name": "Eve"}
ALPACA = {"instruction": "i", "input": "x", "output": "o", "system": "s"}
SHAREGPT = {"conversations": [said("human", "q"), said("gpt", "a")], "system": "s"}
SHAPES = [
    ({"prompt": "q", "completion": "a"}, "prompt/completion", (user("q"), assistant("a"))),
    ({"instruction": "i", "input": "", "output": "o"}, "alpaca", (user("i"), assistant("o"))),
    (ALPACA, "alpaca", (SYSTEM, user("i\n\nx"), assistant("o"))),
    ({"messages": [user("q"), assistant("a")], "text": "t", "n": 10**400}, "chat", (user("q"), assistant("a"))),
    ({"messages": [user([part("a"), part("b")]), assistant("c")]}, "chat", (user("ab"), assistant("c"))),
    ({"messages": [NAMED | {"weight": None}, assistant("a")]}, "chat", (NAMED, assistant("a"))),
    (SHAREGPT, "sharegpt", (SYSTEM, user("q"), assistant("a"))),
]  # fmt: skip


@pytest.mark.parametrize(("row", "name", "wanted"), SHAPES)
def test_rows_of_every_format_become_messages(row, name, wanted, tmp_path):
    """Each known format gives the same messages, and the row as read is kept."""
    record = read_one(tmp_path, row)
    assert (record.format, record.messages, record.fields) == (name, wanted, row)


def test_lists_on_both_sides_are_joined_and_the_prompt_is_known(tmp_path):
    """A prompt of messages stays the prompt: its answers are not trained."""
    record = read_one(tmp_path, {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]})
    assert record.messages == (user("a"), assistant("b"), user("c"), assistant("d"))
    assert record.prompt == 3


def test_tool_calls_have_their_arguments_as_objects(tmp_path):
    """Arguments in JSON text are read, whatever else the call holds is kept."""
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, 2]}'}},
        {"name": "g", "arguments": ""},
    ]
    record = read_one(
        tmp_path,
        {
            "messages": [user("q"), {"role": "assistant", "content": None, "tool_calls": calls}],
            "tools": '[{"name": "f"}]',
        },
    )
    assert record.messages is not None
    assert record.messages[1] == {
        "role": "assistant",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": [1, 2]}}},
            {"type": "function", "function": {"name": "g", "arguments": {}}},
        ],
    }
    assert record.tools == ({"name": "f"},)


def test_sharegpt_function_calls_become_tool_calls(tmp_path):
    """ShareGPT's function_call and observation are a tool call and its result; its tools get OpenAI's wrapping."""
    row = {
        "conversations": [
            said("human", "q"),
            said("function_call", '{"name": "f", "arguments": {"x": 1}}'),
            said("observation", "42"),
            said("gpt", "a"),
        ],
        "tools": '[{"name": "f"}]',
    }
    record = read_one(tmp_path, row)
    assert record.messages == (
        user("q"),
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "42"},
        assistant("a"),
    )
    assert record.tools == ({"type": "function", "function": {"name": "f"}},)


PROMPTS = [
    {"prompt": "q"},
    {"prompt": "q", "completion": None},
    {"instruction": "q", "output": "a"},
    {"messages": [user("q"), assistant("a")]},
    {"messages": [user("q")]},
    {"conversations": [said("human", "q"), said("gpt", None)]},
    {"prompt": [user("q")], "completion": [assistant("a")]},
]


@pytest.mark.parametrize("row", PROMPTS)
def test_prompts_need_no_answer_when_one_is_to_be_generated(row, tmp_path):
    """for_training=False reads the same rows without the answer at the end."""
    assert read_one(tmp_path, row, for_training=False).messages == (user("q"),)


def test_byte_order_marks_line_ends_and_blank_lines_are_no_faults(tmp_path):
    """BOM, CRLF and blank lines change no row, in any kind of file."""
    bom = "\ufeff"
    files = [
        write(tmp_path, "a.jsonl", bom + GOOD + "\r\n\r\n  \r\n" + GOOD),
        write(tmp_path, "b.json", bom + "\r\n[\r\n" + GOOD + ",\r\n\r\n" + GOOD + "\r\n]\r\n"),
        write(tmp_path, "c.csv", bom + "prompt,completion\r\nq,a\r\n\r\nq,a\r\n"),
        write(tmp_path, "d.json", bom + GOOD + "\r\n" + GOOD),
        write(tmp_path, "e.json", '{"prompt": "q",\n"completion": "a"}\n{"prompt": "q",\n"completion": "a"}'),
    ]
    read = read_records(files)
    assert not read.faults
    lines = [record.place.rpartition(":")[2] for record in read.records]
    assert lines == ["1", "4", "3", "5", "2", "4", "1", "2", "1", "3"]
    assert len({content_hash(record) for record in read.records}) == 1
    document = read_records([write(tmp_path, "f.txt", bom + "a\r\nb")])
    assert document.records[0].text == "a\r\nb"


def test_csv_cells_may_hold_commas_quotes_lines_and_documents(tmp_path):
    """A CSV record begins at the line where its first cell does; a cell may be long."""
    path = write(tmp_path, "a.csv", 'id,text\n1,"a, ""b""\nc"\n2,"' + "x" * 200_000 + '"\n')
    read = read_records([path])
    assert [record.text for record in read.records] == ['a, "b"\nc', "x" * 200_000]
    assert [record.place for record in read.records] == [f"{path}:2", f"{path}:4"]


def test_all_faults_of_a_file_are_found_at_once(tmp_path):
    """Reading goes on after a fault, so that one look mends the file."""
    path = write(tmp_path, "a.jsonl", "\n".join([line for line, _ in LINES] + [GOOD]))
    read = read_records([path])
    assert len(read.faults) == len(LINES)
    assert len(read.records) == 1


def test_content_hash_sees_what_is_said_and_nothing_else(tmp_path):
    """Place, key order and ignored columns do not change the hash; every word does."""
    one = read_one(tmp_path, {"prompt": "q", "completion": "a", "id": 1})
    same = read_one(tmp_path, {"messages": [{"content": "q", "role": "user"}, assistant("a")]})
    other = read_one(tmp_path, {"prompt": "q", "completion": "a "})
    assert content_hash(one) == content_hash(same) != content_hash(other)
