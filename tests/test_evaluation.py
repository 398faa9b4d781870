"""eval as a command: its JSON as the specification has it, its table, every metric, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from builders.commands import World, one_core, run, write_rows
from builders.models import save_folder, tiny_model

FP32 = ("--compute", "fp32", "--threads", 1)
FEW = ("--max-tokens", 4, *FP32)


@pytest.fixture(scope="module", autouse=True)
def _one_core():
    with one_core():
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("eval"))


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


def test_eval_prints_one_table_on_standard_output(world, tmp_path):
    """A line per measure, a column per model with its interval; --forget-on adds lines."""
    forget = write_rows(tmp_path / "forget.jsonl", [{"text": "The ships leave."}])
    adapter = world.out / "adapter"
    outcome = run("eval", world.model, world.test, "--adapter", adapter, "--forget-on", forget, *FP32)
    assert outcome.code == 0
    base, adapted = world.result.report["base_loss"], world.result.report["adapter_loss"]
    header, *lines = outcome.out.splitlines()
    assert header.split() == ["(base)", str(adapter)]
    gap = re.escape(f"{adapted - base:+.4f}")
    assert re.search(rf"^loss +{base:.4f} +{adapted:.4f}  {gap} \(.* to .*\)$", lines[0])
    names = ["loss", "perplexity", "bits per byte"]
    assert [line[: line.index("  ")] for line in lines] == [*names, *(f"{name} on {forget}" for name in names)]
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
    none = {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert base["exact_match"] == {"share": 0.75, "rows": 4, "matches": 3, "difference": none}
    equal = sum(a["output"].strip() == row["completion"].strip() for a, row in zip(adapted, rows, strict=True))
    assert equal < 3
    gap = other["exact_match"].pop("difference")
    assert other["exact_match"] == {"share": equal / 4, "rows": 4, "matches": equal}
    assert gap["mean"] == equal / 4 - 0.75
    assert gap["low"] < gap["mean"] < gap["high"]
    assert run(*words[:-7], "--metrics", "exact", *FEW, "--json").json[0] == base
    line = run(*words).out.splitlines()[-1]
    assert re.search(rf"^exact match +75\.0% +{equal / 4:.1%}  -\d", line)


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
    assert (base["exact_match"]["matches"], base["exact_match"]["rows"]) == (2, 3)
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
        ((world.model, world.test, "--metrics", "bleu,meteor"), "--metrics: 'meteor' is none; there are exact,"),
        ((world.model, world.test, "--metrics", "json"), f"the answer of {world.test}:1 is no JSON"),
        ((world.model, text, "--metrics", "bleu"), f"--metrics bleu: {text}:1 holds no assistant's words"),
        ((world.model, world.test, "--labels", text), "--labels: are for --metrics choice"),
        ((world.model, world.test, "--metrics", "choice", "--labels", text), "--labels: are 1;"),
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


def rows_of_json(folder: Path) -> Path:
    return write_rows(folder / "json.jsonl", [{"prompt": f"Say {n}", "completion": f'{{"n": {n}}}'} for n in range(4)])


def test_every_metric_stands_in_the_list_and_in_the_table(world, tmp_path):
    """Keys as documented, each with the rows it was measured on; the table has a line for each."""
    words = ("eval", world.model, rows_of_json(tmp_path), "--adapter", world.out / "adapter", *FEW)
    words += ("--metrics", "exact,normalised,choice,json,bleu,rouge")
    base, adapter = run(*words, "--json").json
    assert list(base) == list(adapter)
    assert list(base)[6:] == ["exact_match", "normalised_match", "choice", "json", "bleu", "rouge"]
    for entry in (base, adapter):
        assert [entry[key]["rows"] for key in list(base)[6:]] == [4] * 6
        assert list(entry["choice"]) == ["accuracy", "rows", "labels", "mean_chance", "difference"]
        assert entry["choice"]["labels"] == 4
        assert 0 < entry["choice"]["mean_chance"] < 1
        assert list(entry["json"]) == ["valid", "field_f1", "rows"]
        assert list(entry["rouge"]) == ["rouge1", "rouge2", "rougeL", "rows"]
        assert list(entry["bleu"]) == ["score", "signature", "rows", "difference"]
    lines = run(*words).out.splitlines()[1:]
    measures = ["loss", "perplexity", "bits per byte", "exact match", "normalised match", "choice", "JSON valid"]
    measures += ["JSON field F1", "ROUGE-1", "ROUGE-2", "ROUGE-L", "choice, mean chance", "BLEU"]
    assert [line[: line.index("  ")] for line in lines] == measures


def test_labels_come_from_the_file_or_from_the_answers(world, tmp_path):
    """More labels than the rows use make the choice harder; without a file they are the rows' own answers."""
    data = rows_of_json(tmp_path)
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f'{{"n": {n}}}\n' for n in range(6)))
    words = ("eval", world.model, data, "--metrics", "choice", "--json", *FP32)
    [own], [more] = run(*words).json, run(*words, "--labels", labels).json
    assert (own["choice"]["labels"], more["choice"]["labels"]) == (4, 6)
    assert more["choice"]["mean_chance"] < own["choice"]["mean_chance"]
    assert more["choice"]["accuracy"] <= own["choice"]["accuracy"]
