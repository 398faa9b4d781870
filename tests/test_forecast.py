"""The laws of `lorafit plan`: it says what training then finds, from files, headers, configurations and names."""

from __future__ import annotations

import json

import pytest

import lorafit
from builders.architectures import CONFIGS, GEMMA4, WRAPPED, folder_of, tiny
from builders.commands import QUICK, World, run
from builders.models import OWN, frozen, tiny_model
from lorafit import catalogue
from lorafit.adapter.experts import expert_layers
from lorafit.errors import ConfigError, ModelError
from lorafit.model.load import frozen_parameters
from lorafit.planning.devices import DEVICES

KEYS = {"fits", "memory_bytes", "seconds", "tokens", "trained_tokens", "trainable_parameters", "total_parameters",
        "adapter_bytes", "settings"}  # fmt: skip
PARAMETERS = {  # billions, as their authors give them (of multimodal ones, the text model's)
    "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.6, "qwen3-8b": 8.19, "qwen3-30b-a3b": 30.5, "qwen3-0.6b": 0.596,
    "mixtral-8x7b": 46.7, "mistral-large-2": 122.6, "gemma-3-1b": 1.0, "llama-4-scout": 107.8, "deepseek-v3": 671,
    "llama-3.1-405b": 405, "qwen3-coder-480b-a35b": 480, "qwen3.5-35b-a3b": 35, "qwen3.5-122b-a10b": 122,
    "qwen3.5-397b-a17b": 397, "mistral-small-4": 119, "olmo-2-7b": 7.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def test_the_plan_says_what_training_finds(world):
    """Tokens, trained tokens, parameters and the adapter's file are exact; settings are those that the run takes."""
    report = world.result.report
    found = lorafit.plan(model=world.model, data=world.data, eval=world.test, **QUICK)
    for name in ("tokens", "trained_tokens", "trainable_parameters", "total_parameters", "adapter_bytes"):
        assert getattr(found, name) == report[name], name
    assert found.fits
    assert found.memory_bytes["total"] == sum(size for name, size in found.memory_bytes.items() if name != "total")
    assert found.settings["rank"] == QUICK["rank"]


def test_a_report_has_the_prediction_beside_the_measure(world):
    """Made before step 1: bytes and seconds, both positive, and the page shows them."""
    predicted = world.result.report["predicted"]
    assert predicted["memory_bytes"] > 0
    assert predicted["seconds"] > 0
    assert "predicted" in (world.out / "report.html").read_text()


def test_json_has_the_keys_of_the_page(world):
    """One document on standard output, nothing else."""
    outcome = run("plan", world.gguf, world.data, "--json", "--rank", "4")
    assert outcome.code == 0
    assert outcome.json.keys() >= KEYS
    assert outcome.json["memory_bytes"]["total"] > 0


def test_the_table_is_readable(world):
    """Parts of memory, time, tokens, parameters and settings, each on a line."""
    outcome = run("plan", world.gguf, "--rows", "100", "--length", "64")
    for word in ("memory", "at the peak", "optimizer", "tokens", "parameters", "micro_batch_tokens"):
        assert word in outcome.out


def test_a_folder_with_only_a_configuration(world, tmp_path):
    """No weights and no tokenizer: parameters are exact, tokens are estimated, and that is said."""
    (tmp_path / "config.json").write_text((world.model / "config.json").read_text())
    outcome = run("plan", tmp_path, world.data, "--json")
    named = run("plan", tmp_path / "config.json", world.data, "--json").json
    assert named["memory_bytes"].keys() == outcome.json["memory_bytes"].keys()
    assert named["total_parameters"] == outcome.json["total_parameters"]
    whole = run("plan", world.model, world.data, "--json").json
    assert outcome.json["total_parameters"] == whole["total_parameters"]
    assert any("estimated" in note for note in outcome.json["notes"])


@pytest.mark.parametrize(
    ("name", "changes"), [*((name, {}) for name in {**CONFIGS, **OWN}), ("gemma4_text", GEMMA4["small"])]
)
def test_every_architecture_has_the_parameters_that_training_finds(tmp_path, name, changes):
    """From a configuration alone: all numbers, and those of adapters on linear layers and experts."""
    model = (tiny if name in CONFIGS else tiny_model)(name, **changes)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(model.config.to_dict()))
    real = frozen(model, tmp_path / "whole").model
    targets = ["all-linear", *(["experts"] if expert_layers(real) else [])]
    found = lorafit.plan(model=tmp_path / "bare", rows=8, length=16, rank=2, targets=targets)
    lorafit.attach(real, 2, 4, targets)
    assert found.trainable_parameters == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found.total_parameters == found.trainable_parameters + frozen_parameters(real)
    whole = lorafit.plan(model=tmp_path / "whole", rows=8, length=16, method="full")
    assert whole.trainable_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_built_in_names_have_their_published_size(name):
    """Total parameters from the published configuration alone, within 1 % of what is published."""
    assert name in catalogue.names()
    found = lorafit.plan(model=name, rows=8, length=64, device_memory="100000GB")
    total = found.total_parameters - found.trainable_parameters
    assert total == pytest.approx(PARAMETERS[name] * 1e9, rel=0.01)


def test_a_budget_that_is_too_small_is_exit_code_3(world):
    """Both commands say so in one line, with the ways out; training writes nothing; the plan still answers."""
    planned = run("plan", world.gguf, world.data, "--memory", "10MB", "--json")
    assert planned.code == 3
    assert planned.json["fits"] is False
    out = world.folder / "small"
    trained = run("train", world.gguf, world.data, "--out", out, "--memory", "10MB")
    assert trained.code == 3
    errors = [line for line in trained.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "the cheapest ways out" in errors[0]
    assert not out.exists()


def test_what_is_too_small_is_told_in_units_that_can_be_read(world):
    """Megabytes below a tenth of a GB, never `0.00 GB`; for a device the way out is the device's option."""
    planned = run("plan", world.gguf, world.data, "--device-memory", "48")
    (line,) = [line for line in planned.err.splitlines() if line.startswith("error:")]
    assert planned.code == 3
    assert line.startswith("error: the device's memory: 0.0 MB is ")
    assert "--device-memory" in line.split("ways out: ")[1]
    assert "0.00 GB" not in line


def test_rows_longer_than_the_context_are_cut_and_that_is_said(world):
    """--length above what the model can see: predicted as training would run it."""
    context, cut = (lorafit.plan(model=world.gguf, rows=8, length=length) for length in (256, 1000))
    assert cut.tokens <= context.tokens
    assert not any("are cut" in note for note in context.notes)
    assert any("rows are cut to 256 tokens" in note for note in cut.notes)


def test_devices_are_estimates(world):
    """A device's memory is the budget, its time is at the published rate, and both are said to be estimates; the
    seed's other claim: 70B with 16 bits does not fit one A100, with NF4 it does, some thousand tokens a second."""
    for name in DEVICES:
        assert lorafit.plan(model=world.gguf, rows=8, length=64, device=name).fits
    plain = lorafit.plan(model="llama-3.1-70b", rows=100, length=2048, device="a100-80gb", base="bf16")
    four = lorafit.plan(model="llama-3.1-70b", rows=100, length=2048, device="a100-80gb", base="nf4")
    assert (plain.fits, four.fits) == (False, True)
    assert 100 < four.tokens / four.seconds < 2000
    assert any("never run there" in note for note in four.notes)
    with pytest.raises(ConfigError, match="a100-80gb"):
        lorafit.plan(model=world.gguf, rows=8, length=64, device="a100-80")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-model", "--rows", "1", "--length", "8"], "no built-in name"),
        (["{gguf}"], "needs DATA, or --rows and --length"),
        (["{gguf}", "--rows", "3"], "needs DATA, or --rows and --length"),
        (["{gguf}", "--rows", "3", "--length", "9", "--device-memory", "much"], "give a size"),
        (["{gguf}", "--rows", "3", "--length", "9", "--memory", "much"], "give a size"),
    ],
)
def test_bad_input_is_one_line(world, arguments, words):
    """Exit code 2, the place and the remedy."""
    outcome = run("plan", *(str(world.gguf) if text == "{gguf}" else text for text in arguments))
    assert outcome.code == 2
    (line,) = [text for text in outcome.err.splitlines() if text.startswith("error:")]
    assert words in line


def test_a_broken_configuration_is_one_line(tmp_path):
    """No model type, or one that nothing can build."""
    for text in ("{", "[]", json.dumps({"hidden_size": 3}), json.dumps({"model_type": "unheard"})):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError):
            lorafit.plan(model=tmp_path, rows=1, length=8)


@pytest.mark.parametrize("name", WRAPPED)
def test_the_adapter_of_a_multimodal_model_has_its_long_names(tmp_path, name):
    """Its file's size to the byte, from the folder and from the configuration alone."""
    folder = folder_of(name, tmp_path / "model")
    model = lorafit.load(folder)
    lorafit.attach(model, 2, 4)
    lorafit.save_adapter(model, tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    for place in (folder, folder / "config.json"):
        assert lorafit.plan(model=place, rows=8, length=16, rank=2).adapter_bytes == size


def test_what_training_refuses_is_not_planned(tmp_path):
    """An architecture that is not known, in a configuration alone: the line that training says, in both its places."""
    found = {
        json.dumps(
            {"model_type": "qwen4"}
        ): r"model_type: 'qwen4' is not supported yet; the nearest supported one is qwen",
        json.dumps({"model_type": "gemma2"}): r"'gemma2' is not supported yet",
        json.dumps({"model_type": "qwen3_vl", "text_config": {}}): r"'qwen3_vl' is not supported yet",
        json.dumps(
            {"model_type": "mistral3", "text_config": {"model_type": "mistral9"}}
        ): r"text_config.model_type: 'mis",
    }
    for text, words in found.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=words):
            lorafit.plan(model=tmp_path, rows=1, length=8)
