"""Fifty runs on a tiny model, each killed with SIGKILL at random instants, then resumed. Run with `make proof-kill`."""

from __future__ import annotations

import random
import shutil

from builders.models import save_folder, tiny_model
from builders.processes import assert_same_run, finish, kill_at_random, seconds_of, write_data

RUNS = 50


def test_fifty_killed_runs_end_in_the_same_bytes(tmp_path):
    """Saving every step, with dropout and evaluation: 50 of 50 equal the undisturbed run byte for byte."""
    options = {
        "model": str(save_folder(tiny_model("llama"), tmp_path / "model")),
        "data": str(write_data(tmp_path / "data.jsonl")),
        "rank": 4,
        "dropout": 0.1,
        "batch_size": 3,
        "max_steps": 20,
        "save_every": 1,
        "eval_every": 5,
        "threads": 1,
        "lr": 0.01,
    }
    whole = tmp_path / "whole"
    finish({**options, "out": str(whole)})  # pays the fork server's imports
    length = seconds_of({**options, "out": str(tmp_path / "timed")})
    chance, kills, killed = random.Random(2), 0, 0
    while killed < RUNS:
        out = tmp_path / f"run-{killed}"
        times = kill_at_random({**options, "out": str(out)}, chance, longest=length * 0.9)
        assert_same_run(whole, out)
        shutil.rmtree(out)
        kills += times
        killed += times > 0
    print(f"\n{kills} kills in {RUNS} runs, {RUNS} of {RUNS} resumed to the same bytes")
