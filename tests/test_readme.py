"""README.md does what it says: its commands and its Python run as they stand there, on tiny files of those names."""

from __future__ import annotations

import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from torch import nn

from builders.commands import World, one_core, run, write_rows
from lorafit.cli import cli
from lorafit.data.records import read_records
from lorafit.kernels import BLOCK_TYPES
from lorafit.model.sources import MODEL_TYPES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The code blocks of a language; "" for those without one."""
    return [text for name, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S) if name == language]


def commands() -> list[str]:
    """Every line of a block that runs lorafit, without its comment."""
    lines = [line.split("  #")[0].strip() for block in blocks("") for line in block.splitlines()]
    return [line for line in lines if line.startswith("lorafit ")]


@pytest.fixture(scope="module", autouse=True)
def _one_core():
    with one_core():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model.gguf, examples.jsonl and test.jsonl, which the README's commands name."""
    world = World(tmp_path_factory.mktemp("readme"))
    world.gguf, world.data, world.test  # noqa: B018
    world.data.rename(world.folder / "examples.jsonl")
    return world.folder


def test_the_commands_run_as_they_stand(folder, monkeypatch):
    """Each in the README's order, with exit code 0; then the two that go on from a run."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))  # what is said to chat
    monkeypatch.setattr("lorafit.export.verify.find_spec", lambda name: None)  # llama.cpp refuses so tiny a vocabulary
    found = commands()
    assert [command.split()[1] for command in found] == [
        *["preview", "plan", "train", "generate", "chat", "eval"],
        *["export"] * 3,
        "merge",
    ]
    later = ["lorafit train --resume runs/mine", "lorafit train --config runs/mine/run.yaml --out NEW"]
    assert all(command.replace("runs/mine/run.yaml", "run.yaml") in README for command in later)
    for command in [*found, *later]:
        words = re.findall(r'"([^"]*)"|(\S+)', command.removeprefix("lorafit "))
        outcome = run(*(quoted or plain for quoted, plain in words))
        assert outcome.code == 0, f"{command}\n{outcome.err}"
    runs = [folder / "runs" / "mine", folder / "NEW"]
    adapters = [(path / "adapter" / "adapter_model.safetensors").read_bytes() for path in runs]
    assert adapters[0] == adapters[1]
    tree = next(block for block in blocks("") if block.startswith("run.yaml"))
    assert {line.split()[0].strip("/") for line in tree.splitlines()} <= {path.name for path in runs[0].iterdir()}


def test_the_python_runs_as_it_stands(folder, tmp_path, monkeypatch, capsys):
    """The snippet, with a module of the reader's own: it prints two losses and leaves an adapter."""
    monkeypatch.chdir(tmp_path)
    for name in ("model.gguf", "examples.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    (snippet,) = blocks("python")
    (tmp_path / "snippet.py").write_text(snippet, encoding="utf-8")
    own = nn.ModuleDict({"q_proj": nn.Linear(16, 16), "v_proj": nn.Linear(16, 16)})
    runpy.run_path(str(tmp_path / "snippet.py"), {"any_torch_module": own})
    report = json.loads((tmp_path / "runs" / "mine" / "report.json").read_text())
    planned, losses = capsys.readouterr().out.splitlines()
    assert planned.startswith("{'total': ")
    assert losses == f"{report['base_loss']} {report['adapter_loss']}"
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
    assert sum(parameter.requires_grad for parameter in own.parameters()) == 4


def test_the_examples_are_good_data(tmp_path):
    """Each JSON block reads as one format without a fault."""
    found = [json.loads(line) for block in blocks("json") for line in block.splitlines()]
    assert len(found) >= 2
    for number, row in enumerate(found):
        read = read_records([write_rows(tmp_path / f"{number}.jsonl", [row])])
        assert (read.faults, len(read.records)) == ([], 1)


def test_what_is_named_exists():
    """Commands, options, make targets, links and the files of the tree."""
    options = {flag for command in cli.commands.values() for option in command.params for flag in option.opts} | {
        "--help"
    }
    assert set(re.findall(r"--[a-z][a-z-]*", README)) <= options
    named = set(re.findall(r"`lorafit ([a-z]+)", README)) | {command.split()[1] for command in commands()}
    assert named <= set(cli.commands)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
    for link in re.findall(r"\]\(([^)]+)\)|`((?:src|examples|docs)/[\w./]+)`", README):
        assert (ROOT / "".join(link)).exists(), link
    tree = next(block for block in blocks("") if block.startswith("src/lorafit/"))
    names = re.findall(r"\b(\w+\.py)\b", tree)
    assert all(list((ROOT / "src" / "lorafit").rglob(name)) for name in names)
    top = {path.name for path in (ROOT / "src" / "lorafit").glob("*.py") if not path.name.startswith("__")}
    assert top <= set(names)
    rooms = {path.parent.name for path in (ROOT / "src" / "lorafit").glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"^  (\w+)/", tree, re.M))


def test_what_works_is_what_the_code_reads():
    """The GGUF types of the table are those that are unpacked; it has a name for every model type."""
    (files,) = re.findall(r"^\| files \| GGUF \((.*?)\)", README, re.M)
    assert set(files.split(", ")) == set(BLOCK_TYPES)
    (models,) = re.findall(r"^\| models \| (.*?) \|", README, re.M)
    families = [re.sub(r" \(.*?\)", "", name) for name in re.split(r", (?![^(]*\))", models)]
    letters = [re.sub("[^a-z0-9]", "", name.lower()) for name in families]
    assert sorted(letters) == sorted(kind.removesuffix("_text").replace("_", "") for kind in MODEL_TYPES)
