"""Whole runs on a tiny model: files, resuming, killing, refusing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lorafit
from builders.gguf_files import write_tiny_gguf
from builders.models import save_folder, tiny_model
from builders.processes import assert_same_run, finish, kill_at_random, metrics, seconds_of, start, write_data
from builders.tokenizers_tiny import tiny_gguf_metadata
from lorafit.errors import ConfigError, Faults, LorafitError, NonFiniteError, ResumeError
from lorafit.run import resume


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, object]:
    """A tiny model folder, 24 rows, 12 steps with dropout, evaluation and frequent saves."""
    folder = tmp_path_factory.mktemp("run")
    save_folder(tiny_model("llama"), folder / "model")
    return {
        "model": str(folder / "model"),
        "data": str(write_data(folder / "data.jsonl")),
        "rank": 4,
        "dropout": 0.1,
        "batch_size": 3,
        "max_steps": 12,
        "save_every": 2,
        "eval_every": 3,
        "threads": 1,
        "lr": 0.01,
    }


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    finish({**options, "out": str(out)})
    return out


def test_a_run_leaves_the_files_of_the_specification(finished):
    """run.yaml, metrics, checkpoints, adapter with card and fingerprints, report as page and figures."""
    files = {p.name for p in finished.iterdir()} - {".lock"}
    assert files == {"run.yaml", "metrics.jsonl", "checkpoints", "adapter", "report.html", "report.json"}
    adapter = {p.name for p in (finished / "adapter").iterdir()}
    assert adapter == {"adapter_config.json", "adapter_model.safetensors", "lorafit.json", "README.md"}
    assert not list(finished.rglob(".tmp-*"))
    report = json.loads((finished / "report.json").read_text())
    wanted = "base_loss adapter_loss tokens trained_tokens steps seconds training_seconds tokens_per_second " \
        "peak_memory_bytes private_memory_bytes predicted trainable_parameters total_parameters adapter_bytes " \
        "data machine versions samples"  # fmt: skip
    assert set(wanted.split()) <= set(report)
    assert report["steps"] == 12
    assert report["adapter_loss"] < report["base_loss"]


def test_metrics_have_a_line_per_step_and_evaluation(finished):
    """Steps 1 to 12 once each with every field, evaluations at 3, 6, 9 and 12."""
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6, 9, 12]
    names = "step epoch loss lr grad_norm tokens trained_tokens seconds tokens_per_second memory_bytes"
    assert all(list(line) == names.split() for line in steps)


def test_the_newest_two_checkpoints_and_the_best_are_kept(finished):
    """Rotation never drops the best."""
    kept = sorted(int(p.name.removeprefix("step-")) for p in (finished / "checkpoints").iterdir())
    evaluations = {m["step"]: m["eval_loss"] for m in metrics(finished) if "eval_loss" in m}
    best = min(evaluations, key=evaluations.get)
    assert set(kept) == {best, 10, 12} | ({9} if best == 9 else set())


def test_the_same_settings_give_the_same_bytes(options, finished, tmp_path):
    """Two runs in different folders write the same adapter."""
    finish({**options, "out": str(tmp_path / "again")})
    assert_same_run(finished, tmp_path / "again")


def test_run_yaml_read_back_repeats_the_run(options, finished, tmp_path):
    """The resolved configuration, given as --config, makes the same adapter."""
    from lorafit.config import read_yaml

    values = read_yaml(finished / "run.yaml")
    values.pop("identity")
    finish({**values, "out": str(tmp_path / "again")})
    assert_same_run(finished, tmp_path / "again")


def test_killed_runs_resume_to_the_same_bytes(options, finished, tmp_path):
    """kill -9 at random instants, several times per run: adapter and metrics equal the undisturbed run's."""
    chance, kills = random.Random(7), 0
    for attempt in range(3):
        out = tmp_path / f"killed-{attempt}"
        kills += kill_at_random({**options, "out": str(out)}, chance, longest=1.5)
        assert_same_run(finished, out)
    assert kills >= 2


def test_a_signal_ends_the_run_after_a_checkpoint(options, finished, tmp_path):
    """SIGTERM and SIGINT: exit 143 and 130, a checkpoint on disk, and the resumed run ends in the same bytes."""
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        out = tmp_path / str(number)
        child = start({**options, "out": str(out)})
        while not (out / "metrics.jsonl").exists() or not metrics(out):
            time.sleep(0.01)
        os.kill(child.pid, number)
        child.join()
        assert child.exitcode in (code, 0)
        finish({**options, "out": str(out)})
        assert_same_run(finished, out)


def test_a_damaged_newest_checkpoint_is_skipped(options, finished, tmp_path):
    """With the newest checkpoint cut short, the run goes on from the one before and ends in the same bytes."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "adapter")
    victim = out / "checkpoints" / "step-00000012" / "optimizer.safetensors"
    victim.write_bytes(victim.read_bytes()[:-9])
    finish({**options, "out": str(out)})
    assert_same_run(finished, out)


def test_no_checkpoint_means_step_zero(options, finished, tmp_path):
    """A run killed before its first checkpoint has run.yaml alone and starts again."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(finished / "run.yaml", out)
    finish({**options, "out": str(out)})
    assert_same_run(finished, out)


def copy_of(finished: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    return out


def test_changed_data_base_and_settings_refuse_to_resume(options, finished, tmp_path):
    """Each change is refused with what it was and what it is."""
    out = copy_of(finished, tmp_path)
    with pytest.raises(ResumeError, match="rank: was 4, is 8"):
        resume(out, {"rank": 8})
    text = (out / "run.yaml").read_text()
    (out / "run.yaml").write_text(text.replace("lr: 0.01 ", "lr: 0.02 "))
    with pytest.raises((ResumeError, Faults), match=r"settings.lr: was 0.01, is 0.02"):
        resume(out)
    data = write_data(tmp_path / "data.jsonl", rows=25)
    (out / "run.yaml").write_text(text.replace(options["data"], str(data)))
    with pytest.raises((ResumeError, Faults), match=r"data.data.jsonl: was"):
        resume(out)
    other = save_folder(tiny_model("llama", seed=1), tmp_path / "other")
    (out / "run.yaml").write_text(text.replace(options["model"], str(other)))
    with pytest.raises(ResumeError, match="base: was"):
        resume(out)


def test_a_folder_that_is_not_empty_is_refused(options, tmp_path):
    """Nothing of the user's is overwritten; with overwrite, only lorafit's own files go."""
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        lorafit.train(**options, out=tmp_path)
    lorafit.train(**{**options, "max_steps": 1}, out=tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_bad_data_stops_the_run_before_anything_is_written(options, tmp_path):
    """Faults name file and line, and OUT is not made."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": null}\n')
    with pytest.raises(LorafitError, match=r"bad.jsonl:2: .*completion"):
        lorafit.train(**{**options, "data": bad}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_writers_are_refused(options, finished, tmp_path):
    """The lock is held by the process that writes, and by nobody when it is gone."""
    from lorafit.training.checkpoint import single_writer

    out = copy_of(finished, tmp_path)
    with single_writer(out), pytest.raises(ResumeError, match="another lorafit process"), single_writer(out):
        pass
    with single_writer(out):
        pass


def test_a_nan_in_the_base_stops_at_step_one_and_names_the_tensor(options, tmp_path):
    """Not loss 0: the run stops within the step and says which frozen weight is damaged."""
    import torch

    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    save_folder(model, tmp_path / "model")
    with pytest.raises(NonFiniteError, match=r"layers.1.mlp.up_proj.*frozen weight holds NaN or infinity at step 1"):
        lorafit.train(**{**options, "model": str(tmp_path / "model"), "eval_fraction": 0.0}, out=tmp_path / "out")


def test_patience_ends_the_run_early_and_keeps_the_best(options, tmp_path):
    """A learning rate that wrecks the model: evaluation stops improving, the run ends, the best is what is written."""
    result = lorafit.train(
        **{**options, "lr": 0.5, "eval_every": 1, "patience": 2, "max_steps": 60}, out=tmp_path / "out"
    )  # fmt: skip
    evaluations = [m for m in metrics(tmp_path / "out") if "eval_loss" in m]
    assert len(evaluations) < 60
    assert result.report["adapter_loss"] == pytest.approx(min(m["eval_loss"] for m in evaluations), rel=1e-5)


def test_init_adapter_goes_on_from_an_adapter(options, finished, tmp_path):
    """The first step's loss is the old adapter's, not the base's; its rank is kept."""
    shared = {**options, "dropout": 0.0, "max_steps": 1, "seed": 3}
    fresh = lorafit.train(**shared, out=tmp_path / "fresh")
    more = lorafit.train(**shared, init_adapter=finished / "adapter", out=tmp_path / "more")
    assert more.report["trainable_parameters"] == fresh.report["trainable_parameters"]
    first = [metrics(tmp_path / name)[0]["loss"] for name in ("fresh", "more")]
    assert first[1] < first[0] - 0.1


@pytest.fixture(scope="module")
def quantised(options, tmp_path_factory) -> dict[str, object]:
    """The same run on a Q4_0 file, whose rows divide into NF4's blocks too."""
    file = tmp_path_factory.mktemp("quantised") / "model.gguf"
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    write_tiny_gguf(file, model, "llama", tiny_gguf_metadata(), "Q4_0")
    return {**options, "model": str(file), "compute": "fp32", "max_steps": 6}


def test_a_packed_base_trains_to_the_unpacked_ones_bytes(quantised, tmp_path, monkeypatch):
    """From the file as it lies and from the file unpacked: the adapter's bytes and the losses are the same. Plain torch
    kernels sum in another order: losses within 1e-4."""
    for name, base, kernels in (("packed", "auto", "1"), ("unpacked", "fp32", "1"), ("plain", "packed", "0")):
        monkeypatch.setenv("LORAFIT_NATIVE", kernels)
        words = {**quantised, "base": base, "out": str(tmp_path / name)}
        code = f"import lorafit; lorafit.train(**{words!r})"
        ran = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=True)
        warned = (
            "attention, norms and packed weights run in plain torch, which is slow (LORAFIT_NATIVE=0)" in ran.stderr
        )
        assert warned == (name == "plain")
        adapter = [(tmp_path / n / "adapter" / "adapter_model.safetensors").read_bytes() for n in ("packed", name)]
        lines = metrics(tmp_path / name), metrics(tmp_path / "packed")
        if name == "unpacked":
            assert adapter[0] == adapter[1]
            assert lines[0] == lines[1]
        for plain, kernel in zip(*lines, strict=True):
            assert plain.get("loss", 0.0) == pytest.approx(kernel.get("loss", 0.0), rel=1e-4)
    assert "base: packed  # auto: the model's file is quantised" in (tmp_path / "packed" / "run.yaml").read_text()


@pytest.mark.parametrize("base", ["packed", "nf4", "int8"])
def test_runs_on_few_bits_resume_to_the_same_bytes(base, quantised, tmp_path):
    """Killed at random instants, as with a dense base. The report counts weights, not bytes, and says how they are."""
    given = {**quantised, "base": base, "save_every": 1, "eval_every": 1}
    long = seconds_of({**given, "out": str(tmp_path / "whole")})
    kills = kill_at_random({**given, "out": str(tmp_path / "killed")}, random.Random(5), longest=long / 2, most=4)
    assert kills
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    plain = sum(p.numel() for p in tiny_model("llama", hidden_size=64, intermediate_size=128).parameters())
    assert report["total_parameters"] == plain + report["trainable_parameters"]
    assert {"packed": "Q4_0", "nf4": "NF4", "int8": "INT8"}[base] in report["base"]["bytes_by_format"]
    assert report["base"]["kept_in_16_bits"] == []


def test_an_adapter_serves_on_every_storage_of_its_base(quantised, tmp_path, capsys):
    """Trained on the packed file, it loads on the same file unpacked, in NF4 and in int8, with a note where values
    are rounded anew, and is refused on another model."""
    out = tmp_path / "out"
    lorafit.train(**{**quantised, "out": str(out)})
    for base, note in (
        ("packed", ""),
        ("fp32", ""),
        ("nf4", "Q4_0 there, NF4 here"),
        ("int8", "Q4_0 there, INT8 here"),
    ):
        capsys.readouterr()
        lorafit.load(quantised["model"], adapter=out / "adapter", base=base, compute="fp32")
        assert note in capsys.readouterr().err
    other = tmp_path / "other.gguf"
    model = tiny_model("llama", seed=1, hidden_size=64, intermediate_size=128)
    write_tiny_gguf(other, model, "llama", tiny_gguf_metadata(), "Q4_0")
    with pytest.raises(LorafitError, match="it was trained on other weights"):
        lorafit.load(other, adapter=out / "adapter", compute="fp32")
