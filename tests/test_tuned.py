"""Full fine-tuning from outside: the same files, stops and reports as with an adapter, and a model that others load."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorafit
from builders.commands import World, run
from builders.models import save_folder, tiny_model
from builders.processes import finish, kill_at_random, metrics, seconds_of
from lorafit.formats.safetensors import open_file
from lorafit.training.metrics import read_metrics

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3]])
QUICK = {"method": "full", "threads": 1, "lr": 0.003, "max_steps": 6, "batch_size": 4, "save_every": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("tuned"))


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*") if p.is_file()}  # fmt: skip


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["model", "gguf"])
def test_the_model_is_what_was_evaluated(kind, compute, world, tmp_path):
    """OUT/model in place of OUT/adapter; its held-out loss is the best evaluation's and falls; transformers and lorafit
    load it with its template; the base's bytes are as they were."""
    source = getattr(world, kind)
    before = files(world.folder / "model") | {"": hashlib.sha256(world.gguf.read_bytes()).hexdigest()}
    result = lorafit.train(
        model=source, data=world.data, eval=world.test, out=tmp_path / "out", compute=compute, **QUICK
    )
    assert files(world.folder / "model") | {"": hashlib.sha256(world.gguf.read_bytes()).hexdigest()} == before
    assert result.adapter is None
    assert result.model == tmp_path / "out" / "model"
    made = {p.name for p in (tmp_path / "out").iterdir()} - {".lock"}
    assert made == {"run.yaml", "metrics.jsonl", "checkpoints", "model", "report.html", "report.json"}
    best = min(line["eval_loss"] for line in read_metrics(tmp_path / "out/metrics.jsonl") if "eval_loss" in line)
    assert result.report["adapter_loss"] == pytest.approx(best, rel=1e-6)
    assert best < result.report["base_loss"]
    assert result.report["trainable_parameters"] == result.report["total_parameters"] == 48_288
    ours = lorafit.load(result.model, compute=compute)
    theirs = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    exact = lorafit.load(result.model, compute="fp32")
    with torch.no_grad():
        assert torch.allclose(exact(input_ids=IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-5)
    stored = open_file(result.model / "model.safetensors")
    assert set(stored.dtypes.values()) == {"F32" if compute == "fp32" else "BF16"}
    chat = [{"role": "user", "content": "What is 3?"}]
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    want = lorafit.load(source).tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == want
    assert tokenizer.encode("What is 3?", add_special_tokens=False) == ours.tokenizer.encode(
        "What is 3?", add_special_tokens=False
    )


def test_a_tied_matrix_is_stored_once_and_learns_from_both_ends(tmp_path):
    """Embedding and head are one tensor in the file, and it has changed for tokens that are only read."""
    folder = save_folder(tiny_model("qwen2"), tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": "yes"}) + "\n" for n in range(12)))
    result = lorafit.train(model=folder, data=data, eval_fraction=0, out=tmp_path / "out", compute="fp32", **QUICK)
    before, after = (open_file(path / "model.safetensors") for path in (folder, result.model))
    assert before.shapes == after.shapes
    assert "lm_head.weight" not in after.shapes
    moved = (before.load("model.embed_tokens.weight") != after.load("model.embed_tokens.weight")).any(1)
    assert moved.all()  # the head moves every row, each a little, through the softmax


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "llama4_text", "deepseek_v3", "qwen3_next", "gpt_oss"])
def test_a_mixture_is_trained_whole(family, world, tmp_path):
    """Experts, router and sinks move with everything else; transformers loads the model with the same logits."""
    folder = save_folder(tiny_model(family), tmp_path / "model")
    files = {"model": folder, "data": world.data, "eval": world.test, "out": tmp_path / "out"}
    result = lorafit.train(**files, compute="fp32", **QUICK)
    assert result.report["adapter_loss"] < result.report["base_loss"]
    assert result.report["trainable_parameters"] == result.report["total_parameters"]
    before, after = (open_file(path / "model.safetensors") for path in (folder, result.model))
    assert before.shapes == after.shapes
    still = [name for name in before.shapes if torch.equal(before.load(name), after.load(name))]
    assert not [name for name in still if "correction_bias" not in name]  # which no gradient reaches
    theirs = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    with torch.no_grad():
        ours = lorafit.load(result.model, compute="fp32")(input_ids=IDS).logits
        assert torch.allclose(ours, theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_a_model_without_template_takes_the_plain_one_along(world, tmp_path):
    """Rows were written by the plain template, so the folder says so; continued pretraining adds none."""
    text = tmp_path / "text.txt"
    text.write_text("the ship sails over the sea and the sea is wide " * 40)
    for data, told in ((world.data, True), (text, False)):
        out = tmp_path / data.stem
        result = lorafit.train(model=world.plain_gguf, data=data, eval_fraction=0, out=out, **QUICK)
        assert (result.model / "chat_template.jinja").exists() == told


def test_killed_at_random_instants_it_ends_in_the_same_bytes(world, tmp_path):
    """SIGKILL, resume, again and again: model and metrics equal those of the run that was never stopped."""
    options = {**QUICK, "model": str(world.model), "data": str(world.data), "max_steps": 8, "save_every": 1,
               "eval_every": 4, "compute": "bf16"}  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "killed"
    finish({**options, "out": str(whole)})
    length = seconds_of({**options, "out": str(tmp_path / "timed")})
    kills = kill_at_random({**options, "out": str(out)}, random.Random(5), longest=length * 0.9, most=3)
    while not kills:  # the machine was quick
        shutil.rmtree(out)
        kills = kill_at_random({**options, "out": str(out)}, random.Random(6), longest=length * 0.6, most=3)
    assert files(whole / "model") == files(out / "model")
    assert metrics(whole) == metrics(out)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--rank", "16"], "--rank is for adapters"),
        (["--targets", "q_proj", "--alpha", "8"], "--alpha, --targets are for adapters"),
        (["--base", "nf4"], "--base is for adapters"),
        (["--dropout", "0.1", "--base", "packed"], "--dropout, --base are for adapters"),
    ],
)
def test_settings_of_adapters_are_refused(options, named, world, tmp_path):
    """Given with --method full, each is named in one line, and nothing is written."""
    done = run("train", world.model, world.data, "--out", tmp_path / "out", "--method", "full", *options)
    assert done.code == 2
    assert f"error: --method full: trains all weights, in fp32; {named} on a frozen base; leave " in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_run_yaml_repeats_the_run(world, tmp_path):
    """Reading back what a full run resolved gives the same model, since it holds adapter settings' defaults alone."""
    lorafit.train(model=world.model, data=world.data, out=tmp_path / "a", **QUICK)
    again = run("train", "--config", tmp_path / "a" / "run.yaml", "--out", tmp_path / "b")
    assert again.code == 0, again.err
    assert files(tmp_path / "a" / "model") == files(tmp_path / "b" / "model")


def test_the_output_says_what_it_takes_and_what_was_dequantised(world, tmp_path):
    """Bytes of weights, gradients and AdamW's state, disk, and the learning rate's rule."""
    options = {key: value for key, value in QUICK.items() if key != "lr"}
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    done = run("train", world.gguf, world.data, "--out", tmp_path / "out", *flags)
    assert done.code == 0, done.err
    assert "trained   48,288 parameters: 0.2 MB in fp32, as much of gradients, 0.4 MB of AdamW" in done.err
    assert "5e-5 x (2000 / 32)^0.781" in done.err
    assert "disk      2.5 MB at most" in done.err
    assert f"model     {tmp_path / 'out' / 'model'}" in done.err
