"""`info` and `doctor`: what each path is, and one line for what is none of them or damaged."""

from __future__ import annotations

import json
import shutil

import pytest

import lorafit
from builders.commands import QUICK, World, run
from builders.models import frozen, tiny_model


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("info"))


def info(path) -> dict:
    outcome = run("info", path, "--json")
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    return outcome.json


def test_info_of_a_model_counts_its_tensors(world):
    """Folder and GGUF of the same weights: same architecture, parameters, shape and tokenizer; bytes by format."""
    expected = sum(p.numel() for p in tiny_model("llama").parameters())
    folder, gguf = info(world.model), info(world.gguf)
    assert folder == gguf
    assert (folder["kind"], folder["architecture"], folder["parameters"]) == ("model", "llama", expected)
    assert folder["bytes_by_format"] == {"F32": 4 * expected}
    assert (folder["hidden_size"], folder["num_hidden_layers"], folder["chat_template"]) == (32, 2, True)
    assert info(world.plain_gguf)["chat_template"] is False


def test_info_of_an_adapter_says_rank_base_and_data(world):
    """Rank, alpha, targets, sizes, its base and the fingerprints of base, tokenizer and template."""
    found = info(world.out / "adapter")
    assert (found["kind"], found["rank"], found["alpha"], found["base"]) == ("adapter", 4, 32, str(world.model))
    assert found["parameters"] == world.result.report["trainable_parameters"]
    assert found["architecture"] == "llama"
    assert list(found["data"]) == ["data.jsonl"]
    assert found["fingerprints"] == {key: info(world.out)["settings"]["identity"][key] for key in found["fingerprints"]}


def test_info_of_pefts_adapter_leaves_out_what_it_cannot_know(world, tmp_path):
    """An adapter saved by PEFT has no lorafit.json: rank and targets are told, the base's fingerprint is null."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(world.model), LoraConfig(r=3, target_modules="all-linear")
    )
    model.save_pretrained(tmp_path / "peft")
    found = info(tmp_path / "peft")
    assert (found["kind"], found["rank"], found["tensors"]) == ("adapter", 3, 28)
    assert found["fingerprints"] == {"base": None, "tokenizer": None, "template": None}
    assert run("info", tmp_path / "peft").code == 0


def test_info_of_an_adapter_names_experts_and_whole_matrices(tmp_path):
    """PEFT has both outside of target_modules; an adapter without them has neither key."""
    model = frozen(tiny_model("qwen3_moe"), tmp_path / "model").model
    lorafit.attach(model, 2, 4, ["q_proj", "experts"], modules_to_save=["lm_head"])
    lorafit.save_adapter(model, tmp_path / "adapter")
    found = info(tmp_path / "adapter")
    assert found["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert found["modules_to_save"] == ["lm_head"]


def test_info_of_a_run_and_a_checkpoint(world, tmp_path):
    """A run tells its settings, figures and checkpoints; one without a report is not finished."""
    found = info(world.out)
    assert (found["kind"], found["finished"], found["checkpoints"]) == ("run", True, [3, 6])
    assert found["settings"]["rank"] == QUICK["rank"]
    assert found["figures"]["adapter_loss"] == world.result.report["adapter_loss"]
    checkpoint = info(world.out / "checkpoints" / "step-00000003")
    assert (checkpoint["kind"], checkpoint["complete"], checkpoint["step"]) == ("checkpoint", True, 3)
    shutil.copytree(world.out, tmp_path / "out")
    (tmp_path / "out" / "report.json").unlink()
    (tmp_path / "out" / "checkpoints" / "step-00000003" / "optimizer.safetensors").unlink()
    assert info(tmp_path / "out")["finished"] is False
    assert info(tmp_path / "out" / "checkpoints" / "step-00000003")["complete"] is False


def test_info_is_readable_without_json(world):
    """One fact a line, on standard output alone."""
    for path in (world.model, world.gguf, world.out, world.out / "adapter"):
        outcome = run("info", path)
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out.startswith("kind  ")


def test_info_of_nonsense_is_one_line(world, tmp_path):
    """Nothing there, an empty folder, data, a text file."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    for path in (tmp_path / "nothing", tmp_path / "empty", tmp_path / "text", world.data, world.out / "checkpoints"):
        outcome = run("info", path)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith(f"error: {path}: ")
        assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(("key", "value"), [("r", 0), ("r", "x"), ("lora_alpha", None), ("peft_type", "IA3")])
def test_an_adapter_that_no_command_would_take_is_not_described(world, tmp_path, key, value):
    """info refuses it as generate does: the key and its value in one line."""
    shutil.copytree(world.out / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    outcome = run("info", file.parent)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {file}: {key}: is {value!r}; ")


DAMAGE = [b"", b"{", b"[1]", b"null", b"3", b'"a"', b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize(
    "file",
    [
        "adapter/adapter_config.json",
        "adapter/lorafit.json",
        "adapter/adapter_model.safetensors",
        "checkpoints/step-00000006/state.json",
        "report.json",
        "run.yaml",
    ],
)
def test_damaged_files_inside_are_one_line(world, tmp_path, file):
    """Cut, empty, of another kind, nested without end: the file is named, and no traceback is shown."""
    out = tmp_path / "out"
    shutil.copytree(world.out, out)
    whole, victim = (out / file).read_bytes(), out / file
    target = {"report.json": out, "run.yaml": out}.get(file, victim.parent)
    for damage in (*DAMAGE, whole[: len(whole) // 2]):
        victim.write_bytes(damage)
        outcome = run("info", target, "--json")
        if file == "run.yaml" and damage == whole[: len(whole) // 2]:
            continue  # half a YAML file may be YAML
        assert (outcome.code, outcome.out) == (2, ""), damage[:20]
        assert outcome.err.startswith(f"error: {victim}: "), outcome.err
        assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("value", [None, 3, "x", [], {}])
def test_json_of_another_shape_is_no_traceback(world, tmp_path, value):
    """Every key of the adapter's and the checkpoint's JSON may hold anything: a description or one line comes back."""
    shutil.copytree(world.out, tmp_path / "out")
    for name in ("adapter/adapter_config.json", "adapter/lorafit.json", "checkpoints/step-00000006/state.json"):
        file = tmp_path / "out" / name
        whole = json.loads(file.read_text())
        for key in whole:
            file.write_text(json.dumps({**whole, key: value}))
            for words in ((), ("--json",)):
                outcome = run("info", file.parent, *words)
                assert outcome.code in (0, 2)
                assert outcome.err.count("\n") == (outcome.code == 2)


def test_doctor_tells_machine_versions_kernels_and_memory():
    """The same facts as lines and as JSON."""
    found = run("doctor", "--json")
    assert (found.code, found.err) == (0, "")
    assert {"machine", "memory", "versions", "compute", "why", "kernels", "gpu"} <= set(found.json)
    assert {"python", "lorafit", "torch", "transformers"} <= set(found.json["versions"])
    assert found.json["memory"]["available_bytes"] > 0
    lines = run("doctor").out
    assert all(key in lines for key in found.json)
