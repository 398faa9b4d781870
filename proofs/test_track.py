"""The heavier trackers with their real libraries, offline: what they kept is read back. `make proof-track`."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from wandb.proto import wandb_internal_pb2

import lorafit
from builders.commands import QUICK, World
from lorafit.run import resume
from lorafit.training.metrics import read_metrics


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


def train(world: World, name: str) -> Path:
    out = world.folder / "out"
    lorafit.train(model=world.model, data=world.data, eval=world.test, out=out, report_to=[name], **QUICK)
    return out


def numbers(out: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> value of every line of metrics.jsonl, and the final losses."""
    lines = read_metrics(out / "metrics.jsonl")
    report = json.loads((out / "report.json").read_text())
    lines.append({"step": report["steps"], **{key: report[key] for key in ("base_loss", "adapter_loss")}})
    return {(key, line["step"]): value for line in lines for key, value in line.items() if key != "step"}


def records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; checksum, length, kind: whole, first,
    middle, last) after a header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def test_wandb_offline_keeps_every_number(world, monkeypatch):
    """WANDB_MODE=offline: the run's own file holds every value by its step."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = train(world, "wandb")
    [file] = (out / "wandb").glob("offline-run-*/*.wandb")
    kept = {}
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        step = items.pop("_step", None)
        kept |= {(key, step): value for key, value in items.items() if not key.startswith("_")}
    assert kept == pytest.approx(numbers(out))
    assert json.loads((out / "trackers.json").read_text())["wandb"] in file.name


def test_mlflow_keeps_every_number(world, monkeypatch, tmp_path):
    """A database file of its own: every value by its step, the settings as parameters, the run ended."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    out = train(world, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run(json.loads((out / "trackers.json").read_text())["mlflow"])
    histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    kept = {(key, metric.step): metric.value for key, metrics in histories.items() for metric in metrics}
    assert kept == pytest.approx(numbers(out))
    assert run.data.params["rank"] == "4"
    assert run.info.status == "FINISHED"


def test_trackio_keeps_every_number(world, monkeypatch, tmp_path):
    """On this machine: its database holds every value by its step."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    out = train(world, "trackio")
    [file] = (tmp_path / "trackio").glob("lorafit*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT step, metrics FROM metrics").fetchall()
    kept = {(key, step): value for step, values in rows for key, value in json.loads(values).items()}
    assert kept == pytest.approx(numbers(out))


def test_a_resumed_run_goes_on_in_its_own_run(world, monkeypatch, tmp_path):
    """MLflow: one run, though the command was stopped after step 3 and resumed."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    out = train(world, "mlflow")
    for name in ("report.json", "report.html"):
        (out / name).unlink()
    for folder in (out / "checkpoints").glob("step-*6"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resume(out)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("lorafit")
    assert len(client.search_runs([experiment.experiment_id])) == 1
