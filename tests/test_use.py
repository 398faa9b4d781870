"""preview, eval and generate as commands: what they print, exactly as the specification has it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import lorafit
from builders.commands import World, one_core, run, write_rows
from builders.models import save_folder, tiny_model
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


FIGURES = ["loss", "tokens", "perplexity", "bits_per_byte", "difference"]


def test_eval_json_has_the_base_first_and_its_figures_follow_from_each_other(world, tmp_path):
    """A list with the specification's keys; perplexity, bits per byte and differences are functions of the losses."""
    other = tmp_path / "copy"
    shutil.copytree(world.out / "adapter", other)
    adapters = ("--adapter", world.out / "adapter", "--adapter", other)
    forget = write_rows(tmp_path / "forget.jsonl", [{"text": "The ships leave the harbour."}, {"text": "日本 wins."}])
    outcome = run("eval", world.model, world.test, *adapters, "--forget-on", forget, "--json", *FP32)
    assert outcome.code == 0, outcome.err
    base, first, second = outcome.json
    assert (base["adapter"], first["adapter"], second["adapter"]) == (None, str(world.out / "adapter"), str(other))
    assert all(list(entry) == ["adapter", *FIGURES, "forget"] for entry in outcome.json)
    assert {key: first[key] for key in FIGURES} == {key: second[key] for key in FIGURES}
    for entry in outcome.json:
        for figures, plain in ((entry, base), (entry["forget"], base["forget"])):
            assert list(figures["difference"]) == ["mean", "low", "high"]
            gap = figures["difference"]
            assert gap["low"] <= gap["mean"] <= gap["high"]
            assert gap["mean"] == pytest.approx(figures["loss"] - plain["loss"], abs=1e-9)
            assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert base["difference"] == {"mean": 0, "low": 0, "high": 0}
    answers = [json.loads(line)["completion"] for line in world.test.read_text().splitlines()]
    trained_bytes = sum(len((answer + "<|im_end|>").encode()) for answer in answers)
    bits = base["loss"] * base["tokens"] / math.log(2)
    assert base["bits_per_byte"] == pytest.approx(bits / trained_bytes)


def test_eval_gives_the_losses_of_the_report(world):
    """Same rows, same adapter: report.json's losses within 1e-6, from the folder and from the GGUF file."""
    report = world.result.report
    for model in (world.model, world.gguf):
        outcome = run("eval", model, world.test, "--adapter", world.out / "adapter", "--json", *FP32)
        base, adapter = outcome.json
        assert base["loss"] == pytest.approx(report["base_loss"], abs=1e-6)
        assert adapter["loss"] == pytest.approx(report["adapter_loss"], abs=1e-6)
        assert adapter["difference"] == pytest.approx(report["difference"], abs=1e-6)


def test_eval_prints_tables_on_standard_output(world, tmp_path):
    """A line for the base and one per adapter with its interval; a second table for --forget-on."""
    forget = write_rows(tmp_path / "forget.jsonl", [{"text": "The ships leave."}])
    adapter = world.out / "adapter"
    outcome = run("eval", world.model, world.test, "--adapter", adapter, "--forget-on", forget, *FP32)
    assert outcome.code == 0
    base, adapted = world.result.report["base_loss"], world.result.report["adapter_loss"]
    assert re.search(rf"^\(base\) +{base:.4f} ", outcome.out, re.M)
    gap = rf"{adapted - base:+.4f}".replace("+", r"\+")
    assert re.search(rf"^{re.escape(str(adapter))} +{adapted:.4f} .* {gap} \(.* to .*\)$", outcome.out, re.M)
    assert f"on {forget}\n" in outcome.out
    assert len(re.findall(r"^\(base\)", outcome.out, re.M)) == 2
    assert "error" not in outcome.err


def test_one_row_has_no_interval(world, tmp_path):
    """The mean of one row's difference is known, its bounds are null: JSON has no infinity."""
    one = write_rows(tmp_path / "one.jsonl", [{"prompt": "a", "completion": "b"}])
    outcome = run("eval", world.model, one, "--adapter", world.out / "adapter", "--json", *FP32)
    gap = outcome.json[1]["difference"]
    assert gap["mean"] == pytest.approx(outcome.json[1]["loss"] - outcome.json[0]["loss"])
    assert (gap["low"], gap["high"]) == (None, None)
    assert run("eval", world.model, one, "--adapter", world.out / "adapter", *FP32).code == 0


def test_exact_match_counts_answers_that_are_the_rows_own(world, tmp_path):
    """Rows that say what the base answers, but one: base 3 of 4; the adapter's count is that of its own answers."""
    adapter = ("--adapter", world.out / "adapter")
    asked = write_rows(tmp_path / "asked.jsonl", [{"prompt": f"Say {word}"} for word in ("a", "ships", "日本", "3")])
    said = [json.loads(line) for line in run("generate", world.model, "--data", asked, *FEW).out.splitlines()]
    adapted = [
        json.loads(line) for line in run("generate", world.model, "--data", asked, *adapter, *FEW).out.splitlines()
    ]
    assert all(row["output"].strip() for row in said)
    rows = [{"prompt": row["prompt"], "completion": f" {row['output']}\n"} for row in said]
    rows[1]["completion"] += "more"
    data = write_rows(tmp_path / "data.jsonl", rows)
    words = ("eval", world.model, data, *adapter, "--exact-match", *FEW)
    base, other = run(*words, "--json").json
    assert list(base) == list(other) == ["adapter", *FIGURES, "exact_match"]
    assert base["exact_match"] == {"share": 0.75, "rows": 4, "matches": 3}
    equal = sum(a["output"].strip() == row["completion"].strip() for a, row in zip(adapted, rows, strict=True))
    assert equal < 3
    assert other["exact_match"] == {"share": equal / 4, "rows": 4, "matches": equal}
    table = run(*words).out.splitlines()
    assert re.search(r"exact match$", table[0])
    assert re.search(r"^\(base\) .* 75\.0%$", table[1])
    assert re.search(rf" {equal / 4:.1%}$", table[2])


def test_exact_match_asks_for_the_last_answer(world, tmp_path):
    """All messages before the last assistant turn are the prompt, whatever follows it; text to forget is not asked."""
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    talk += [{"role": "user", "content": "Who counts?"}]
    chat = write_rows(tmp_path / "chat.jsonl", [{"messages": talk}])
    output = run("generate", world.model, "--data", chat, *FEW, "--json").json["output"]
    answered = [*talk, {"role": "assistant", "content": output}]
    rows = [{"messages": answered}, {"messages": [*answered, talk[0]]}, {"messages": talk}]
    data = write_rows(tmp_path / "data.jsonl", rows)
    forget = write_rows(tmp_path / "forget.jsonl", [{"text": "The ships leave."}])
    [base] = run("eval", world.model, data, "--exact-match", "--forget-on", forget, "--json", *FEW).json
    assert base["exact_match"] == {"share": 2 / 3, "rows": 3, "matches": 2}
    assert list(base["forget"]) == FIGURES


def test_eval_refuses_what_it_cannot_measure(world, tmp_path):
    """Another base's adapter, a damaged model, rows with nothing to measure: one line, no half table."""
    other = save_folder(tiny_model("llama", seed=1), tmp_path / "other")
    nan = tiny_model("llama")
    with torch.no_grad():
        nan.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    save_folder(nan, tmp_path / "nan")
    adapter = ("--adapter", world.out / "adapter")
    text = write_rows(tmp_path / "text.jsonl", [{"text": "Once upon"}])
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "word " * 300, "completion": "a"}])
    for command, says in [
        ((world.model, text, "--exact-match"), f"--exact-match: {text}:1 holds no assistant's words"),
        ((world.model, long, "--exact-match", "--trained", "all"), f"{long}:1: has "),
        ((world.model, world.test, "--max-tokens", 0), "Invalid value for '--max-tokens'"),
        ((other, world.test, *adapter), "does not belong to this base"),
        ((tmp_path / "nan", world.test), "gives loss nan"),
        ((world.model, world.test, "--adapter", tmp_path), "adapter_config.json: does not exist"),
        ((world.model, world.test, "--max-length", 2), "leaves no row with a trained token"),
        ((world.model, world.test, "--forget-on", tmp_path / "no.jsonl"), "No such file or directory"),
    ]:
        outcome = run("eval", *command, *FP32)
        assert (outcome.code, outcome.out) == (2, ""), outcome
        assert outcome.err.startswith("error: ")
        assert says in outcome.err
        assert outcome.err.count("\n") == 1


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
