"""The laws of lorafit.training.loop: what is done at which step, and that stopping changes nothing."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

from builders.crashes import largest_file
from builders.models import frozen, tiny_model
from builders.rows import random_rows
from lorafit.adapter.attach import adapted_layers, attach
from lorafit.config import TrainConfig
from lorafit.data.order import order
from lorafit.errors import ConfigError, Interrupted, NonFiniteError
from lorafit.evaluate.heldout import held_out
from lorafit.training.checkpoint import Checkpoints
from lorafit.training.loop import Plan, Run, fit, step_rows
from lorafit.training.metrics import Metrics, read_metrics
from lorafit.training.optim import lr_at

ROWS = random_rows([9, 4, 12, 7, 5, 11, 8, 6, 10, 3], seed=1)
HELD = random_rows([8, 6, 9], seed=2)
SETTINGS = TrainConfig(
    rank=4, dropout=0.1, lr=0.01, warmup=0.2, batch_size=4, save_every=2, eval_every=3, micro_batch_tokens=16
)


def run_in(out: Path, steps: int = 8, evaluate: Callable[[], float] | str | None = "rows", **changes) -> Run:
    """A run on a fresh tiny model; metrics go on from the newest checkpoint in `out`."""
    config = replace(SETTINGS, **changes)
    base = frozen(tiny_model("llama"), out / "model")
    attach(base.model, config.rank, config.alpha, config.targets, dropout=config.dropout, seed=config.seed)
    checkpoints = Checkpoints(out)
    newest, _ = checkpoints.newest()
    return Run(
        config=config,
        plan=Plan(steps, math.ceil(len(ROWS) / config.batch_size)),
        model=base.model,
        head=base.head,
        rows=ROWS,
        checkpoints=checkpoints,
        metrics=Metrics(out / "metrics.jsonl", newest.progress.step if newest else 0),
        identity={"base": "tiny"},
        evaluate=(lambda: held_out(base.model, base.head, HELD, 64).loss) if evaluate == "rows" else evaluate,
        report=lambda line: None,
        memory=lambda: 1,
    )


def losses(*values: float) -> Callable[[], float]:
    """An evaluation that gives these in turn."""
    return iter(values).__next__


def adapter(run: Run) -> list[torch.Tensor]:
    return [p.detach().clone() for _, layer in adapted_layers(run.model) for p in layer.adapter.parameters()]


def lines(out: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    """An undisturbed run of 8 steps."""
    run = run_in(tmp_path_factory.mktemp("whole"))
    fit(run, None)
    return run


def assert_ends_as(run: Run, whole: Run) -> None:
    """Adapter and metrics are equal in every bit."""
    assert all(torch.equal(a, b) for a, b in zip(adapter(run), adapter(whole), strict=True))
    assert lines(run.checkpoints.folder.parent) == lines(whole.checkpoints.folder.parent)


@pytest.mark.parametrize(("rows", "size"), [(10, 4), (8, 4), (3, 8), (1, 1), (7, 1), (64, 9)])
def test_each_epoch_takes_every_row_once(rows, size):
    """The steps of an epoch are the slices of its order, the last one may be smaller, and none reaches over."""
    per_epoch = math.ceil(rows / size)
    for epoch in range(3):
        visited = order(5, epoch, rows).tolist()
        for place in range(per_epoch):
            taken = step_rows(5, epoch * per_epoch + place + 1, rows, size)
            assert taken == visited[place * size : (place + 1) * size]
        assert sorted(visited) == list(range(rows))


def test_a_steps_rows_do_not_depend_on_the_steps_before():
    """Asked in any order, a step's rows are the same; a batch of 6 is two batches of 3, three of 2, six of 1."""
    steps = list(range(1, 40))
    forward = {step: step_rows(3, step, 30, 6) for step in steps}
    random.Random(0).shuffle(steps)
    assert {step: step_rows(3, step, 30, 6) for step in steps} == forward
    for size in (1, 2, 3):
        parts = 6 // size
        for step, taken in forward.items():
            pieces = [step_rows(3, (step - 1) * parts + i + 1, 30, size) for i in range(parts)]
            assert list(chain(*pieces)) == taken


def test_the_learning_rate_is_a_function_of_the_step(whole, tmp_path):
    """Each step has the schedule's rate, whatever the batch size and wherever the run was resumed."""
    rates = {line["step"]: line["lr"] for line in lines(whole.checkpoints.folder.parent) if "lr" in line}
    assert rates == {step: lr_at(step, 8, 0.01, "linear", 0.2) for step in range(1, 9)}
    other = run_in(tmp_path, batch_size=2, evaluate=None)
    fit(other, None)
    assert {line["step"]: line["lr"] for line in lines(tmp_path)} == rates


def test_the_lines_of_metrics(whole):
    """Steps count from 1, epochs by rows passed, tokens are the rows' own, and padding is none of them."""
    found = [line for line in lines(whole.checkpoints.folder.parent) if "loss" in line]
    for step, line in enumerate(found, start=1):
        rows = [ROWS[number] for number in step_rows(0, step, len(ROWS), 4)]
        assert line["step"] == step
        assert line["epoch"] == round(step / 3, 4)
        assert line["tokens"] == sum(len(row.ids) for row in rows)
        assert line["trained_tokens"] == sum(sum(row.trained[1:]) for row in rows)
        assert line["loss"] > 0
        assert line["grad_norm"] > 0


def test_training_lowers_the_held_in_loss(whole):
    """The second visit of a row finds it better known."""
    by_step = [line["loss"] for line in lines(whole.checkpoints.folder.parent) if "loss" in line]
    assert sum(by_step[3:6]) < sum(by_step[:3])


def test_evaluations_and_saves_come_when_asked(whole):
    """With 8 steps: evaluations at 3, 6 and the last; of the saves the newest two and the best are left."""
    out = whole.checkpoints.folder.parent
    evaluations = {line["step"]: line["eval_loss"] for line in lines(out) if "eval_loss" in line}
    assert list(evaluations) == [3, 6, 8]
    best = min(evaluations, key=evaluations.get)
    assert set(whole.checkpoints.steps()) == {best, 6, 8}
    newest, _ = whole.checkpoints.newest()
    assert newest.progress.finished
    assert (newest.progress.best_step, newest.progress.best_loss) == (best, evaluations[best])


@pytest.mark.parametrize("step", range(1, 8))
def test_stopped_after_any_step_and_resumed_equals_never_stopped(whole, tmp_path, step):
    """A signal in step k: the step ends, the checkpoint is on disk, the error has the exit code and the line to go on
    with; the resumed run ends in the same bits."""
    run = run_in(tmp_path)
    run.report = lambda line: setattr(run.stop, "signal_number", 15 if line["step"] == step else 0)
    with pytest.raises(Interrupted, match=f"stopped by signal 15 after step {step}, .*--resume {tmp_path}") as caught:
        fit(run, None)
    assert caught.value.exit_code == 143
    run.metrics.close()
    newest, _ = run.checkpoints.newest()
    assert newest.progress.step == step
    again = run_in(tmp_path)
    progress = fit(again, newest)
    assert progress.finished
    assert_ends_as(again, whole)


def test_a_signal_in_the_last_step_does_not_undo_the_end(whole, tmp_path):
    """The run is finished and says so."""
    run = run_in(tmp_path)
    run.report = lambda line: setattr(run.stop, "signal_number", 2 if line["step"] == 8 else 0)
    assert fit(run, None).finished
    assert_ends_as(run, whole)


def test_a_finished_run_does_nothing_more(whole, tmp_path):
    """Resumed from its last checkpoint, no step is taken."""
    newest, _ = whole.checkpoints.newest()
    run = run_in(tmp_path)
    assert fit(run, newest) == newest.progress
    assert lines(tmp_path) == []


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(whole, tmp_path):
    """One line, exit code 2, the checkpoint before it whole; then the run ends in the same bits."""
    run = run_in(tmp_path)

    def fill(line):
        if line["step"] == 5:
            stack.append(largest_file(9000))
            stack[0].__enter__()

    stack = []
    run.report = fill
    with pytest.raises(ConfigError, match="step-00000006: cannot be written: File too large") as caught:
        fit(run, None)
    stack[0].__exit__(None, None, None)
    assert caught.value.exit_code == 2
    run.metrics.close()
    newest, damaged = run.checkpoints.newest()
    assert (newest.progress.step, damaged) == (4, [])
    again = run_in(tmp_path)
    fit(again, newest)
    assert_ends_as(again, whole)


def test_the_best_is_kept_and_a_tie_is_no_improvement(tmp_path):
    """Evaluations 3, 1, 2, 1: the first 1 is the best, and its checkpoint outlives the rotation."""
    run = run_in(tmp_path, evaluate=losses(3.0, 1.0, 2.0, 1.0), eval_every=2, save_every=1)
    progress = fit(run, None)
    assert (progress.best_step, progress.best_loss, progress.stale_evaluations) == (4, 1.0, 2)
    assert run.checkpoints.steps() == [4, 7, 8]


def test_an_improvement_is_saved_between_saves(tmp_path):
    """The best step has a checkpoint even where save_every would make none."""
    run = run_in(tmp_path, evaluate=losses(1.0, 2.0, 3.0), save_every=8)
    assert fit(run, None).best_step == 3
    assert run.checkpoints.steps() == [3, 8]


def test_patience_ends_the_run(tmp_path):
    """Two evaluations in a row without a better one, and the run is finished at that step, resumed or not."""
    run = run_in(tmp_path, evaluate=losses(3.0, 2.0, 2.5, 1.0, 1.5, 1.0, 9.0), eval_every=1, patience=2)
    progress = fit(run, None)
    assert (progress.step, progress.best_step, progress.finished) == (6, 4, True)
    run.metrics.close()
    newest, _ = run.checkpoints.newest()
    assert fit(run_in(tmp_path), newest) == progress
    assert json.loads((run.checkpoints.path(6) / "state.json").read_text())["progress"]["finished"]


def test_without_evaluation_the_newest_is_the_best(tmp_path):
    """No held-out rows: the last checkpoint is what the adapter is made of, and no loss is claimed."""
    run = run_in(tmp_path, evaluate=None)
    progress = fit(run, None)
    assert (progress.best_step, progress.best_loss) == (8, None)
    assert run.checkpoints.steps() == [6, 8]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_held_out_loss_that_is_no_number_stops_the_run(tmp_path, value):
    """Said at its step, with the last checkpoint untouched and no such line in the metrics."""
    run = run_in(tmp_path, evaluate=losses(1.0, value))
    with pytest.raises(NonFiniteError, match=f"held-out loss: is {value} at step 6; look at the held-out rows"):
        fit(run, None)
    newest, _ = run.checkpoints.newest()
    assert newest.progress.step == 4
    assert [line["step"] for line in lines(tmp_path) if "eval_loss" in line] == [3]


def test_evaluation_sees_no_dropout_and_training_does(tmp_path):
    """The model is in eval mode while it is evaluated, in training mode for the steps, and left in eval mode."""
    modes = []
    run = run_in(tmp_path, steps=2, evaluate=lambda: modes.append(run.model.training) or 1.0, eval_every=1)
    run.report = lambda line: modes.append(run.model.training)
    fit(run, None)
    assert modes == [True, False, True] * 2
    assert not run.model.training
