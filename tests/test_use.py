"""preview and generate as commands: what they print, exactly as the specification has it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import lorafit
from builders.commands import World, one_core, run, write_rows
from builders.tokenizers_tiny import tiny_tokenizer
from lorafit.errors import AdapterError, ConfigError, ModelError

FP32 = ("--compute", "fp32", "--threads", 1)
SYSTEM = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
FEW = ("--max-tokens", 4, *FP32)


@pytest.fixture(scope="module", autouse=True)
def _one_core():
    with one_core():
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("use"))


def texts(row: dict) -> str:
    return "".join(token["text"] for token in row["tokens"])


MANY_BYTES = {"prompt": "café 日本語 🎉 e\u0301", "completion": "naïve 🏳️‍🌈 done\r\n \u001b[31m<script>"}


def test_preview_json_is_the_rendered_row_token_by_token(world, tmp_path):
    """Rows counted from 1, ids of the tokenizer, texts that join to the rendering, the answer and its end trained."""
    data = write_rows(tmp_path / "data.jsonl", [MANY_BYTES, {"prompt": "a", "completion": "b"}])
    tokenizer = tiny_tokenizer()
    for model in (world.model, world.gguf):
        outcome = run("preview", model, data, "--json")
        assert (outcome.code, outcome.err) == (0, "")
        assert list(outcome.json) == ["rows", "counts", "problems"]
        assert [row["row"] for row in outcome.json["rows"]] == [1, 2]
        row = outcome.json["rows"][0]
        messages = [{"role": r, "content": MANY_BYTES[k]} for r, k in (("user", "prompt"), ("assistant", "completion"))]
        rendered = tokenizer.render(messages)
        assert texts(row) == rendered
        assert [token["id"] for token in row["tokens"]] == tokenizer.encode(rendered).ids
        assert all(list(token) == ["id", "text", "trained"] for token in row["tokens"])
        trained = "".join(token["text"] for token in row["tokens"] if token["trained"])
        assert trained == MANY_BYTES["completion"] + "<|im_end|>"
        counts = outcome.json["counts"]
        assert (counts["rows"], counts["used"], counts["skipped"]) == (2, 2, 0)
        assert counts["tokens"] == sum(len(row["tokens"]) for row in outcome.json["rows"])


def test_preview_without_a_template_uses_the_plain_one_and_says_so(world, tmp_path):
    """The documented plain form, and a problem whose place is the model."""
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "Hi", "completion": "Ho"}])
    found = run("preview", world.plain_gguf, data, "--json").json
    assert texts(found["rows"][0]) == "### User:\nHi\n\n### Assistant:\nHo<|im_end|>\n\n"
    assert [problem["place"] for problem in found["problems"]] == [str(world.plain_gguf)]
    assert "no chat template" in found["problems"][0]["what"]


def test_preview_takes_another_template_and_trained_span(world, tmp_path):
    """--template replaces the model's; --trained all trains every token but the first."""
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "Hi", "completion": "Ho"}])
    found = run("preview", world.model, data, "--json", "--template", tmp_path / "t.jinja", "--trained", "all")
    row = found.json["rows"][0]
    assert texts(row) == "[Hi][Ho]"
    assert [token["trained"] for token in row["tokens"]] == [False] + [True] * (len(row["tokens"]) - 1)


def test_preview_shows_faults_beside_whole_json(world, tmp_path):
    """Faulty rows are skipped, counted, listed with their place, said on standard error; the exit code is 2."""
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}, {"prompt": "c", "completion": "d"}]
    data = write_rows(tmp_path / "data.jsonl", rows)
    outcome = run("preview", world.model, data, "--json")
    assert outcome.code == 2
    assert [row["row"] for row in outcome.json["rows"]] == [1, 3]
    assert outcome.json["problems"] == [{"place": f"{data}:2", "what": "completion is null"}]
    assert {key: outcome.json["counts"][key] for key in ("rows", "used", "skipped")} == {
        "rows": 3,
        "used": 2,
        "skipped": 1,
    }
    assert outcome.err == f"error: {data}:2: completion is null; give it text\n"
    missing = run("preview", world.model, tmp_path / "no.jsonl", "--json")
    assert missing.code == 2
    assert (missing.json["rows"], missing.json["counts"]["rows"]) == ([], 0)
    assert missing.err.startswith("error: ")


def test_preview_counts_duplicates_cuts_and_overlap(world, tmp_path):
    """Each is counted and shown with its line; none is a fault."""
    twice = {"prompt": "What is it?", "completion": "It is this and that and more and more and more."}
    lost = {"prompt": "word " * 60, "completion": "too late"}
    data = write_rows(tmp_path / "data.jsonl", [twice, twice, lost])
    held = write_rows(tmp_path / "held.jsonl", [twice])
    outcome = run("preview", world.model, data, "--json", "--max-length", 40, "--eval", held)
    counts = outcome.json["counts"]
    assert outcome.code == 0
    assert (counts["rows"], counts["used"], counts["skipped"]) == (3, 2, 1)
    assert (counts["duplicates"], counts["truncated"], counts["overlap"]) == (1, 2, 1)
    problems = {(problem["place"], problem["what"]) for problem in outcome.json["problems"]}
    assert (f"{data}:2", f"says the same as {data}:1") in problems
    assert (f"{data}:1", f"is evaluation row {held}:1 too") in problems
    assert any(place == f"{data}:3" and "no trained token is left" in what for place, what in problems)
    assert any(place == f"{data}:1" and "the answer loses" in what for place, what in problems)


def test_preview_shows_as_many_rows_as_asked(world):
    """3 for people, all in JSON, or -n of them."""
    for words, shown in (((), 3), (("-n", 5), 5), (("-n", 0), 0), (("-n", 99), 24)):
        outcome = run("preview", world.model, world.data, *words)
        assert outcome.code == 0
        assert len(re.findall(r"data.jsonl:\d+: \d+ tokens, \d+ trained", outcome.out)) == shown
        assert re.search(r"^rows +24 *$", outcome.out, re.M)
    for words, shown in (((), 24), (("-n", 5), 5), (("-n", 0), 0)):
        assert len(run("preview", world.model, world.data, "--json", *words).json["rows"]) == shown


def test_preview_colours_what_is_trained(world, tmp_path):
    """On a terminal the trained text alone is bold green; what a terminal would obey is shown as pictures."""
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "Say [bold]:memo:", "completion": "\u001b[31mred\r\n ok"}])
    command = [sys.executable, "-m", "lorafit", "preview", str(world.model), str(data)]
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    green = "".join(re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", shown))  # line by line
    assert green == "␛[31mred␍ ok<|im_end|>"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert SYSTEM + "<|im_start|>user\nSay [bold]:memo:<|im_end|>\n" in plain


def plain_answer(model, tokenizer, rendered: str, tokens: int) -> str:
    """Greedy, without a cache; stops at the tokenizer's end tokens."""
    ids = tokenizer.encode(rendered).ids
    start = len(ids)
    while len(ids) < start + tokens:
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in tokenizer.end_ids:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special=True)


def user(text: str, system: str = "") -> str:
    """The tiny template's rendering of one question, with the generation prompt."""
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else SYSTEM
    return f"{head}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_generate_prints_the_answer_alone(world):
    """--prompt: the greedy answer of the rendered question, and nothing else on standard output; JSON on demand."""
    model, tokenizer = lorafit.load(world.model, compute="fp32"), tiny_tokenizer()
    expected = plain_answer(model, tokenizer, user("Who counts?"), 8)
    words = ("generate", world.model, "--prompt", "Who counts?", "--max-tokens", 8, *FP32)
    outcome = run(*words)
    assert (outcome.code, outcome.out, outcome.err) == (0, expected + "\n", "")
    assert run(*words, "--json").json == {"prompt": "Who counts?", "output": expected}
    told = run(*words, "--system", "Be brief.").out
    assert told == plain_answer(model, tokenizer, user("Who counts?", "Be brief."), 8) + "\n"


def test_generate_uses_the_adapter(world):
    """The adapter's answer is that of lorafit.load with it, not the base's."""
    adapter = world.out / "adapter"
    model = lorafit.load(world.model, adapter=adapter, compute="fp32")
    words = ("generate", world.model, "--prompt", "What is 3 and the 3?", "--max-tokens", 8, *FP32)
    adapted = run(*words, "--adapter", adapter).out
    assert adapted == plain_answer(model, tiny_tokenizer(), user("What is 3 and the 3?"), 8) + "\n"
    assert adapted != run(*words).out


def test_an_adapters_own_template_is_used_unless_another_is_given(world, tmp_path):
    """chat_template.jinja in its folder, as a run with --template leaves it: the same as giving that file; said."""
    bare, own = tmp_path / "bare", tmp_path / "own"
    for folder in (bare, own):
        shutil.copytree(world.out / "adapter", folder)
    template = own / "chat_template.jinja"
    template.write_text("{% for m in messages %}Q: {{ m.content }}\nA:{% endfor %}")
    ask = ("generate", world.model, "--prompt", "Who?", *FEW)
    given = run(*ask, "--adapter", bare, "--template", template)
    found = run(*ask, "--adapter", own)
    assert found.out == given.out != run(*ask, "--adapter", bare).out
    assert f"template  {template}: what the adapter was trained with" in found.err
    (tmp_path / "other.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    words = ("--template", tmp_path / "other.jinja")
    assert run(*ask, "--adapter", own, *words).out == run(*ask, "--adapter", bare, *words).out


def test_generate_answers_every_row_of_every_format(world, tmp_path):
    """Rows come back in order with their fields and `output`; an answer at a row's end is not shown to the model."""
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    system = {"role": "system", "content": "Own."}
    files = {
        "chat": [{"messages": chat, "id": 7}, {"messages": [system, chat[0]]}],
        "pairs": [{"prompt": "Hi", "completion": "Hello", "source": "日本"}, {"prompt": "Ho"}],
        "alpaca": [{"instruction": "Hi", "input": "you", "id": 1}, {"instruction": "Ho"}],
        "text": [{"text": "Once upon"}, {"text": "The ships"}],
    }
    rendered = {
        "chat": [user("Hi"), user("Hi", "Own.")],
        "pairs": [user("Hi"), user("Ho")],
        "alpaca": [user("Hi\n\nyou"), user("Ho")],
        "text": ["Once upon", "The ships"],
    }
    model, tokenizer = lorafit.load(world.gguf, compute="fp32"), tiny_tokenizer()
    for name, rows in files.items():
        data = write_rows(tmp_path / f"{name}.jsonl", rows)
        outcome = run("generate", world.gguf, "--data", data, *FEW)
        assert (outcome.code, outcome.err) == (0, "")
        found = [json.loads(line) for line in outcome.out.splitlines()]
        outputs = [plain_answer(model, tokenizer, text, 4) for text in rendered[name]]
        assert found == [{**row, "output": output} for row, output in zip(rows, outputs, strict=True)]
    both = run("generate", world.gguf, "--data", tmp_path / "chat.jsonl", "--system", "Be brief.", *FEW).out
    outputs = [json.loads(line)["output"] for line in both.splitlines()]
    assert outputs == [plain_answer(model, tokenizer, user("Hi", system), 4) for system in ("Be brief.", "Own.")]


def test_generate_answers_many_rows_in_their_order(world, tmp_path):
    """70 questions of all lengths, more than are decoded at once: each has the answer that it has alone."""
    rows = [{"prompt": "ship " * (n * 7 % 13), "number": n} for n in range(70)]
    outcome = run("generate", world.model, "--data", write_rows(tmp_path / "many.jsonl", rows), *FEW)
    model, tokenizer = lorafit.load(world.model, compute="fp32"), tiny_tokenizer()
    plain = {row["prompt"]: plain_answer(model, tokenizer, user(row["prompt"]), 4) for row in rows}
    found = [json.loads(line) for line in outcome.out.splitlines()]
    assert found == [{**row, "output": plain[row["prompt"]]} for row in rows]


def test_generate_draws_by_its_seed(world):
    """A temperature above 0 makes answers differ by --seed, and by nothing else."""
    words = ("generate", world.model, "--prompt", "Hi", "--max-tokens", 12, "--temperature", 1, *FP32)
    assert run(*words, "--seed", 3).out == run(*words, "--seed", 3).out != run(*words, "--seed", 4).out


def test_generate_says_when_there_is_no_template(world):
    """The answer stands alone on standard output; that the plain template was used stands on standard error."""
    outcome = run("generate", world.plain_gguf, "--prompt", "Hi", *FEW)
    model = lorafit.load(world.plain_gguf, compute="fp32")
    expected = plain_answer(model, tiny_tokenizer(None), "### User:\nHi\n\n### Assistant:\n", 4)
    assert (outcome.code, outcome.out) == (0, expected + "\n")
    assert "no chat template" in outcome.err


def test_generate_refuses_in_one_line(world, tmp_path):
    """Nothing to answer, two things, values that cannot be meant, prompts beyond the context, bad rows."""
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "Hi"}, {"prompt": "word " * 300}])
    text = write_rows(tmp_path / "text.jsonl", [{"text": "Once upon"}])
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "Hi"}, {"prompt": 3}])
    (tmp_path / "no.jinja").write_text("{{ raise_exception('never') }}")
    prompt = ("--prompt", "Hi")
    for words, says in [
        ((), "lorafit generate: needs either --prompt or --data; give one of them"),
        ((*prompt, "--data", text), "lorafit generate: needs either --prompt or --data; give one of them"),
        (("--data", tmp_path / "no.jsonl"), "No such file or directory"),
        (("--data", bad), f"{bad}:2: prompt is 3, not text"),
        (("--data", long), f"{long}:2: has "),
        (("--prompt", "word " * 300), "--prompt: has "),
        (("--data", text, "--system", "S"), "--system: "),
        (("--prompt", "caf\udce9"), r"--prompt: is not UTF-8: 'caf\udce9'; give UTF-8"),  # as Python reads the byte E9
        ((*prompt, "--temperature", "nan"), "--temperature: is nan; give 0 or a number above it"),
        ((*prompt, "--temperature", "-1"), "--temperature: is -1.0; "),
        ((*prompt, "--max-tokens", "0"), "lorafit generate: Invalid value for '--max-tokens'"),
        ((*prompt, "--seed", "-1"), "--seed: is -1; "),
        ((*prompt, "--template", tmp_path / "no.jinja"), "--prompt: the chat template refuses the row: "),
        ((*prompt, "--adapter", tmp_path), "adapter_config.json: does not exist"),
    ]:
        outcome = run("generate", world.model, *words, *FP32)
        assert (outcome.code, outcome.out) == (2, ""), outcome
        assert outcome.err.startswith("error: ")
        assert says in outcome.err
        assert outcome.err.count("\n") == 1


def test_an_answer_ends_with_the_context(world):
    """A prompt close to the model's 256 tokens leaves room for few; more are not asked for."""
    room = 256 - len(tiny_tokenizer().encode(user("a" * 200)).ids)
    assert 0 < room < 256
    outcome = run("generate", world.model, "--prompt", "a" * 200, "--max-tokens", 999, "--json", *FP32)
    assert outcome.code == 0
    assert len(tiny_tokenizer().encode(outcome.json["output"]).ids) <= room + 8  # an answer may read as other tokens


def test_load_gives_a_module_with_its_tokenizer(world):
    """Eval mode, nothing to train, logits [B, L, V], a tokenizer that renders and decodes as the commands do."""
    model = lorafit.load(str(world.gguf), compute="fp32")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    rendered = model.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered == SYSTEM + "<|im_start|>user\nHi<|im_end|>\n"
    ids = model.tokenizer(rendered, return_tensors="pt").input_ids
    assert model(input_ids=torch.cat([ids, ids])).logits.shape == (2, ids.shape[1], 512)


def test_load_refuses_with_the_familys_errors(world, tmp_path):
    """Values outside the lists, no model, another base's adapter: LorafitError's family, one line."""
    for options, error, says in [
        ({"base": "nf5"}, ConfigError, "lorafit.load: base: is 'nf5'; give auto or bf16 or fp32"),
        ({"compute": "fp8"}, ConfigError, "lorafit.load: compute: is 'fp8'"),
        ({"model": tmp_path / "no.gguf"}, ModelError, "does not exist"),
        ({"adapter": tmp_path}, AdapterError, "adapter_config.json: does not exist"),
    ]:
        with pytest.raises(error, match=re.escape(says)):
            lorafit.load(**{"model": world.model, **options})
