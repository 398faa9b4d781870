"""Whole runs of each kind of adapter: trained, stopped and resumed, gone on from, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorafit
from builders.architectures import GEMMA4, tiny
from builders.commands import QUICK, World, run
from builders.gguf_files import write_tiny_gguf
from builders.models import save_folder, tiny_model
from builders.tokenizers_tiny import tiny_gguf_metadata
from lorafit.errors import AdapterError, Interrupted
from lorafit.formats.tokenizer import load_tokenizer
from lorafit.run import resume
from lorafit.training import loop

KINDS = {
    "scales": {
        "use_rslora": True,
        "lora_plus_ratio": 4.0,
        "rank_pattern": ["q_proj=2"],
        "alpha_pattern": ["down_proj=8"],
    },
    "dora": {"use_dora": True},
    "pissa": {"init": "pissa", "dropout": 0.1},
    "loftq": {"init": "loftq", "base": "nf4", "rank": 8},
    "eva": {"init": "eva", "dropout": 0.1},
    "biases": {"bias": "all", "targets": ["q_proj"]},
    "vocabulary": {"targets": ["q_proj", "embed_tokens", "lm_head"], "lr": 0.001},
    "whole": {"modules_to_save": ["embed_tokens"], "targets": ["mlp"]},
    "rows": {"train_tokens": ["<|im_end|>"], "targets": ["model.layers.1.*"]},
    "experts": {"targets": ["attention", "experts"], "use_rslora": True, "lora_plus_ratio": 4.0},
}
MODELS = {"loftq": "wide", "biases": "tied", "whole": "tied", "experts": "mixture"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """Tiny models and data."""
    return World(tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A model whose rows divide into NF4's blocks, and one with biases and a tied head."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "wide": save_folder(tiny_model("llama", hidden_size=64, intermediate_size=128), folder / "wide"),
        "tied": save_folder(tiny_model("qwen2"), folder / "tied"),
        "mixture": save_folder(tiny_model("qwen3_moe"), folder / "mixture"),
    }


def options(kind: str, world: World, models: dict[str, Path]) -> dict[str, object]:
    model = models[MODELS[kind]] if kind in MODELS else world.model
    return {
        **QUICK,
        "model": model,
        "data": world.data,
        "eval": world.test,
        "max_steps": 4,
        "save_every": 2,
        **KINDS[kind],
    }


def stop_after(step: int, monkeypatch) -> None:
    """A signal in that step of the next run."""
    real = loop._train_step

    def stopping(run, optimizer, number):
        real(run, optimizer, number)
        run.stop.signal_number = 15 if number == step else 0

    monkeypatch.setattr(loop, "_train_step", stopping)


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_equals_never_stopped(kind, world, models, tmp_path, monkeypatch):
    """Every kind learns, and its adapter has the same bytes whether the run was stopped or not; `info` says its kind;
    loaded on the plain base the adapter gives the loss of the report; a run goes on from it."""
    settings = options(kind, world, models)
    result = lorafit.train(out=tmp_path / "whole", **settings)
    stop_after(2, monkeypatch)
    with pytest.raises(Interrupted):
        lorafit.train(out=tmp_path / "parts", **settings)
    monkeypatch.undo()
    resume(tmp_path / "parts")
    for name in ("adapter_model.safetensors", "adapter_config.json", "lorafit.json"):
        assert (tmp_path / "whole/adapter" / name).read_bytes() == (tmp_path / "parts/adapter" / name).read_bytes()
    assert result.report["adapter_loss"] < result.report["base_loss"]
    planned = lorafit.plan(**settings)
    assert planned.trainable_parameters == result.report["trainable_parameters"]
    inexact = 100 if kind == "experts" else 0  # their names in the file are others
    assert planned.adapter_bytes == pytest.approx(result.report["adapter_bytes"], abs=inexact)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    seen = min(line["eval_loss"] for line in lines if "eval_loss" in line)  # in the midst of training
    assert result.report["adapter_loss"] == pytest.approx(seen, rel=1e-6)

    told = run("info", result.adapter, "--json").json["method"]
    assert told == json.loads((result.adapter / "lorafit.json").read_text())["method"]
    given = {name: str(settings[name]) for name in ("base", "compute") if name in settings}
    flags = [word for name, value in given.items() for word in (f"--{name}", value)]
    measured = run("eval", settings["model"], world.test, "--adapter", result.adapter, *flags, "--json").json
    assert measured[1]["loss"] == pytest.approx(result.report["adapter_loss"], rel=1e-5)

    kept = {**QUICK, "max_steps": 1, **{name: settings[name] for name in ("model", "data", "eval")}, **given}
    more = lorafit.train(out=tmp_path / "more", init_adapter=result.adapter, **kept)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (result.adapter, more.adapter))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_output_says_what_is_computed_how(world, tmp_path):
    """The kind of adapter; layers of these kinds are not transformers' own, of which the output would tell."""
    words = [world.model, world.data, "--rank", 4, "--max-steps", 1, "--threads", 1, "--eval-fraction", 0]
    dora = run("train", *words, "--use-dora", "--out", tmp_path / "dora")
    assert "rank 4, alpha 32, DoRA" in dora.err
    pissa = run("train", *words, "--init", "pissa", "--out", tmp_path / "pissa")
    assert "rank 4, alpha 32, PiSSA" in pissa.err
    assert "transformers' own" not in dora.err + pissa.err


@pytest.mark.parametrize(("init", "words"), [("pissa", "PiSSA"), ("loftq", "LoftQ"), ("eva", "EVA")])
def test_an_adapter_says_how_it_started(init, words, world, tmp_path, monkeypatch):
    """The run's output, `info` and the model card; of a run that was stopped and went on too."""
    wide = save_folder(tiny_model("llama", hidden_size=64, intermediate_size=128), tmp_path / "wide")
    files = {"model": wide, "data": world.data, "eval": world.test, "base": "nf4", "init": init}
    stop_after(1, monkeypatch)
    with pytest.raises(Interrupted):
        lorafit.train(out=tmp_path / "out", **{**QUICK, **files, "max_steps": 2, "save_every": 1, "rank": 4})
    monkeypatch.undo()
    resume(tmp_path / "out")
    adapter = tmp_path / "out" / "adapter"
    assert run("info", adapter, "--json").json["method"] == f"rank 4, alpha 32, {words}"
    assert f"LoRA: rank 4, alpha 32, {words}; trained" in (adapter / "README.md").read_text()


REFUSED = {
    "pissa from an adapter": (
        ["--init", "pissa", "--init-adapter", "x"],
        "--init: is pissa, and --init-adapter has",
    ),
    "eva from an adapter": (["--init", "eva", "--init-adapter", "x"], "--init: is eva, and --init-adapter has"),
    "eva of everything": (["--init", "eva", "--method", "full"], "--init are for adapters on a frozen base"),
    "eva on the head": (
        ["--init", "eva", "--targets", "q_proj,lm_head"],
        "--init eva: is not made for lm_head; leave it out of --targets",
    ),
    "dora from an adapter": (["--use-dora", "--init-adapter", "x"], "--use-dora: is True, and --init-adapter"),
    "loftq on 16 bits": (["--init", "loftq"], "--init: is loftq, and the base is in fp32; give --base nf4"),
    "new tokens of a whole embedding": (
        ["--new-tokens", "ships", "--modules-to-save", "embed_tokens"],
        "--new-tokens: model.embed_tokens is trained in another way already; leave it out, or --targets and",
    ),
    "odd pattern": (["--rank-pattern", "q_proj=x"], "--rank-pattern: holds q_proj=x; give NAME=RANK, 1 to 4096"),
    "odd ratio": (["--lora-plus-ratio", "0"], "--lora-plus-ratio: is 0.0; give a number above 0"),
    "no such token": (["--train-tokens", "<nope>"], "--train-tokens: '<nope>' is no token of the model"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(fault, world, tmp_path):
    """One line, exit code 2, no folder."""
    flags, words = REFUSED[fault]
    outcome = run("train", world.model, world.data, "--compute", "fp32", "--rank", 4, "--out", tmp_path / "out", *flags)
    assert outcome.code == 2
    errors = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert words in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_4_bits_already_cannot_begin_loftq(models, tmp_path):
    """What quantising took away is not in the file: refused in one line."""
    lorafit.save_nf4(lorafit.load(models["wide"], base="nf4", compute="fp32"), tmp_path / "nf4")
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    outcome = run("train", tmp_path / "nf4", data, "--base", "nf4", "--init", "loftq", "--out", tmp_path / "out",
                  "--eval-fraction", 0)  # fmt: skip
    assert outcome.code == 2
    assert "holds 4 bits only" in outcome.err


def test_loftq_begins_nearer_to_the_base_than_4_bits_alone(models, world, tmp_path):
    """X15: with the adapter's start the logits are nearer to the 16-bit model's than without; no step was taken."""
    from lorafit.adapter.attach import attach
    from lorafit.model.sources import open_source

    source, ids = open_source(models["wide"]), torch.tensor([[5, 9, 200, 31, 7]])
    exact = lorafit.load(models["wide"], base="fp32", compute="fp32")(input_ids=ids).logits
    four = lorafit.load(models["wide"], base="nf4", compute="fp32")
    gaps = [float((four(input_ids=ids).logits - exact).detach().norm())]
    attach(four, rank=32, alpha=32, init="loftq", originals=lambda path: source.load(f"{path}.weight"))
    gaps.append(float((four(input_ids=ids).logits - exact).detach().norm()))
    assert gaps[1] < 0.6 * gaps[0]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("spare", [0, 1, 9])
def test_new_tokens_come_back_on_the_plain_base(family, spare, world, tmp_path, monkeypatch):
    """Texts become tokens of their own, beyond the embedding's rows or in its spare ones, tied or not: trained,
    stopped and resumed to the same bytes, and come back on the plain base with nothing resized; PEFT, whose base must
    be resized, gives the same logits; merged, a plain folder with the larger vocabulary does too."""
    rows = load_tokenizer(world.model).vocab_size + spare
    model = save_folder(tiny_model(family, vocab_size=rows), tmp_path / "model")
    files = {"model": model, "data": world.test, "eval": world.test}
    settings = {
        **QUICK,
        **files,
        "max_steps": 4,
        "save_every": 2,
        "targets": ["q_proj"],
        "new_tokens": ["ships", "<sql>"],
    }
    result = lorafit.train(out=tmp_path / "whole", **settings)
    stop_after(2, monkeypatch)
    with pytest.raises(Interrupted):
        lorafit.train(out=tmp_path / "parts", **settings)
    monkeypatch.undo()
    again = resume(tmp_path / "parts")
    assert all(again.report[name] == result.report[name] for name in ("base_loss", "adapter_loss"))
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert result.report["adapter_loss"] < result.report["base_loss"]

    loaded = lorafit.load(model, adapter=result.adapter, compute="fp32")
    ids = loaded.tokenizer("How many ships <sql>", return_tensors="pt", add_special_tokens=False).input_ids
    new = [rows - spare, rows - spare + 1]
    assert [number for number in ids[0].tolist() if number in new] == new
    theirs = tiny_model(family, vocab_size=rows)
    width = max(rows, new[-1] + 1)
    theirs.resize_token_embeddings(width)
    theirs = peft.PeftModel.from_pretrained(theirs, result.adapter)
    with torch.no_grad():
        ours, logits = loaded(input_ids=ids).logits, theirs(ids).logits
    assert ours.shape[-1] == width
    kept = [n for n in range(width) if n < rows or n in new]
    assert float((ours - logits)[..., kept].abs().max() / logits.abs().max()) < 1e-5

    merged = tmp_path / "merged"
    done = run("merge", model, result.adapter, "--out", merged, "--dtype", "fp32")
    assert done.code == 0, done.err
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == width
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    assert tokenizer("How many ships <sql>", add_special_tokens=False)["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        assert float((plain(ids).logits - ours).abs().max() / ours.abs().max()) < 1e-5
    measured = run("eval", merged, world.test, "--compute", "fp32", "--json").json
    assert measured[0]["loss"] == pytest.approx(result.report["adapter_loss"], rel=1e-5)

    more = lorafit.train(out=tmp_path / "more", init_adapter=result.adapter, **{**QUICK, **files, "max_steps": 1})
    assert json.loads((more.adapter / "lorafit.json").read_text())["new_tokens"] == ["ships", "<sql>"]
    assert (
        run("generate", model, "--adapter", result.adapter, "--prompt", "How many ships?", "--max-tokens", 2).code == 0
    )


def test_new_tokens_have_rows_in_a_table_for_the_layers(world, tmp_path):
    """Gemma 4's small models have a second embedding: planned to the byte, and merged for transformers."""
    rows = load_tokenizer(world.model).vocab_size
    sizes = {"vocab_size": rows, "vocab_size_per_layer_input": rows}
    model = save_folder(tiny("gemma4_text", **{**GEMMA4["small"], **sizes}), tmp_path / "model")
    settings = {**QUICK, "model": model, "data": world.data, "eval": world.test, "max_steps": 2}
    settings |= {"targets": ["q_proj"], "new_tokens": ["ships", "<sql>"]}
    result = lorafit.train(out=tmp_path / "out", **settings)
    planned = lorafit.plan(**settings)
    assert planned.trainable_parameters == result.report["trainable_parameters"]
    assert planned.adapter_bytes == result.report["adapter_bytes"]
    done = run("merge", model, result.adapter, "--out", tmp_path / "merged", "--dtype", "fp32")
    assert done.code == 0, done.err
    ids = torch.tensor([[5, 9, rows, rows + 1]])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids, use_cache=False).logits
        ours = lorafit.load(model, adapter=result.adapter, compute="fp32")(input_ids=ids, use_cache=False).logits
    assert float((theirs - ours).abs().max() / ours.abs().max()) < 1e-5


def test_an_adapter_with_new_tokens_is_evaluated_as_its_run_was(world, tmp_path):
    """Base and adapter have the losses of the run's report, and `preview` the run's tokens."""
    files = {"model": world.model, "data": world.data, "eval": world.test}
    result = lorafit.train(out=tmp_path / "out", **{**QUICK, **files, "max_steps": 3, "new_tokens": ["ships"]})
    done = run("eval", world.model, world.test, "--adapter", result.adapter, "--compute", "fp32", "--json")
    assert done.code == 0, done.err
    losses = [entry["loss"] for entry in done.json]
    assert losses == pytest.approx([result.report["base_loss"], result.report["adapter_loss"]], abs=1e-6)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "How many ships are there?", "completion": "two"}\n')
    looked = run("preview", world.model, rows, "--new-tokens", "ships", "--json")
    assert "ships" in [token["text"] for token in looked.json["rows"][0]["tokens"]]


@pytest.mark.parametrize("kind", ["gguf", "listed"])
def test_a_merged_folder_has_the_new_tokens_whatever_the_base_is(kind, world, tmp_path):
    """A GGUF file has its tokenizer inside; a folder's tokenizer_config.json may list the added tokens once more:
    transformers reads the merged folder as training read the text, and gives the logits."""
    model = world.model
    if kind == "gguf":
        wide = tiny_model("llama", hidden_size=64, intermediate_size=96)
        model = write_tiny_gguf(tmp_path / "model.gguf", wide, "llama", tiny_gguf_metadata(), "Q4_0")
    else:
        model = shutil.copytree(world.model, tmp_path / "model")
        AutoTokenizer.from_pretrained(model).save_pretrained(model)
        file = model / "tokenizer_config.json"
        known = {"0": {"content": load_tokenizer(model).backend.id_to_token(0), "special": True}}
        file.write_text(json.dumps({**json.loads(file.read_text()), "added_tokens_decoder": known}))
    files = {"model": model, "data": world.data, "eval": world.test}
    result = lorafit.train(out=tmp_path / "out", **{**QUICK, **files, "max_steps": 2, "new_tokens": ["ships", "<sql>"]})
    done = run("merge", model, result.adapter, "--out", tmp_path / "merged", "--dtype", "fp32")
    assert done.code == 0, done.err
    loaded = lorafit.load(model, adapter=result.adapter, compute="fp32")
    ids = loaded.tokenizer("How many ships <sql>", return_tensors="pt", add_special_tokens=False).input_ids
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("How many ships <sql>", add_special_tokens=False)["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        ours = loaded(input_ids=ids).logits
    assert float((theirs - ours).abs().max() / ours.abs().max()) < 1e-5
    assert run("eval", tmp_path / "merged", world.test, "--json").code == 0


@pytest.mark.parametrize("kind", ["gguf", "folder", "folder with spare rows"])
def test_exports_have_the_new_tokens(kind, world, tmp_path, monkeypatch):
    """`gguf-merged` holds them in its tokenizer and in rows of its embedding and head: text has the same ids and the
    same logits in the file alone. `ollama` is made of such a file; `peft` has a tokenizer with them. (llama.cpp
    loads no models this tiny.)"""
    monkeypatch.setattr("lorafit.export.verify.find_spec", lambda name: None)
    if kind == "gguf":
        wide = tiny_model("llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=False)
        model = write_tiny_gguf(tmp_path / "model.gguf", wide, "llama", tiny_gguf_metadata(), "Q4_0")
    else:
        rows = load_tokenizer(world.model).vocab_size + (1 if "spare" in kind else 0)
        model = save_folder(tiny_model("llama", vocab_size=rows), tmp_path / "model")
    files = {"model": model, "data": world.data, "eval": world.test}
    result = lorafit.train(out=tmp_path / "out", **{**QUICK, **files, "max_steps": 2, "new_tokens": ["ships", "<sql>"]})
    for to in ("gguf-merged", "ollama", "peft"):
        dtype = [] if to == "peft" else ["--dtype", "F32"]
        done = run("export", model, result.adapter, "--to", to, *dtype, "--out", tmp_path / to)
        assert done.code == 0, done.err
    loaded = lorafit.load(model, adapter=result.adapter, compute="fp32")
    ids = loaded.tokenizer("How many ships <sql>", return_tensors="pt", add_special_tokens=False).input_ids
    for file in (tmp_path / "gguf-merged", tmp_path / "ollama" / "model.gguf"):
        alone = lorafit.load(file, compute="fp32")
        again = alone.tokenizer("How many ships <sql>", return_tensors="pt", add_special_tokens=False).input_ids
        assert again.tolist() == ids.tolist()
        with torch.no_grad():
            theirs, ours = alone(input_ids=ids).logits, loaded(input_ids=ids).logits
        assert float((theirs - ours).abs().max() / ours.abs().max()) < 1e-5
    assert (tmp_path / "ollama" / "Modelfile").read_text().startswith("FROM ./model.gguf\nTEMPLATE")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "peft")
    assert tokenizer("How many ships <sql>", add_special_tokens=False)["input_ids"] == ids[0].tolist()


def test_new_tokens_are_refused_where_they_cannot_be(world, tmp_path):
    """One that is a token already; an adapter on a model that was not given its tokens; `eval` beside another one."""
    files = {"model": world.model, "data": world.data, "eval": world.test}
    result = lorafit.train(out=tmp_path / "out", **{**QUICK, **files, "max_steps": 1, "new_tokens": ["ships"]})
    known = run("train", world.model, world.data, "--out", tmp_path / "no", "--new-tokens", "<|im_end|>")
    assert (known.code, "is a token already; give it to --train-tokens" in known.err) == (2, True)
    twice = run("train", world.model, world.data, "--out", tmp_path / "no", "--new-tokens", "ships,ships")
    assert (twice.code, "error: --new-tokens: names a token twice" in twice.err) == (2, True)
    two = ["--adapter", result.adapter, "--adapter", result.adapter]
    measured = run("eval", world.model, world.test, *two)
    assert (measured.code, "adds tokens, and so reads the rows in its own way" in measured.err) == (2, True)
    for words in (
        ("merge", "--as-adapter"),
        ("merge", result.adapter),
        ("export", "--to", "portable"),
        ("export", "--to", "gguf"),
        ("export", "--to", "mlx"),
    ):
        refused = run(words[0], world.model, result.adapter, *words[1:], "--out", tmp_path / "exported")
        assert (refused.code, "adds 1 tokens, for which there is no room" in refused.err) == (2, True)
        assert not (tmp_path / "exported").exists()
    with pytest.raises(AdapterError, match="adds 1 tokens that the model's tokenizer was not given"):
        lorafit.load_adapter(lorafit.load(world.model, compute="fp32"), result.adapter)
