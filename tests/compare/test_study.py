"""A whole comparison on a tiny model: same budget, figures, going on after a stop, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from builders.commands import World, run
from lorafit.compare import study
from lorafit.compare.arms import Arm, _train
from lorafit.compare.study import Study
from lorafit.config import TrainConfig, read_yaml
from lorafit.errors import MemoryLimitError
from lorafit.evaluate.heldout import held_out
from lorafit.inputs import read_rows
from lorafit.job import read_input
from lorafit.tuned import reopen

FLAGS = ["--max-steps", 4, "--batch-size", 4, "--threads", 1, "--save-every", 2, "--compute", "fp32", "--rank", 4]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def text(world) -> Path:
    path = world.folder / "text.txt"
    path.write_text("the ship sails over the sea and the sea is wide " * 30)
    return path


@pytest.fixture(scope="module")
def compared(world, text) -> dict:
    """compare.json of LoRA against full fine-tuning; its folder is world.folder / "compare"."""
    done = run(
        "compare", world.gguf, world.data, "--eval", world.test, "--out", world.folder / "compare", "--forget-on", text,
        "--json", *FLAGS,
    )  # fmt: skip
    assert done.code == 0, done.err
    return done.json


def test_both_methods_had_the_same_budget(world, compared):
    """Rows, order, steps, evaluation rows and tokens are equal; the learning rates are each method's own."""
    runs = {name: read_yaml(world.folder / "compare" / name / "run.yaml") for name in ("lora", "full")}
    for key in ("seed", "batch_size", "max_steps", "epochs", "max_length", "eval_every", "compute"):
        assert runs["lora"][key] == runs["full"][key]
    for key in ("base", "data", "evaluation", "tokenizer", "template"):
        assert runs["lora"]["identity"][key] == runs["full"]["identity"][key]
    assert compared["methods"]["lora"]["tokens"] == compared["methods"]["full"]["tokens"]
    assert compared["steps"] == 4
    assert runs["lora"]["lr"] > 9 * runs["full"]["lr"]
    assert (runs["lora"]["rank"], runs["full"]["rank"]) == (4, 16)


def test_figures_are_the_runs_own(world, compared):
    """Losses equal the reports', times and peaks are those of each process, sizes are the folders'."""
    for name, arm in compared["methods"].items():
        report = json.loads((world.folder / "compare" / name / "report.json").read_text())
        assert arm["loss"] == pytest.approx(report["adapter_loss"], rel=1e-5)
        assert compared["base_loss"] == pytest.approx(report["base_loss"], rel=1e-5)
        assert arm["peak_memory_bytes"] == report["peak_memory_bytes"]
        made = world.folder / "compare" / name / ("model" if name == "full" else "adapter")
        assert arm["bytes_on_disk"] == sum(path.stat().st_size for path in made.iterdir())
    gap = compared["differences"]["full - lora"]
    full, lora = (compared["methods"][name]["loss"] for name in ("full", "lora"))
    assert gap["mean"] == pytest.approx(full - lora, abs=1e-6)
    assert gap["low"] < gap["mean"] < gap["high"]


def test_forgetting_is_measured_on_the_file(world, text, compared):
    """The base's loss there is the base's own, and each method's difference is with it."""
    base = reopen(world.gguf, TrainConfig(compute="fp32"))
    rows = read_rows((str(text),), base.tokenizer, TrainConfig(), 256)[0].rows
    want = held_out(base.model, base.head, rows, 2048).loss
    assert compared["forget"]["losses"]["base"] == pytest.approx(want, rel=1e-5)
    for name in ("lora", "full"):
        loss, gap = compared["forget"]["losses"][name], compared["forget"]["differences"][f"{name} - base"]
        assert gap["mean"] == pytest.approx(loss - want, abs=1e-5)


def test_pages_and_advice_are_written(world, compared):
    """compare.json, .md and .html stand in OUT, with advice that has reasons."""
    out = world.folder / "compare"
    assert json.loads((out / "compare.json").read_text()) == compared
    assert all(one["because"] for one in compared["advice"])
    for name in ("compare.md", "compare.html"):
        assert f"{compared['methods']['full']['loss']:.4f}" in (out / name).read_text()


def test_a_stopped_comparison_goes_on(world, compared, tmp_path):
    """What is finished is not run again, what is missing is, and the figures come out the same."""
    out = tmp_path / "out"
    shutil.copytree(world.folder / "compare", out)
    for name in ("compare.json", "compare.md", "compare.html", "full/report.json"):
        (out / name).unlink()  # full: killed after its last checkpoint
    shutil.rmtree(out / "full" / "model")
    before = (out / "lora" / "report.json").stat().st_mtime_ns
    done = run("compare", "--resume", out, "--json")
    assert done.code == 0, done.err
    assert "full | going on after step 4" in done.err
    assert "== lora" not in done.err
    assert (out / "lora" / "report.json").stat().st_mtime_ns == before
    for name, arm in done.json["methods"].items():
        assert arm["loss"] == compared["methods"][name]["loss"]
    assert done.json["differences"] == compared["differences"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--methods", "lora"], "--methods: is lora alone, which leaves nothing to compare; give two, add --lr-sweep"),
        (["--methods", "lora,dpo"], "error: --methods: is lora,dpo; give lora, full or lora,full"),
        (["--methods", "lora,lora"], "error: --methods: is lora,lora; give lora, full or lora,full"),
        (["--eval-fraction", "0"], "error: --eval-fraction: is 0, which leaves no rows to compare on; give --eval"),
        (["--forget-on", "nowhere.txt"], "error: nowhere.txt: No such file or directory"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(arguments, line, world, tmp_path):
    """One line, exit code 2, nothing written."""
    done = run("compare", world.model, world.data, "--out", tmp_path / "out", *arguments)
    assert done.code == 2
    assert line in done.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_refused(world, compared):
    """And the line says how to go on with it; --resume takes no other settings."""
    out = world.folder / "compare"
    done = run("compare", world.model, world.data, "--out", out)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert f"is not empty; go on with: lorafit compare --resume {out}, or name another folder" in done.err
    done = run("compare", "--resume", out, "--rank", 8)
    assert "error: --resume: goes on with the comparison's own settings; leave the others out" in done.err


def test_runs_that_differ_are_not_compared(world, compared, tmp_path):
    """Where the data was changed between two runs, the comparison ends with the difference."""
    out = tmp_path / "out"
    shutil.copytree(world.folder / "compare", out)
    file = out / "full" / "run.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 1"))
    done = run("compare", "--resume", out)
    assert done.code == 2
    assert "full: has seed 1, and lora 0; start the comparison anew" in done.err


def test_a_method_that_does_not_fit_leaves_the_others(world, tmp_path, monkeypatch):
    """The table says what it lacks, the advice too; with no method that fits, that is the error."""
    settings = {"max_steps": 2, "batch_size": 4, "threads": 1, "compute": "fp32", "rank": 4, "eval": [str(world.test)]}
    found = Study(str(world.gguf), (str(world.data),), ("lora", "full"), False, None, settings)
    lacking = {"full"}

    def read(resolved, **named):
        if resolved.config.method in lacking:
            raise MemoryLimitError("--memory", "1.00 GB is 0.50 GB less than the 1.50 GB that this run needs at least")
        return read_input(resolved, **named)

    monkeypatch.setattr(study, "read_input", read)
    figures = study.compare(found, tmp_path / "out")
    assert "0.50 GB less" in figures["methods"]["full"]["failure"]
    assert figures["methods"]["lora"]["loss"] < figures["base_loss"] + 1
    assert figures["advice"][0]["say"] == "full gave no result here."
    assert "0.50 GB less" in (tmp_path / "out" / "compare.md").read_text()
    lacking.add("lora")
    with pytest.raises(MemoryLimitError):
        study.compare(found, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_adapter_settings_go_to_lora_alone(tmp_path):
    """Of the options given, rank and base are LoRA's; the rest goes to both, evaluation files one by one."""
    settings = {"rank": 8, "base": "nf4", "seed": 3, "skip_bad_rows": True, "eval": ("a.jsonl", "b.jsonl"),
                "targets": ("q_proj", "v_proj")}  # fmt: skip
    lora, full = (_train(Arm(m, 1e-3), "m", ("d",), tmp_path / m, settings) for m in ("lora", "full"))
    shared = ["--seed", "3", "--skip-bad-rows", "--eval", "a.jsonl", "--eval", "b.jsonl"]
    assert full == ["m", "d", "--out", str(tmp_path / "full"), "--method", "full", "--lr", "0.001", *shared]
    assert lora[7:] == ["0.001", "--rank", "8", "--base", "nf4", *shared, "--targets", "q_proj,v_proj"]


def test_what_is_wrong_with_a_new_comparison_costs_nothing_of_the_old(world, tmp_path):
    """--overwrite with bad data, or a file that is not there: the comparison in OUT stays, byte for byte."""
    out = tmp_path / "out"
    (out / "lora").mkdir(parents=True)
    for name in ("compare.yaml", "compare.json", "lora/run.yaml"):
        (out / name).write_text("old")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    for data in (tmp_path / "bad.jsonl", tmp_path / "nothing.jsonl"):
        assert run("compare", world.gguf, data, "--out", out, "--overwrite").code == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
