"""The laws of lorafit.trackers: a tracker has the numbers of metrics.jsonl, and never costs a run."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lorafit
from builders.commands import QUICK, World, run
from lorafit import trackers
from lorafit.errors import ConfigError
from lorafit.trackers import Trackers, check
from lorafit.training.metrics import read_metrics


@contextlib.contextmanager
def tracking(names: list[str], out: Path, step: int) -> Iterator[Trackers]:
    with Trackers() as tracked:
        tracked.begin(names, out, {}, step)
        yield tracked


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("trackers"))


def events(out) -> EventAccumulator:
    found = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def test_tensorboard_has_every_number_of_the_metrics(world, tmp_path):
    """Read back with TensorBoard's own reader: every value of every line by its step within float32's rounding, and
    the final losses; the settings as text."""
    result = lorafit.train(
        model=world.model, data=world.data, eval=world.test, out=tmp_path / "out",
        report_to=["jsonl", "tensorboard"], **QUICK,
    )  # fmt: skip
    read = events(tmp_path / "out")
    told = {tag: {event.step: event.value for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}
    count = 0
    for line in read_metrics(tmp_path / "out" / "metrics.jsonl"):
        for key, value in line.items():
            if key != "step":
                assert told[key][line["step"]] == pytest.approx(value, rel=1e-6)
                count += 1
    assert count == sum(map(len, told.values())) - 2
    for name in ("base_loss", "adapter_loss"):
        assert told[name] == {6: pytest.approx(result.report[name], rel=1e-6)}
    assert read.Tags()["tensors"] == ["settings/text_summary"]


def test_a_resumed_run_goes_on_without_doubles(world, tmp_path):
    """What was written after the checkpoint that is gone on from is written once in the end."""
    out = tmp_path / "out"
    with tracking(["tensorboard"], out, 0) as tracked:
        for step in range(1, 6):
            tracked.log({"step": step, "loss": float(step)})
    with tracking(["tensorboard"], out, 3) as tracked:
        for step in range(4, 7):
            tracked.log({"step": step, "loss": step + 0.5})
    assert [(event.step, event.value) for event in events(out).Scalars("loss")] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5), (6, 6.5),
    ]  # fmt: skip


def test_names_are_checked_before_anything_is_done(world, tmp_path, monkeypatch):
    """An unknown tracker, and one whose library is missing, are one line each; OUT is not made."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    for names, says in [
        ("jsonl,comet", "--report-to: comet is no tracker; there are jsonl, tensorboard, wandb, mlflow, trackio"),
        ("jsonl,wandb", "--report-to wandb: is not installed; pip install wandb, or 'lorafit[track]' for all"),
    ]:
        outcome = run("train", world.model, world.data, "--out", tmp_path / "out", "--report-to", names)
        assert (outcome.code, outcome.err) == (2, f"error: {says}\n")
        assert not (tmp_path / "out").exists()
    check(["jsonl", "tensorboard"])


class Failing:
    """A tracker whose disk is full from its second step on."""

    faults = (OSError,)

    def __init__(self, out, settings, step, runs) -> None:
        self.steps: list[int] = []

    def log(self, step, values) -> None:
        if self.steps:
            raise OSError(28, "No space left on device")
        self.steps.append(step)

    def close(self) -> None:
        raise AssertionError("it was left out")


def test_a_tracker_that_fails_is_said_once_and_left_out(tmp_path, monkeypatch, capsys):
    """The others go on."""
    monkeypatch.setitem(trackers.KINDS, "failing", Failing)
    with tracking(["failing", "tensorboard"], tmp_path, 0) as tracked:
        for step in (1, 2, 3):
            tracked.log({"step": step, "loss": 1.0, "nothing": None})
    said = capsys.readouterr().err
    assert said.count("failing failed, and the run goes on without it: [Errno 28] No space left on device") == 1
    assert len(events(tmp_path).Scalars("loss")) == 3


def test_a_tracker_that_cannot_begin_is_one_line(tmp_path, monkeypatch):
    """ConfigError with its name, before step 1; what was opened before it is closed."""

    class Closed(Failing):
        def __init__(self, *_: object) -> None:
            raise OSError(13, "Permission denied")

    monkeypatch.setitem(trackers.KINDS, "closed", Closed)
    refused = pytest.raises(ConfigError, match=r"--report-to closed: cannot begin: .*Permission denied")
    with refused, tracking(["tensorboard", "closed"], tmp_path, 0):
        raise AssertionError("must not begin")
