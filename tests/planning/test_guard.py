"""The laws of lorafit.planning.guard: what is missing is seen, and what can be lowered is lowered step by step."""

from __future__ import annotations

import shutil

import pytest

import lorafit
from builders.commands import QUICK, World
from lorafit import machine
from lorafit.config import TrainConfig, read_yaml
from lorafit.planning import guard as guarding
from lorafit.planning.guard import Guard
from lorafit.run import resume

LARGE = 10**15


def guard(budget: int, given: bool = True, moment: int = 0, growth: int = 0) -> Guard:
    return Guard(budget, given, budget // 2, moment, growth, longest=100, layers=4)


def test_nothing_is_lacking_inside_the_budget():
    """With ample room no bytes are missing, before step 1 nor after it; a nearly full budget lacks some."""
    now = machine.memory_bytes()
    assert guard(2 * now).lacks() == guard(2 * now).lacks(before=True) == 0
    assert guard(now).lacks() > 0


def test_a_save_and_the_optimizer_are_kept_room_for():
    """What a save needs for a moment counts always, what the optimizer takes up only before step 1."""
    now = machine.memory_bytes()
    assert guard(2 * now, moment=2 * now).lacks() > 0
    assert guard(2 * now, growth=2 * now).lacks() == 0
    assert guard(2 * now, growth=2 * now).lacks(before=True) > 0


def test_without_a_budget_the_machine_decides(monkeypatch):
    """Others may take what was free when the run began."""
    monkeypatch.setattr(machine, "available_memory", lambda: LARGE)
    assert guard(1000, given=False).lacks() == 0
    monkeypatch.setattr(machine, "available_memory", lambda: 0)
    assert guard(LARGE, given=False).lacks() > 0


def test_lowering_ends_where_nothing_is_left():
    """Packs are halved down to the longest row, then every layer is computed twice, then nothing can be lowered."""
    config = TrainConfig(micro_batch_tokens=512, checkpointed_layers=1, checkpointing="some")
    seen = []
    while config is not None:
        seen.append((config.micro_batch_tokens, config.checkpointed_layers))
        config = guard(1000).lowered(config)
    assert seen == [(512, 1), (256, 1), (128, 1), (100, 1), (100, 4)]


def test_only_a_run_near_its_budget_is_rehearsed():
    """A rehearsal costs start-up time."""
    assert not guard(1000).rehearses
    assert Guard(1000, True, 900, 0, 0, 1, 1).rehearses


def test_a_run_that_runs_short_goes_on_with_smaller_packs(tmp_path, monkeypatch, capsys):
    """When memory runs short after step 1, packs are halved and then layers computed twice: it is said, run.yaml has it
    with the reason, the losses are those of an undisturbed run within rounding, and the run can be resumed."""
    world = World(tmp_path)
    free, calls = machine.available_memory, []

    def falling() -> int:
        calls.append(1)
        return free() if len(calls) < 4 else 0

    common = {**QUICK, "model": world.gguf, "data": world.data, "eval": world.test, "micro_batch_tokens": 128}
    plain = lorafit.train(**common, out=tmp_path / "plain").report
    monkeypatch.setattr(machine, "available_memory", falling)
    result = lorafit.train(**common, out=tmp_path / "short")
    monkeypatch.undo()
    assert "lowered after step" in capsys.readouterr().err
    text = (tmp_path / "short" / "run.yaml").read_text()
    values = read_yaml(tmp_path / "short" / "run.yaml")
    assert values["micro_batch_tokens"] < 128
    assert values["checkpointed_layers"] == 2
    assert "# lowered after step" in text
    assert result.report["adapter_loss"] == pytest.approx(plain["adapter_loss"], rel=1e-4)
    shutil.rmtree(tmp_path / "short" / "checkpoints" / "step-00000006")
    resume(tmp_path / "short")
    assert read_yaml(tmp_path / "short" / "run.yaml")["micro_batch_tokens"] == values["micro_batch_tokens"]


def test_a_rehearsal_changes_nothing(tmp_path, monkeypatch):
    """A run whose largest pack was run before step 1 has the same adapter, byte for byte."""
    world = World(tmp_path)
    common = {**QUICK, "model": world.gguf, "data": world.data, "eval": world.test}
    lorafit.train(**common, out=tmp_path / "plain")
    monkeypatch.setattr(guarding, "NEAR", 0.0)
    lorafit.train(**common, out=tmp_path / "rehearsed")
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("plain", "rehearsed")
    ]
    assert adapters[0] == adapters[1]
